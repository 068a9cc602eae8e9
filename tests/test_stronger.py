"""SAC's ingredients, each off by default: batch norm, categorical critics, unit weights, scaled rewards, no target network."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import Count
from drawn import drawn
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from test_capture import pair, ring  # noqa: F401  (a fixture)
from test_laws import batch_for
from test_resume import SMALL, assert_equal, everything, timeless

import rlamort as ra
from rlamort.agent import descend
from rlamort.critic import Critic
from rlamort.domain import HeldNoise
from rlamort.errors import Preempted, UserError
from rlamort.head import Categorical, Moved, TwoHot
from rlamort.losses import td_target
from rlamort.nets import Ensemble, NormedMlp
from rlamort.norm import EnsembleBatchNorm, EnsembleBatchRenorm
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.source import Replay
from rlamort.source.scale import SCALES

ATOMS = torch.linspace(-5, 5, 101)
NARROW = {"hidden": (16, 16), "critic.hidden": (16, 16, 16)}
TD3 = {
    "model.norm": "batch", "critic.norm": "batch", "critic.head": "categorical", "weights": "unit", "hidden": (16, 16),
    "adam_beta1": 0.5,
}  # fmt: skip


def states(agent):
    return agent.state_dict().items()


def before_heads(agent, batch, half, pessimism):
    """The critics' step as it was before there were heads and targets as objects."""
    with torch.no_grad():
        if half == 0.5:
            y, logq = agent.density.sample(agent.model(batch.x_next, agent.f.oracle(batch.x_next)))
            cost = agent.alpha() * logq
        else:
            y = agent.target_model(batch.x_next, None)
            noise = agent.smoothing_noise * torch.randn_like(y)
            y, cost = (y + noise.clamp(-0.5, 0.5)).clamp(-1, 1), torch.zeros(len(y))
        q = agent.target_critic.ensemble(torch.cat([batch.x_next, y], -1)).squeeze(-1)
        target = td_target(batch, -(pessimism * q.std(0, correction=0) - q.mean(0) + cost))
    q = agent.critic.ensemble(torch.cat([batch.x, batch.y], -1)).squeeze(-1)
    loss = half * (q - target).square().mean(-1).sum()
    descend(loss, agent.critic.parameters(), agent.critic_adam)
    return loss


