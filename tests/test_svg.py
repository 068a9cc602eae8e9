"""Stochastic value gradients: expansions of the value through a model, and the rows that train policies by them."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from drawn import drawn
from rlamort.agents.sac import SAC
from rlamort.agents.svg import Played, worthless
from test_laws import batch_for
from test_plan import Own
from test_resume import assert_equal, everything, timeless

import rlamort as ra
from rlamort.agent import Adam
from rlamort.critic import Critic
from rlamort.domain import Box, SquashedGaussian
from rlamort.dynamics import LAST, Dynamics, Ending, Ensemble, Known, Moved, Retraced, ValueExpansion
from rlamort.env.known import equations_of
from rlamort.env.make import open_env
from rlamort.errors import Preempted, UserError
from rlamort.fits.dynamics import fit_steps
from rlamort.losses import td_target
from rlamort.measure.sooner import Sooner
from rlamort.model import Full
from rlamort.nets import mlp
from rlamort.objective import MaxQ, Objective, Soft, Temperature
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.run.rounds import Compiled
from rlamort.source import Batch, Replay

GAMMA, ALPHA = 0.9, 0.3


def soft(critic, alpha=ALPHA):
    return Soft(MaxQ(critic), SquashedGaussian(1), Temperature(alpha).to(next(critic.parameters()).dtype))


def policy_of(dtype, d=3):
    density = SquashedGaussian(1)
    return Full(mlp(d, (8,), density.parameters.inputs), density.parameters).to(dtype)


@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_the_expansion_is_rolling_the_environment_out(horizon):
    """Rewards and states are Gymnasium's own, of the actions that the expansion draws."""
    torch.manual_seed(0)
    env = gymnasium.make("Pendulum-v1")
    known = Known(equations_of(env), Box([-2.0], [2.0]), "pendulum")
    critic, policy = Critic(3, 1, (8,), 2), policy_of(torch.float32)
    f = ValueExpansion(soft(critic), known, policy, horizon, GAMMA)
    x = torch.tensor(env.reset(seed=3)[0])[None]
    torch.manual_seed(5)
    found = f(policy(x), x).item()
    torch.manual_seed(5)
    value, density = 0.0, f.soft.density
    for t in range(horizon + 1):
        y, logq = density.sample(policy(x))
        if t < horizon:
            following, reward, *_ = env.step(2 * y[0].detach().numpy())
            value += GAMMA**t * (reward - ALPHA * logq.item())
            x = torch.tensor(following)[None]
    value += GAMMA**horizon * (critic(x, y).amin().item() - ALPHA * logq.item())
    assert found == pytest.approx(-value, rel=1e-4)


def test_its_gradient_is_a_finite_difference():
    """In the first action's parameters and in the policy's, by one draw of the noise, in float64."""
    torch.manual_seed(0)
    known = Known(equations_of(gymnasium.make("Pendulum-v1")), Box([-2.0], [2.0]), "pendulum")
    critic, policy = Critic(3, 1, (8,), 2).double(), policy_of(torch.float64)
    f = ValueExpansion(soft(critic), known, policy, 4, GAMMA)
    angle = 2 * torch.rand(6, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin(), 0.3 * angle], -1)
    bias = policy.net[-1].bias

    def cost(lam):
        torch.manual_seed(1)
        return f(lam, x).sum()

    lam = policy(x).detach().requires_grad_()
    slopes = torch.autograd.grad(cost(lam), [lam, bias])
    for k in range(2):
        step = torch.zeros_like(lam)
        step[:, k] = 1e-6
        for i in range(len(x)):
            one = step * (torch.arange(len(x)) == i)[:, None]
            slope = ((cost(lam + one) - cost(lam - one)) / 2e-6).item()
            assert slopes[0][i, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
        with torch.no_grad():
            ahead, behind = (_moved(bias, k, side * 1e-6, lambda: cost(lam)) for side in (1, -1))
        assert slopes[1][k].item() == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-5, abs=1e-7)


def _moved(bias, k, by, value):
    bias[k] += by
    found = value()
    bias[k] -= by
    return found


class Half(Dynamics):
    """Each step pays 1 and goes on with probability 1/2, 1/3, 1/4, ..., as x counts."""

    def forward(self, x, y):
        return Moved(x + 1, torch.ones(len(x)), 1 / (x[:, 0] + 2))


