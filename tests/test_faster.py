"""What makes learning faster and is off by default: layer norm in critics, resets, products in bfloat16."""

import copy

import pytest
import torch
from test_capture import pair, ring  # noqa: F401  (a fixture)
from test_laws import batch_for, having, learner
from test_resume import SMALL, assert_equal, everything, timeless

import rlamort as ra
from rlamort.errors import Preempted
from rlamort.host.graphs import close
from rlamort.nets import Ensemble, bfloat16_product
from rlamort.norm import EnsembleLayerNorm
from rlamort.run.capture import Captured
from rlamort.run.resets import Resets
from rlamort.run.restore import resume

ALL = {"critic.norm": "layer", "matmul": "bfloat16"}


def test_layer_norm_is_torchs_and_blind_to_scale_and_shift(device):
    """Member by member; gain and bias belong to members, so fewer of them are asked as the whole ensemble is."""
    torch.manual_seed(0)
    norm = EnsembleLayerNorm(3, 32).to(device)
    theirs = [torch.nn.LayerNorm(32, device=device) for _ in range(3)]
    with torch.no_grad():
        for i, one in enumerate(theirs):
            one.weight.copy_(norm.gain[i, 0].normal_())
            one.bias.copy_(norm.bias[i, 0].normal_())
    h = 10 * torch.randn(3, 7, 32, device=device)
    torch.testing.assert_close(norm(h, 3), torch.stack([one(part) for one, part in zip(theirs, h, strict=True)]))
    torch.testing.assert_close(norm(50 * h + 3, 3), norm(h, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm(h[:1], 1), norm(h, 3)[:1])


def test_normed_critics_do_not_see_the_scale_of_a_layer(device):
    """Linear, then the norm, then ReLU: scaling what a hidden layer computes changes nothing, as it does in plain critics."""
    torch.manual_seed(0)
    for norm, blind in ((EnsembleLayerNorm, True), (None, False)):
        net = Ensemble(2, 5, (64, 64), 1, **({"norm": norm} if norm else {})).to(device)
        x = torch.randn(9, 5, device=device)
        before = net(x)
        with torch.no_grad():
            for layer in net.layers[:-1]:
                layer.weight.mul_(20)
                layer.bias.mul_(20)
        assert torch.allclose(net(x), before, rtol=1e-3, atol=1e-3) == blind


def test_bfloat16_products_are_within_its_rounding(device):
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 64, device=device), torch.randn(2, 64, 30, device=device)
    exact, found = a.double() @ b.double(), bfloat16_product(a, b)
    assert found.dtype == torch.float32
    scale = a.double().abs() @ b.double().abs()
    error = (found - exact).abs()
    assert (error <= 2**-8 * (2.02 * scale + exact.abs())).all()  # of both factors, half a unit each, and of the result
    assert error.max() > 1e-4  # float32 would not be that far off


@pytest.mark.parametrize("name", having("matmul"))
def test_an_update_in_bfloat16_is_float32s_to_its_rounding(name, spec, device):
    """Parameters, moments and metrics stay float32; gradients, which the first step leaves in Adam's mean, agree to 10 %:
    a few products of 2^-8 each, and ReLUs that they flip."""
    agents = []
    for matmul in ("float32", "bfloat16"):
        torch.manual_seed(0)
        agents.append(learner(name, spec, matmul=matmul).to(device))
    plain, rounded = agents
    assert_equal(plain.state_dict(), rounded.state_dict())
    batch = batch_for(plain, 256)
    metrics = []
    for agent in agents:
        torch.manual_seed(1)
        metrics.append(agent.update(batch, True))
    assert all(value.dtype == torch.float32 for value in metrics[1].values())
    for key, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][key], value, rtol=0.03, atol=0.01, msg=key)
    differ = False
    for (key, one), other in zip(plain.state_dict().items(), rounded.state_dict().values(), strict=True):
        assert one.dtype == other.dtype, key
        differ |= not torch.equal(one, other)
        if ".mean." in key:
            assert (one - other).norm() <= 0.1 * one.norm() + 1e-6, key
    assert differ


def resetting(round_of, fresh, every, start=0):
    """`Resets` around rounds that count themselves, as `Clock` does."""
    counted = [start]
    made = Resets(round_of, round_of.agent, fresh, every, lambda: counted[0])

    def call(improves, x, h=()):
        found = made(improves, x, h)
        counted[0] += len(improves)
        return found

    return call