def average(target, source, tau=0.005):
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_all_off_is_the_plain_method_bit_for_bit(name, norm, spec):
    torch.manual_seed(0)
    agent = drawn(name, spec, hidden=(16, 16), **{"critic.norm": norm})
    plain = copy.deepcopy(agent)
    for step in range(8):
        batch, improve = batch_for(agent, seed=step), step % agent.improve_every == 1 % agent.improve_every
        torch.manual_seed(step)
        loss = agent.update(batch, improve)["critic/loss"]
        torch.manual_seed(step)
        if name == "sac":
            assert torch.equal(loss, before_heads(plain, batch, 0.5, 1.0))
            average(plain.target_critic, plain.critic)
        else:
            assert torch.equal(loss, before_heads(plain, batch, 1.0, 1.0))
        if improve:
            found, metrics = plain.loss(plain.model, plain.f, batch)
            descend(found, plain.model.parameters(), plain.model_adam)
        if improve and name == "sac":
            descend(plain.alpha.log * (metrics["entropy"] + 2), plain.alpha.parameters(), plain.alpha_adam)
        elif improve:
            average(plain.target_critic, plain.critic)
            average(plain.target_model, plain.model)
    for (key, ours), theirs in zip(states(agent), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


def test_batch_norm_is_torchs_and_its_statistics_a_plain_average(device):
    """Member by member, training and not, with gradients; biased variances enter the average, as in CrossQ."""
    torch.manual_seed(0)
    norm = EnsembleBatchNorm(3, 5).to(device)
    with torch.no_grad():
        norm.gain.normal_()
        norm.bias.normal_()
    mean, variance = torch.zeros(3, 1, 5, device=device), torch.ones(3, 1, 5, device=device)
    for _ in range(4):
        h = (3 * torch.randn(3, 12, 5, device=device) + 2).requires_grad_()
        ours = norm(h, 3, training=True)
        torchs = torch.nn.functional.batch_norm
        theirs = [torchs(h[i], None, None, norm.gain[i, 0], norm.bias[i, 0], True, 0.01, 1e-3) for i in range(3)]
        theirs = torch.stack(theirs)
        torch.testing.assert_close(ours, theirs)
        weights = torch.randn_like(ours)
        torch.testing.assert_close(*(torch.autograd.grad((one * weights).sum(), h)[0] for one in (ours, theirs)))
        mean = 0.99 * mean + 0.01 * h.detach().mean(1, keepdim=True)
        variance = 0.99 * variance + 0.01 * h.detach().var(1, correction=0, keepdim=True)
    torch.testing.assert_close(norm.mean, mean)
    torch.testing.assert_close(norm.variance, variance)
    expected = (h - mean) / (variance + 1e-3).sqrt() * norm.gain + norm.bias
    torch.testing.assert_close(norm(h, 3), expected)
    torch.testing.assert_close(norm(h[:2], 2), expected[:2])


def test_renorm_corrects_towards_the_running_statistics_after_its_warm_up(device):
    torch.manual_seed(0)
    plain, norm = EnsembleBatchNorm(2, 4).to(device), EnsembleBatchRenorm(2, 4).to(device)
    h = 4 * torch.randn(2, 9, 4, device=device) + 30
    torch.testing.assert_close(norm(h, 2, training=True), plain(h, 2, training=True))
    assert norm.passes == 1
    norm.passes.fill_(norm.warm_up)
    norm.mean.normal_(29, 1)
    norm.variance.fill_(9.0)
    running, std = math.sqrt(9 + 1e-3), (h.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    ratio = (std / running).clamp(1 / 3, 3)
    shift = ((h.mean(1, keepdim=True) - norm.mean) / running).clamp(-5, 5)
    expected = (h - h.mean(1, keepdim=True)) / std * ratio + shift
    torch.testing.assert_close(norm(h, 2, training=True), expected)
    assert (expected - (h - h.mean(1, keepdim=True)) / std).abs().max() > 0.1


def test_the_joint_pass_is_both_halves_of_one_batch(device):
    """The order of the halves does not matter, and each half alone has other statistics."""
    torch.manual_seed(0)
    critic = Critic(3, 2, (16, 16), 2, EnsembleBatchNorm).to(device)
    x, y, x_next, y_next = (torch.randn(32, n, device=device) for n in (3, 2, 3, 2))
    x_next += 2
    now, after = critic.both(x, y, x_next, y_next)
    after_too, now_too = critic.both(x_next, y_next, x, y)
    torch.testing.assert_close(now, now_too, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, after_too, rtol=1e-4, atol=1e-5)
    h = torch.cat([torch.cat([x, x_next]), torch.cat([y, y_next])], -1).expand(2, -1, -1)
    net = critic.ensemble
    for layer, norm in zip(net.layers, [net.input_norm, *net.norms], strict=True):
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
        h = h if norm is net.input_norm else h.relu()
        h = h @ layer.weight + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(torch.cat([now, after], 1), h, rtol=1e-4, atol=1e-5)
    assert (critic.outputs(x, y, training=True) - now).abs().max() > 0.01
    assert torch.equal(critic(x, y), critic(x, y))
    torch.testing.assert_close(critic(x[:4], y[:4]), critic(x, y)[:, :4])  # not training: rows do not depend on each other


@pytest.mark.parametrize("target", [{}, {"critic.target.statistics": "running"}, {"critic.target": "none"}])
def test_statistics_move_once_in_an_update_and_with_training_passes_alone(target, spec):
    """The critics' in `evaluate`, over both halves; the policy's in `improve`; acting and scoring change none."""
    torch.manual_seed(0)
    agent = drawn("sac_narrow", spec, **NARROW, **target)
    batch = batch_for(agent)
    seen = torch.cat([batch.x, batch.x_next]).mean(0)
    agent.update(batch, False)
    torch.testing.assert_close(agent.critic.ensemble.input_norm.mean[0, 0, :3], 0.01 * seen)
    policy = agent.model.net.ensemble.input_norm
    assert not policy.mean.any()
    agent.improve(batch)
    torch.testing.assert_close(agent.critic.ensemble.input_norm.mean[0, 0, :3], 0.01 * seen)
    torch.testing.assert_close(policy.mean[0, 0], 0.01 * batch.x.mean(0))
    before = copy.deepcopy(agent.state_dict())
    with torch.no_grad():
        agent.act(batch.x, True)
    agent.predict(batch.x.numpy())
    assert_equal(before, dict(states(agent)))


def test_a_target_with_running_statistics_has_the_critics(spec):
    torch.manual_seed(0)
    agent = drawn("sac_narrow", spec, **NARROW, **{"critic.target.statistics": "running"})
    agent.update(batch_for(agent), True)
    for ours, theirs in zip(agent.target_critic.ensemble.buffers(), agent.critic.ensemble.buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.any()


def test_without_a_target_network_targets_are_the_critics_own(spec):
    torch.manual_seed(0)
    agent = drawn("sac", spec, hidden=(16,), **{"critic.target": "none"})
    assert not any(name.startswith("target_critic") for name, _ in states(agent))
    batch = batch_for(agent)
    torch.manual_seed(1)
    y, logq = agent.density.sample(agent.model(batch.x_next))
    target = td_target(batch, agent.critic(batch.x_next, y).amin(0) - agent.alpha() * logq).detach()
    expected = 0.5 * (agent.critic(batch.x, batch.y) - target).square().mean(-1).sum()
    torch.manual_seed(1)
    assert agent.evaluate(batch)["critic/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def placed(values, weights, atoms):
    """The shares of atoms by a loop: each value's weight goes to its two neighbours."""
    found, spacing = np.zeros(len(atoms)), atoms[1] - atoms[0]
    for value, weight in zip(values, weights, strict=True):
        place = (min(max(value, atoms[0]), atoms[-1]) - atoms[0]) / spacing
        low = min(int(place), len(atoms) - 2)
        found[low] += weight * (1 - (place - low))
        found[low + 1] += weight * (place - low)
    return found


@pytest.mark.parametrize("projection", [Moved(), TwoHot()])
def test_categorical_targets_are_a_loops_and_keep_mass_and_mean(projection):
    torch.manual_seed(0)
    head = Categorical(21, -5.0, 5.0, projection).double()
    after = torch.randn(2, 40, 21, dtype=torch.float64)
    reward, going = torch.randn(40, dtype=torch.float64), torch.rand(40) < 0.8
    reward[0] = 30.0  # leaves the span, as a terminal state's
    going[0], going[1] = False, True

    def backup(v):
        return reward[:, None] + 0.99 * torch.where(going[:, None], v - 0.1, 0)

    target = head.target(after, backup, 1.0).numpy()
    assert target.sum(-1) == pytest.approx(np.ones(40), abs=1e-12)
    p = after.softmax(-1)
    atoms = head.atoms.numpy()
    least = (p @ head.atoms).argmin(0)
    means = np.zeros(40)
    for i in range(40):
        weights = p[least[i], i].numpy()
        if isinstance(projection, TwoHot):
            weights, at = np.ones(1), backup((p @ head.atoms).amin(0)[:, None])[i].numpy()
        else:
            at = backup(head.atoms.expand(40, -1))[i].numpy()
        assert target[i] == pytest.approx(placed(at, weights, atoms), abs=1e-12)
        means[i] = (weights * at.clip(-5, 5)).sum()
    assert target @ atoms == pytest.approx(means, abs=1e-12)
    assert head.metrics() == {"critic/outside": 1, "critic/targets": 40}


def test_a_categorical_loss_is_least_where_the_distribution_is_the_target():
    torch.manual_seed(0)
    head = Categorical(11, -1.0, 1.0, Moved())
    target = torch.rand(6, 11).softmax(-1)
    at = target.log().expand(2, -1, -1).clone().requires_grad_()
    (slope,) = torch.autograd.grad(head.loss(at, target), at)
    assert slope.abs().max() < 1e-6
    assert head.loss(at + torch.randn_like(at), target) > head.loss(at, target)


def test_targets_outside_of_the_atoms_are_counted_and_said_once():
    fields = {**SMALL, "critic": {"head": "categorical", "norm": "layer"}, "log_every": 20}
    agent = ra.SAC("Pendulum-v1", **fields)  # rewards of down to -16 a step
    with pytest.warns(UserWarning, match=r"critic.head: .* targets so far are outside .* -5 to 5") as warned:
        agent.learn(200)
    assert len(warned) == 1
    assert agent.latest["critic/targets"] == 16 * agent.clock.updates
    assert 0 < agent.latest["critic/outside"] <= agent.latest["critic/targets"]


@pytest.mark.parametrize(("name", "fields"), [("sac_narrow", NARROW), ("sac_lean", NARROW), ("td3", TD3)])
def test_every_units_weights_have_length_one_in_policy_critics_and_targets(name, fields, spec):
    torch.manual_seed(0)
    agent = drawn(name, spec, **fields)
    networks = [agent.model, agent.critic]
    networks += [] if name == "sac_lean" else [agent.target_critic]
    networks += [agent.target_model] if name == "td3" else []
    for step in range(5):
        for network in networks:
            weights = [p for key, p in network.named_parameters() if key.endswith("weight")]
            assert len(weights) >= 3
            for weight in weights:  # (members, inputs, outputs)
                torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(len(weight), weight.shape[2]))
        agent.update(batch_for(agent, seed=step), True)
    assert any((p != 1).any() for key, p in agent.critic.named_parameters() if key.endswith("gain"))


class Drifting(Count):
    """As `Count`, with rewards of both signs."""

    def step(self, action):
        x, reward, *rest = super().step(action)
        return x, math.sin(reward), *rest


@pytest.mark.parametrize("kind", ["return", "bounded"])
def test_rewards_are_divided_by_the_deviation_of_a_plainly_recursive_return(kind, device):
    """Over terminations, truncations and both, in several environments with episodes of other lengths; stored as they are."""
    made = iter(range(9))
    env = ra.env.make.open_env(lambda: Drifting((3, 1, 4, 7), next(made)), count=3, device=device)
    env.reset(0)
    replay = Replay(env, buffer_size=300, discount=0.9, n_step=2, reward_scale=kind)
    returns, running, over = [], np.zeros(3), np.ones(3, bool)
    for _ in range(60):
        before = replay.written.copy()
        over_next = replay.collect(lambda: env.domain.uniform(3, device)).over
        rewards = [replay.reward[row * replay.slots + before[row]].item() for row in range(3)]
        running = 0.9 * (1 - over) * running + rewards
        returns += list(running)
        over = over_next
    expected = np.std(returns)
    expected = max(expected, np.abs(returns).max() / 5) if kind == "bounded" else expected
    assert replay.scale.divisor.item() == pytest.approx(expected, rel=1e-6)
    torch.manual_seed(0)
    scaled = replay.sample(50)
    torch.manual_seed(0)
    whole, sequences = replay.everything(), replay.sequences(20, 2)  # what models are fitted to is in the same units
    replay.scale = SCALES["none"](env, 0.9)
    torch.manual_seed(0)
    raw = replay.sample(50)
    torch.testing.assert_close(scaled.reward * expected, raw.reward)
    torch.testing.assert_close(whole.reward * expected, replay.everything().reward)
    torch.manual_seed(0)
    torch.testing.assert_close(sequences.reward * expected, replay.sequences(20, 2).reward)


def test_returns_that_never_vary_are_not_scaled(device):
    env = ra.env.make.open_env("Pendulum-v1", count=2, device=device)
    env.reset(0)
    scale = Replay(env, buffer_size=300, reward_scale="return").scale
    for _ in range(3):
        scale.update(torch.full((2,), 7.0, device=env.place), np.array([True, False]), np.array([True, True]))
    assert scale(torch.tensor([14.0], device=device)).item() == 14


CASES = {
    "sac_narrow": (
        "sac_narrow",
        "Hopper-v5",
        {"critic": {"hidden": [16, 16]}, "num_envs": 2, "warmup_steps": 60, "exploration": "held"},
    ),
    "td3": ("td3", "Hopper-v5", {**TD3, "hidden": [16, 16], "critic.norm": "renorm", "reward_scale": "bounded"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:critic.head. .* targets so far are outside")
def test_stopped_and_resumed_is_uninterrupted(case, tmp_path):
    method, env, more = CASES[case]
    fields = {**SMALL, **more}
    whole = learner_class(method)(env, dir=str(tmp_path / "whole"), **fields).learn(170)
    broken = learner_class(method)(env, dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(170, stop=lambda: broken.clock.env_step >= 113)
    broken.close()
    torch.rand(3)
    again, _ = resume(tmp_path / "broken")
    again.learn(170 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert_equal(whole.source.scale.state(), again.source.scale.state())
    assert whole.source.scale.divisor > 0
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


def normalised():
    return NormalizeObservation(Count())


def scaled():
    return NormalizeReward(Count())


@pytest.mark.parametrize(
    ("fields", "both"),
    [
        ({"critic.target.statistics": "running"}, "critic.target.statistics=running and critic.norm=none"),
        ({"critic.head": "categorical", "pessimism": 0.5}, "critic.head.projection=moved and pessimism=0.5"),
        ({"critic.head": "quantiles"}, "critic.head=quantiles and pessimism=1.0"),
        ({"target_entropy": -1.0, "target_entropy_per_dim": -0.5}, "target_entropy=-1.0 and target_entropy_per_dim=-0.5"),
        ({"critic.head": "categorical", "critic.head.low": 5.0}, "low below high"),
        ({"critic.head": "quantiles", "pessimism": 0, "critic.head.dropped": 25}, "critic.head.dropped=25"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0"),
    ],
)
def test_ingredients_that_exclude_each_other_are_refused(fields, both, spec):
    with pytest.raises(UserError, match=both):
        drawn("sac", spec, **fields)


@pytest.mark.parametrize(
    ("env", "fields", "both"),
    [
        (normalised, {"normalise": True}, "normalise=True and a wrapper NormalizeObservation"),
        (scaled, {"reward_scale": "return"}, "reward_scale=return and a wrapper NormalizeReward"),
    ],
)
def test_normalising_by_wrapper_and_by_key_is_refused(env, fields, both):
    with pytest.raises(UserError, match=both):
        ra.SAC(env, **SMALL, **fields)
    ra.SAC(env, **SMALL)


def test_a_norm_for_a_problems_own_network_is_refused():
    with pytest.raises(UserError, match=r"model.norm=batch: .* has a network of its own"):
        ra.VAE("rlamort/VAE-v0", model={"kind": "full", "norm": "batch"})


def test_a_normed_policy_is_blind_to_scale_and_shift_of_its_input_in_training(device):
    torch.manual_seed(0)
    net = NormedMlp(4, (16,), 3, EnsembleBatchNorm).to(device)
    x = torch.randn(64, 4, device=device)
    torch.testing.assert_close(net(x), net(100 * x + 7), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert (net(x) - net(100 * x + 7)).abs().max() > 1


def test_a_bias_that_batch_norm_would_cancel_is_not_there(device):
    """Its gradient is rounding, of which Adam would make steps of full size."""
    net = Ensemble(2, 4, (8, 8), 3, EnsembleBatchNorm)
    assert [layer.bias is None for layer in net.layers] == [True, True, False]
    assert net.input_norm.bias is None
    loss = net(torch.randn(32, 4), training=True).square().sum()
    assert all(g.abs().max() > 1e-5 for g in torch.autograd.grad(loss, list(net.parameters())))


def test_held_noise_is_a_draw_for_as_many_steps_as_its_law_says(device):
    """And a new episode has a new draw, which leaves those of other environments."""
    torch.manual_seed(0)
    noise = HeldNoise(4).to(device)
    h, seen = noise.start(500, 2, device), []
    for _ in range(400):
        now, h = noise(torch.randn(500, 2, device=device), h)
        seen.append(now)
    changes = (torch.stack(seen).diff(dim=0) != 0).any(-1)  # (399, 500)
    lengths = torch.cat([ends.nonzero()[:, 0].diff() for ends in changes.T.cpu()])
    weights = torch.tensor([1.0, 1 / 4, 1 / 9, 1 / 16])
    expected = weights / weights.sum()
    assert lengths.max() == 4
    torch.testing.assert_close(lengths.bincount(minlength=5)[1:] / len(lengths), expected, atol=0.01, rtol=0)
    begun = tuple(torch.where((torch.arange(500, device=device) == 7).view(-1, *[1] * (part.ndim - 1)), 0, part) for part in h)
    fresh = torch.randn(500, 2, device=device)
    after, _ = noise(fresh, begun)
    assert torch.equal(after[7], fresh[7])
    held = h[1] > 0
    held[7] = False
    assert torch.equal(after[held], seen[-1][held])


CROSSED = {
    "critic.norm": "batch", "model.norm": "batch", "critic.target": "none", "learning_rate": 1e-3, "adam_beta1": 0.5,
    "actor_delay": 3,
}  # fmt: skip
ENTROPY = {**CROSSED, "temperature": 0.01, "target_entropy_per_dim": -0.5}
DISTRIBUTED = {**ENTROPY, "critic.head": "categorical"}
UNIT = {**DISTRIBUTED, "weights": "unit", "learning_rate": 3e-4}
ARMS = {
    "layer": {"critic.norm": "layer"},
    "crossed": CROSSED,
    "entropy": ENTROPY,
    "moved": DISTRIBUTED,
    "two hot": {**DISTRIBUTED, "critic.head.projection": "two_hot"},
    "unit": UNIT,
    "joint": {**UNIT, "critic.target": "polyak"},
    "running": {**UNIT, "critic.target": "polyak", "critic.target.statistics": "running"},
    "deeper": {**UNIT, "critic.hidden": (64, 64, 64)},
    "decayed": {**UNIT, "learning_rate_horizon": 100},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_combination_of_the_ablation_learns(arm, spec):
    """Each adds to the one before: they are keys of one method, and a fixed target is fitted with any of them."""
    torch.manual_seed(0)
    agent = drawn("sac", spec, **{"hidden": (64, 64), **ARMS[arm], "learning_rate": 1e-2})
    batch = batch_for(agent)._replace(terminated=torch.ones(32, dtype=torch.bool))
    for _ in range(60):
        agent.evaluate(batch)
    now, _ = agent.target_critic.both(batch.x, batch.y, batch.x_next, batch.y)  # by the batch: running statistics lag behind
    assert (agent.critic.head.q(now) - batch.reward).square().mean() < 0.2 * batch.reward.var()
    agent.improve(batch)
    assert agent.unsound() == ""


def test_the_delayed_policy_learns_seldom(spec):
    assert drawn("sac_narrow", spec, **NARROW).improve_every == 2
    assert drawn("sac_lean", spec, **NARROW).improve_every == 3
    assert drawn("sac_narrow", spec, **NARROW).target_entropy == -1.0


def test_traced_updates_are_the_eager_ones(ring):  # noqa: F811
    """As below without code generation, which takes a minute."""
    eager, captured = pair("sac_narrow", ring, **{"hidden": (16,), "critic.hidden": (16,)})
    twin = captured.agent
    traced = torch.compile(lambda: twin.update_from(captured.sample, True), fullgraph=True, dynamic=False, backend="aot_eager")
    for step in range(5):
        torch.manual_seed(step)
        expected = eager([True], None).metrics
        torch.manual_seed(step)
        found = traced()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=5e-3, atol=1e-3, msg=f"{key} at update {step}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sac_narrow", NARROW),
        ("sac_lean", NARROW),
        ("td3", TD3),
        ("sac", {"critic.norm": "renorm", "critic.target.statistics": "running"}),
        ("tqc", {}),
    ],
)
def test_captured_updates_are_the_eager_ones(name, fields, ring):  # noqa: F811
    eager, captured = pair(name, ring, **fields)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(30):
        ring.collect(lambda: ring.env.domain.uniform(2))
        torch.manual_seed(step)
        expected, y, _ = eager([True], ring.env.x)
        torch.manual_seed(step)
        got, y_captured, _ = captured([True], ring.env.x)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=5e-3, atol=1e-3, msg=f"{key} at update {step}")
        torch.testing.assert_close(y_captured, y, rtol=2e-2, atol=5e-3)
    assert len(captured.proved) == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