class Zero(Objective):
    def report(self, y, x):
        return torch.zeros(len(y)), {}


@pytest.mark.parametrize("horizon", [0, 1, 2, 5])
def test_what_follows_is_weighed_by_the_product_of_all_probabilities_to_go_on(horizon):
    """1 + 1/2 + 1/2 1/3 + 1/2 1/3 1/4 + ..., without discount: sums of 1 / t!."""
    f = ValueExpansion(
        Soft(Zero(), SquashedGaussian(1), Temperature(0.0)), Half(), lambda x, oracle: torch.zeros(len(x), 2), horizon, 1.0
    )
    factorials = torch.arange(1, horizon + 1).double().cumprod(0)
    assert f(torch.zeros(1, 2), torch.zeros(1, 1)).item() == pytest.approx(-(1 / factorials).sum().item())


class Ended(Dynamics):
    """x counts down, the task ends at 0, and all that follows is NaN. Each step pays y."""

    def forward(self, x, y):
        x_next = torch.where(x > 0, x - 1, torch.nan)
        return Moved(x_next, torch.where(x[:, 0] > 0, y.sum(-1), torch.nan), (x_next[:, 0] != 0).to(x))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_terminated_branch_contributes_nothing_after_its_end(alpha):
    """Neither rewards, nor entropy, nor the critic, nor gradients: the expansion is as long as the episode."""
    torch.manual_seed(0)
    critic, policy = Critic(1, 1, (8,), 2), policy_of(torch.float32, d=1)
    base = soft(critic, alpha)

    def of(horizon, count):
        x = torch.full((5, 1), count)
        torch.manual_seed(2)
        cost = ValueExpansion(base, Ended(), policy, horizon, GAMMA)(policy(x), x).sum()
        return cost, torch.autograd.grad(cost, list(policy.parameters()))

    for count in (1.0, 2.0):
        (short, slopes), (long, others) = of(int(count), count), of(6, count)
        assert short.item() == long.item()
        assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(slopes, others, strict=True))
        torch.manual_seed(2)
        y, logq = base.density.sample(policy(torch.full((5, 1), count)))
        if count == 1:
            assert long.item() == pytest.approx((alpha * logq - y[:, 0]).sum().item(), rel=1e-5)


class Runaway(Dynamics):
    """Items that begin above 1 grow beyond all numbers."""

    def forward(self, x, y):
        x_next = torch.where(x > 1, (40 * x).exp(), x)
        return Moved(x_next, x_next.sum(-1), torch.ones(len(x)))


def test_where_a_model_diverges_a_row_is_last_counted_and_without_gradient():
    torch.manual_seed(0)
    critic, policy = Critic(1, 1, (8,), 2), policy_of(torch.float32, d=1)
    f = ValueExpansion(soft(critic), Runaway(), policy, 3, GAMMA)
    x = torch.tensor([[0.5], [2.0], [0.1], [3.0]])
    lam = policy(x).detach().requires_grad_()
    cost, metrics = f.report(lam, x)
    assert metrics["diverged"].item() == 0.5
    assert cost[1] == cost[3] == LAST
    assert (cost[[0, 2]] < 100).all()
    (slope,) = torch.autograd.grad(cost.mean(), lam)
    assert (slope[[1, 3]] == 0).all()
    assert (slope[[0, 2]] != 0).any()
    assert all(part.isfinite().all() for part in torch.autograd.grad(f(policy(x), x).mean(), list(policy.parameters())))


def test_without_steps_it_is_sac_update_for_update(spec):
    """The same draws, losses, temperatures and weights; the model beside them is never asked."""
    agents = []
    for name, more in (("sac", {}), ("svg_h", {"expansion.horizon": 0})):
        torch.manual_seed(0)
        agents.append(drawn(name, spec, hidden=(16,), **more))
    sac, svg = agents
    for step in range(6):
        torch.manual_seed(step)
        expected = sac.update(batch_for(sac, seed=step), True)
        torch.manual_seed(step)
        found = svg.update(batch_for(svg, seed=step), True)
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    state = svg.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in sac.state_dict().items())