@pytest.mark.parametrize("name", having("critic.norm"))
def test_a_reset_is_the_start_again_in_the_same_memory(name, spec, device):
    """What is there afterwards is what building the agent draws; only observation statistics stay."""
    torch.manual_seed(0)
    agent = learner(name, spec, normalise=True, **{"critic.norm": "layer"}).to(device)
    agent.observe(batch_for(agent).x)
    for step in range(4):
        agent.update(batch_for(agent, seed=step), True)
    statistics, learned = copy.deepcopy(agent.normaliser), copy.deepcopy(agent.state_dict())
    places = {key: value.data_ptr() for key, value in agent.state_dict().items()}

    def fresh():
        return learner(name, spec, normalise=True, **{"critic.norm": "layer"})

    met = []

    def idle(improves, x, h):
        met.append(copy.deepcopy(agent.state_dict()))
        return {}, None

    idle.agent = agent
    rounds = resetting(idle, fresh, every=5, start=2)
    torch.manual_seed(7)
    rounds([True, True], None)  # updates 3 and 4
    rounds([True, True], None)  # 5 and 6: a reset comes first
    rounds([True], None)
    torch.manual_seed(7)
    drawn = fresh().to(device)
    drawn.normaliser = statistics
    assert_equal(met[0], learned)
    assert_equal(met[1], drawn.state_dict())
    assert_equal(met[2], met[1])
    assert {key: value.data_ptr() for key, value in agent.state_dict().items()} == places
    assert not torch.equal(met[1]["critic.ensemble.layers.0.weight"], learned["critic.ensemble.layers.0.weight"])
    assert_equal(agent.critic.state_dict(), agent.target_critic.state_dict())
    for adam in (agent.model_adam, agent.critic_adam):
        assert not any(moment.any() for moment in (*adam.mean, *adam.square, adam.steps))


def test_captured_with_all_of_it_is_eager_with_all_of_it(ring):  # noqa: F811
    """Layer norm, bfloat16 and a reset on the way: the same updates, by the graph that was there before the reset."""
    eager, captured = pair("sac", ring, Captured, **ALL)

    def fresh():
        return learner("sac", ring.env.spec, normalise=True, **ALL)

    both = [resetting(one, fresh, every=10) for one in (eager, captured)]
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(20):
        found = []
        for one in both:
            torch.manual_seed(step)
            found.append(one([True], ring.env.x))
        assert all(close(found[1][0][key], value) for key, value in found[0][0].items()), step
        assert close(found[1][1], found[0][1]), step
    assert captured.proved == {((True,), True)}
    assert not counters["recompiles"]
    assert not counters["graph_break"]
    states = zip(captured.agent.state_dict().items(), eager.agent.state_dict().values(), strict=True)
    assert all(close(ours, theirs) for (_, ours), theirs in states)


@pytest.mark.parametrize("at", [90, 130])
def test_stopped_before_or_after_a_reset_and_resumed_is_uninterrupted(at, tmp_path):
    fields = {**SMALL, "critic.norm": "layer", "reset_every": 100, "utd": 2, "num_envs": 3, "normalise": True}
    whole = ra.SAC("Pendulum-v1", dir=str(tmp_path / "whole"), **fields).learn(150)
    broken = ra.SAC("Pendulum-v1", dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(150, stop=lambda: broken.clock.env_step >= at)
    assert (broken.clock.updates >= 100) == (at == 130)
    broken.close()
    again, exactness = resume(tmp_path / "broken", {})
    assert exactness == "exact"
    again.learn(150 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")
    assert int(whole.agent.critic_adam.steps) == whole.clock.updates - 96  # since the round, of six, that held update 100
    whole.close()
    again.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("critic.norm", "group", "none, layer, batch, renorm is needed"),
        ("matmul", "float16", "float32, tf32, bfloat16"),
        ("reset_every", -1, ">= 0"),
    ],
)
def test_what_these_may_be_is_said(key, value, message):
    with pytest.raises(ra.UserError, match=rf"{key}={value}: .*{message}"):
        ra.SAC("Pendulum-v1", **{key: value})
