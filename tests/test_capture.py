"""Captured updates against the eager ones, on batches from a real replay, and what happens when capturing goes wrong."""

import copy

import pytest
import torch
from rlamort.envs.make import open_env
from test_laws import LEARNERS

from rlamort import capture
from rlamort.capture import Compiled, Eager
from rlamort.source import Replay


@pytest.fixture(scope="module")
def ring():
    env = open_env("Pendulum-v1", count=2)
    env.reset(0)
    made = Replay(env, buffer_size=1000, n_step=2)
    for _ in range(150):
        made.collect(env.domain.uniform(2))
    return made


def pair(name, ring, compiled=Compiled):
    """The same agent twice, updated eagerly and otherwise."""
    torch.manual_seed(0)
    agent = LEARNERS[name](ring.env.spec, normalise=True)
    agent.observe(ring.env.x)
    twin = copy.deepcopy(agent)
    return Eager(agent, lambda: ring.sample(64)), compiled(twin, lambda: ring.sample(64))


@pytest.mark.parametrize("name", ["sac", "td3", "ddpg"])
def test_a_hundred_compiled_updates_are_the_eager_ones(name, ring):
    """Metrics, actions and state to float32 tolerance; no graph break, no second compilation, no gradient left behind."""
    eager, compiled = pair(name, ring)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(100):
        round_of = [eager.agent.improve_every == 1 or step % 2 == 1]
        ring.collect(ring.env.domain.uniform(2))  # the ring moves on under the graph
        torch.manual_seed(step)
        expected, y = eager(round_of, ring.env.x)
        torch.manual_seed(step)
        got, compiled_y = compiled(round_of, ring.env.x)
        assert set(got) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=2e-3, atol=2e-4, msg=f"{key} at update {step}")
        torch.testing.assert_close(compiled_y, y, rtol=2e-3, atol=2e-4)
    assert counters["stats"]["unique_graphs"] == len(compiled.checked) == (1 if eager.agent.improve_every == 1 else 2)
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    for (key, ours), theirs in zip(compiled.agent.state_dict().items(), eager.agent.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-4, msg=key)
    assert all(p.grad is None for p in compiled.agent.parameters())


def test_several_updates_in_a_round_are_as_many_single_ones(ring):
    rounds, singles = pair("td3", ring, Eager)
    torch.manual_seed(1)
    found, y = rounds([False, True, False], ring.env.x)
    torch.manual_seed(1)
    expected = {}
    for improve in (False, True, False):
        expected |= singles.once(improve, None)[0]
    with torch.no_grad():
        assert torch.equal(y, singles.agent.act(ring.env.x, explore=True))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_compiler_that_fails_costs_one_warning(ring, monkeypatch):
    def broken(*args, **kwargs):
        def call(*inputs):
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return call

    monkeypatch.setattr(capture.torch, "compile", broken)
    _, compiled = pair("td3", ring)
    with pytest.warns(UserWarning, match="compile: it failed.*no compiler here"):
        compiled([True], ring.env.x)
    assert set(compiled([False], ring.env.x)[0]) == {"critic/loss", "critic/q"}


def test_a_graph_that_computes_something_else_is_not_used(ring, monkeypatch):
    """Its first update is held against the eager one: the agent goes on from the right one, uncompiled."""

    def sabotaged(function, **options):
        def call(agent, sample, improve, x):
            found = function(agent, sample, improve, x)
            with torch.no_grad():
                agent.critic.ensemble.layers[0].weight.mul_(1.1)
            return found

        return call

    monkeypatch.setattr(capture.torch, "compile", sabotaged)
    eager, compiled = pair("sac", ring)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"differs from the uncompiled one in critic.ensemble.layers.0.weight"):
        compiled([True], ring.env.x)
    compiled([True], ring.env.x)
    torch.manual_seed(1)
    eager([True], ring.env.x)
    eager([True], ring.env.x)
    states = zip(compiled.agent.state_dict().values(), eager.agent.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