def test_svg0_is_sac_with_alpha_0_and_no_entropy(spec):
    """Its losses are written out: a one-step target, and -min Q of a reparameterised action; and alpha stays 0."""
    torch.manual_seed(0)
    agent = drawn("svg0", spec, hidden=(16,))
    for step in range(20):
        batch = batch_for(agent, seed=step)
        torch.manual_seed(step)
        with torch.no_grad():
            y_next = agent.density.draw(agent.model(batch.x_next))
            target = td_target(batch, agent.target_critic(batch.x_next, y_next).amin(0))
            q = agent.critic(batch.x, batch.y)
        torch.manual_seed(step)
        metrics = agent.update(batch, False)
        assert metrics["critic/loss"].item() == pytest.approx(0.5 * (q - target).square().mean(-1).sum().item(), rel=1e-5)
        torch.manual_seed(step)
        loss = -agent.critic(batch.x, agent.density.draw(agent.model(batch.x))).amin(0).mean()
        torch.manual_seed(step)
        metrics = agent.improve(batch)
        assert metrics["actor/cost"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["temperature"] == 0
    assert not agent.unsound()


def test_a_temperature_of_0_is_not_moved_by_a_million_steps():
    alpha = Temperature(0.0)
    with torch.no_grad():
        alpha.log += 1e6 * 3e-4
    assert alpha() == 0


def test_ends_are_learned_as_probabilities():
    """Of states beyond 1 a quarter end: the model says so, there and not elsewhere, and keeps apart from what goes on."""
    torch.manual_seed(0)
    x, y = 4 * torch.rand(2000, 1) - 2, torch.rand(2000, 1)
    ended = (x[:, 0] > 1) & (torch.rand(2000) < 0.25)
    ensemble = Ensemble(1, 1, (32,), 3, ends=Ending)
    batch = Batch(x, y, y[:, 0], torch.ones(2000), ended, x + 0.1 * y)
    fit_steps(ensemble, Adam(ensemble.parameters(), 3e-3), batch, 300, 128)
    at = torch.tensor([[-1.0], [1.5]])
    moved = ensemble(at, torch.full((2, 1), 0.5))
    assert moved.continues.tolist() == pytest.approx([1, 0.75], abs=0.1)
    assert moved.x_next.flatten().tolist() == pytest.approx([-0.95, 1.55], abs=0.05)
    assert moved.reward.tolist() == pytest.approx([0.5, 0.5], abs=0.1)


SMALL = {
    "hidden": [8], "batch_size": 8, "warmup_steps": 40, "buffer_size": 2_000, "device": "cpu", "eval_every": 100,
    "eval_episodes": 1, "log_every": 50, "checkpoint_every": 60,
}  # fmt: skip
EXPANDED = {"expansion": {"horizon": 2, "fit_every": 40, "fit_steps": 5, "fit_batch_size": 16, "dynamics": {"members": 2}}}
FITTED = {"fit_every": 40, "fit_steps": 5, "fit_batch_size": 16, "dynamics": {"members": 2}}
ROWS = {
    "svg_h": {**SMALL, **EXPANDED},
    "svg1": {**SMALL, **FITTED},
    "svg_inf": {**SMALL, **FITTED, "horizon": 10, "policy_steps": 2, "sequences": 4},
}


@pytest.mark.parametrize("name", ROWS)
def test_stopped_and_resumed_is_uninterrupted(name, tmp_path):
    kind = getattr(ra, name.upper())
    whole = kind("Pendulum-v1", dir=str(tmp_path / "whole"), **ROWS[name]).learn(160)
    broken = kind("Pendulum-v1", dir=str(tmp_path / "broken"), **ROWS[name])
    with pytest.raises(Preempted):
        broken.learn(160, stop=lambda: broken.clock.env_step >= 90)
    broken.close()
    torch.rand(3)
    again, exactness = resume(tmp_path / "broken")
    assert exactness == "exact"
    again.learn(160 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


def met(sequences, horizon, dynamics, policy, seed=0):
    """Sequences of transitions of a policy in dynamics, the density of its actions, and their noise."""
    density = SquashedGaussian(1)
    torch.manual_seed(seed)
    angle = 6 * torch.rand(sequences, dtype=torch.float64)
    x, steps = torch.stack([angle.cos(), angle.sin(), angle / 3], -1), []
    with torch.no_grad():
        for _ in range(horizon):
            noise = density.noise(policy(x))
            y = density.draw(policy(x), noise)
            x_next, reward, _ = dynamics(x, y)
            steps.append((x, y, reward, torch.zeros(sequences, dtype=torch.bool), x_next, noise))
            x = x_next
    x, y, reward, ended, x_next, noise = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    return Batch(x, y, reward, torch.full_like(reward, GAMMA), ended, x_next), noise


def test_along_played_actions_the_value_is_what_happened_whatever_the_model():
    torch.manual_seed(3)
    known = Known(equations_of(gymnasium.make("Pendulum-v1")), Box([-2.0], [2.0]), "pendulum")
    wrong, policy = Ensemble(3, 1, (8,), 2).double(), policy_of(torch.float64)
    batch, _ = met(5, 6, known, policy)
    f = Retraced(3, SquashedGaussian(1), wrong, policy, Played(SquashedGaussian(1), policy), GAMMA, worthless)
    x = f.posed(batch)
    torch.testing.assert_close(-f(policy(f.seen(x)), x), (GAMMA ** torch.arange(6) * batch.reward).sum(1))
    ended = batch._replace(terminated=torch.arange(6).expand(5, -1) == 3)  # what is listed after an end does not count
    torch.testing.assert_close(
        -f(policy(batch.x[:, 0]), f.posed(ended)), (GAMMA ** torch.arange(4) * batch.reward[:, :4]).sum(1)
    )


@pytest.mark.parametrize("steps", [0.0, 0.5], ids=["as it played", "later"])
def test_its_gradient_by_the_true_model_is_that_of_playing_again_with_the_same_noise(steps):
    """Also after the policy has moved on: the noise is what it was for the policy that played."""
    torch.manual_seed(3)
    known = Known(equations_of(gymnasium.make("Pendulum-v1")), Box([-2.0], [2.0]), "pendulum")
    policy, density = policy_of(torch.float64), SquashedGaussian(1)
    batch, noise = met(5, 6, known, policy)
    f, bias = Retraced(3, density, known, policy, Played(density, copy.deepcopy(policy)), GAMMA, worthless), policy.net[-1].bias
    with torch.no_grad():
        bias += steps
    value = f(policy(batch.x[:, 0]), f.posed(batch)).sum()
    (slope,) = torch.autograd.grad(value, bias)

    def played_again():
        x, value = batch.x[:, 0], 0
        for t in range(6):
            x, reward, _ = known(x, density.draw(policy(x), noise[:, t]))
            value = value + GAMMA**t * reward.sum()
        return -value

    with torch.no_grad():
        assert value.item() == pytest.approx(played_again().item(), rel=1e-9)
        for k in range(2):
            ahead, behind = (_moved(bias, k, side * 1e-6, played_again) for side in (1, -1))
            assert slope[k].item() == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-5)


def test_svg1_regresses_v_on_the_next_state_of_a_fresh_action(spec):
    """y = r + gamma (1 - terminated) V'(x'), both by the model and with the noise of the transition that was met."""
    torch.manual_seed(0)
    agent = drawn("svg1", spec, hidden=(16,))
    batch = batch_for(agent)
    torch.manual_seed(4)
    with torch.no_grad():
        y = agent.density.draw(agent.model(batch.x))
        ours, theirs = agent.dynamics(batch.x, y), agent.dynamics(batch.x, batch.y)
        following = ours.x_next + batch.x_next - theirs.x_next
        v_next = torch.where(batch.terminated, 0, agent.target_critic(following, y[:, :0])[0])
        target = ours.reward + batch.reward - theirs.reward + 0.99 * v_next
        expected = 0.5 * (agent.critic(batch.x, y[:, :0])[0] - target).square().mean()
    torch.manual_seed(4)
    assert agent.evaluate(batch)["critic/loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_svg_inf_learns_to_push_a_point_to_the_middle():
    """One state and a return known in closed form: whole sequences through a learned model, without a critic."""
    agent = ra.SVG_INF(
        Own, hidden=[16], dynamics={"members": 2, "hidden": [16]}, horizon=10, fit_every=50, fit_steps=50, policy_steps=10,
        seed=0, learning_rate=1e-2, warmup_steps=50, device="cpu", buffer_size=2_000,
    )  # fmt: skip
    before = np.mean(agent.score(5).returns)
    after = np.mean(agent.learn(600).score(5).returns)
    assert after > 0.2 * before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_envs": 8}, r"^fit_every=200, num_envs=8: a fit sees 25 steps .* horizon=40 are needed; fit_every=320 or more$"),
        ({"num_envs": 6}, "num_envs=6: a fit sees 33 steps .* fit_every=240 or more$"),
        ({"fit_every": 30}, "^fit_every=30, num_envs=1: a fit sees 30 steps .* fit_every=40 or more$"),
        ({"fit_every": 10, "num_envs": 20, "horizon": 1}, "a fit sees 0 steps .* fit_every=20 or more$"),
        ({"max_episode_steps": 20}, "^horizon=40: an episode has 20 steps at most, so fits would learn nothing; at most that$"),
    ],
)
def test_sequences_that_no_fit_would_find_are_refused_before_a_run_begins(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ra.SVG_INF("Pendulum-v1", dir=str(tmp_path / "run"), device="cpu", buffer_size=2_000, hidden=[8], **fields)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "every"), [(8, 80), (7, 70), (3, 35), (1, 10)])
def test_a_fit_of_as_many_steps_as_are_asked_for_learns(count, every):
    fields = {**ROWS["svg_inf"], "fit_every": every, "num_envs": count}
    learner = ra.SVG_INF("Pendulum-v1", **fields).learn(every + count)
    assert int(learner.agent.model_adam.steps) == 2
    learner.close()


def test_a_fit_without_sequences_says_so_once(recwarn):
    """Poles fall within ten steps here, which no limit says; the model is learned, the policy is not."""
    learner = ra.SVG_INF("InvertedPendulum-v5", **{**ROWS["svg_inf"], "horizon": 35, "batch_size": 8})
    with pytest.warns(UserWarning, match=r"^horizon=35: of the latest 40 steps of each environment at most \d+ are stored"):
        learner.learn(40)
    recwarn.clear()
    learner.learn(80)
    assert not recwarn.list
    assert int(learner.agent.model_adam.steps) == 0
    assert int(learner.agent.fits.adam.steps) == 15


def test_captured_updates_are_eager_ones():
    env = open_env("Pendulum-v1")
    env.reset(0)
    ring = Replay(env, buffer_size=500)
    for _ in range(100):
        ring.collect(lambda: env.domain.uniform(1))
    torch.manual_seed(0)
    small = {"fit_steps": 20, "horizon": 1, "dynamics": {"members": 2, "likelihood": "squared"}}
    agent = drawn("svg_h", env.spec, hidden=(8,), expansion=small)
    agent.fit(ring)
    twin = copy.deepcopy(agent)
    assert twin.f.policy is twin.model
    Compiled(agent, lambda: ring.sample(16))  # which sets how torch traces
    captured = torch.compile(lambda batch: twin.update(batch, True), fullgraph=True, dynamic=False, backend="aot_eager")
    for step in range(5):
        batch = ring.sample(16)
        torch.manual_seed(step)
        expected = agent.update(batch, True)
        torch.manual_seed(step)
        found = captured(batch)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-4)


def test_a_saved_agent_is_loaded_with_its_model(tmp_path):
    for dynamics, more in (({"kind": "Ensemble"}, {}), ({"kind": "Own"}, {"fit_every": 0})):
        agent = ra.SVG_H("Pendulum-v1", **SMALL, expansion={"dynamics": dynamics, **more}).learn(60)
        agent.save(tmp_path / dynamics["kind"])
        again = ra.load(tmp_path / dynamics["kind"])
        x = np.array([1.0, 0.0, 0.5], np.float32)
        assert np.array_equal(agent.predict(x, deterministic=True)[0], again.predict(x, deterministic=True)[0])
        assert type(again.agent.expansion.dynamics) is type(agent.agent.expansion.dynamics)


@pytest.mark.parametrize(
    ("env", "fields", "message"),
    [
        ("Pendulum-v1", {"expansion.horizon": -1}, "expansion.horizon=-1"),
        ("Pendulum-v1", {"expansion.fit_every": 0}, "expansion.fit_every=0: with expansion.dynamics=Ensemble 1 or more is"),
        ("Pendulum-v1", {"expansion.dynamics": "own"}, "fit_every=200: with expansion.dynamics=Known 0 is needed"),
        ("Hopper-v5", {"expansion.dynamics": "own"}, "equations of this environment are not known.*or learn"),
        (
            "InvertedPendulum-v5",
            {"expansion.dynamics": "simulator"},
            "expansion.dynamics=Simulator: it has no gradients.*or ensemble, which is learned, is needed",
        ),
        ("Pendulum-v1", {"normalise": True}, "normalise"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(env, fields, message):
    with pytest.raises(UserError, match=message):
        ra.SVG_H(env, **SMALL, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"dynamics": "simulator"}, "dynamics=Simulator: it has no gradients.*or ensemble, which is learned, is needed"),
        ({"dynamics": "own"}, "equations of this environment are not known.*or learn them, dynamics=ensemble"),
    ],
)
def test_what_sequences_cannot_be_differentiated_through_is_said(fields, message):
    with pytest.raises(UserError, match=message):
        ra.SVG_INF("InvertedPendulum-v5", **{**SMALL, **fields})


@pytest.mark.parametrize(("method", "key"), [("svg_h", "expansion.fit_"), ("svg1", "fit_"), ("pets", "fit_")])
def test_a_model_is_fitted_before_it_is_asked(method, key):
    """Also where the first fit would be due later, and then at its own time."""
    steps = {"pets": {"fit_epochs": 1}}.get(method, {f"{key}steps": 1})
    learner = learner_class(method)("Pendulum-v1", **{**SMALL, **steps, "warmup_steps": 20, f"{key}every": 25})
    learner.learn(19)
    assert "dynamics/loss" not in learner.clock.metrics
    learner.learn(1, reset_num_timesteps=False)
    assert learner.clock.updates == 0
    before = learner.clock.metrics["dynamics/loss"]
    learner.learn(4, reset_num_timesteps=False)
    assert learner.clock.metrics["dynamics/loss"] is before
    learner.learn(1, reset_num_timesteps=False)
    assert learner.clock.metrics["dynamics/loss"] is not before


def test_a_learned_model_is_not_reset():
    """A reset would leave it untrained until its next fit."""
    with pytest.raises(UserError, match=r"reset_every=10: a reset would leave the model that fits learn.*untrained"):
        ra.SAC("Pendulum-v1", expansion="model", reset_every=10, **SMALL)
    known = {"kind": "Expanded", "dynamics": "own", "fit_every": 0}
    ra.SAC("Pendulum-v1", expansion=known, reset_every=10, **SMALL).close()


def test_an_expansion_takes_states_as_they_are(spec):
    with pytest.raises(UserError, match="normalise=false is needed"):
        drawn("sac", spec, expansion="model", normalise=True)
    assert isinstance(drawn("svg_h", spec), SAC)


def test_rewards_of_a_model_are_not_scaled_so_those_of_the_critic_must_not_be():
    with pytest.raises(
        UserError, match=r"reward_scale=return: the critic's values would be scaled, .* an expansion none is needed"
    ):
        ra.SAC("Pendulum-v1", expansion={"kind": "Expanded", "dynamics": "own", "fit_every": 0}, reward_scale="return", **SMALL)
    ra.SAC("Pendulum-v1", reward_scale="return", **SMALL).close()


def test_sooner_compares_steps_to_a_return_and_is_incomplete_until_all_seeds_are_there():
    claim = Sooner("svg", "svg_h", "Pendulum-v1", 3000, [0, 1], -200, 0.6, "sac")

    def run(*returns):
        return {"evaluations": [{"env_step": 1000 * (k + 1), "eval/return": one} for k, one in enumerate(returns)]}

    results = {
        claim.study.key("svg_h", 0): run(-100, -100, -100),
        claim.study.key("sac", 0): run(-900, -500, -150),
        claim.study.key("svg_h", 1): run(-900, -190, -300),
    }
    assert claim.judge(results)[0].outcome == "incomplete"
    assert not claim.judge({})
    (verdict,) = claim.judge(results | {claim.study.key("sac", 1): run(-900, -900, -900)})
    assert verdict.outcome == "pass"
    assert verdict.measured == "0.50 (1000, 2000 of 3000, 3000)"
    assert claim.judge(results | {claim.study.key("sac", 1): run(-100, -1, -1)})[0].outcome == "FAIL"
