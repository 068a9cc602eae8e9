"""Captured updates against the eager ones, on batches from a real replay, and what happens when capturing goes wrong."""

import contextlib
import copy
import itertools

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from test_laws import learner
from torch.utils._python_dispatch import TorchDispatchMode

from rlamort.agent import Agent
from rlamort.env import Spec
from rlamort.env.make import open_env
from rlamort.host.graphs import close
from rlamort.host.machine import tf32_products
from rlamort.run import capture, rounds
from rlamort.run.capture import Captured
from rlamort.run.rounds import Eager
from rlamort.source import Contexts, Replay


@pytest.fixture
def ring(device):
    env = open_env("Pendulum-v1", count=2, device=device)
    env.reset(0)
    made = Replay(env, buffer_size=1000, n_step=2)
    for _ in range(150):
        made.collect(lambda: env.domain.uniform(2))
    return made


def pair(name, ring, kind=Captured, **more):
    """The same agent twice, one updated eagerly."""
    torch.manual_seed(0)
    agent = learner(name, ring.env.spec, normalise=True, **more).to(ring.device)
    agent.observe(ring.env.x)
    twin = copy.deepcopy(agent)
    return Eager(agent, lambda: ring.sample(64)), kind(twin, lambda: ring.sample(64))


@pytest.mark.parametrize("name", ["sac", "td3", pytest.param("ddpg", marks=pytest.mark.slow)])
def test_a_hundred_captured_updates_are_the_eager_ones(name, ring):
    """Metrics, actions and state to float32 tolerance; no graph break, no second compilation, no gradient left behind."""
    eager, captured = pair(name, ring)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(100):
        round_of = [eager.agent.improve_every == 1 or step % 2 == 1]
        ring.collect(lambda: ring.env.domain.uniform(2))  # the ring moves on under the graph
        torch.manual_seed(step)
        expected, y, _ = eager(round_of, ring.env.x)
        torch.manual_seed(step)
        got, y_captured, _ = captured(round_of, ring.env.x)
        assert set(got) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=2e-3, atol=2e-4, msg=f"{key} at update {step}")
        torch.testing.assert_close(y_captured, y, rtol=2e-3, atol=2e-4)
    assert len(captured.proved) == (1 if eager.agent.improve_every == 1 else 2)
    if ring.device.type == "cpu":
        assert counters["stats"]["unique_graphs"] == len(captured.proved)
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    for (key, ours), theirs in zip(captured.agent.state_dict().items(), eager.agent.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-4, msg=key)
    assert all(p.grad is None for p in captured.agent.parameters())


class Drawing(Agent):
    """Learns nothing. Its noise depends on no batch, so that only the order of the draws says which numbers are whose."""

    def __init__(self):
        super().__init__(Spec(8, [-1.0], [1.0]), normalise=False)
        self.wide = torch.nn.Linear(8, 64, bias=False)
        self.register_buffer("table", torch.randn(100, 8))

    def sample(self):
        return Contexts(self.table[torch.randint(2**62, (256,), device=self.device) % 100])

    def evaluate(self, batch):
        back = self.wide(batch.x).relu() @ self.wide.weight  # it takes much memory on the way
        noise = torch.randn(256, 1, device=self.device)
        return {"noise": (back * noise).sum().detach(), "batch": batch.x.sum()}


def test_draws_that_depend_on_nothing_keep_their_order(device):
    """A batch that is drawn after the noise is another batch."""
    torch.manual_seed(1)
    agent = Drawing().to(device)
    torch.manual_seed(2)
    expected = Eager(agent, agent.sample)([False], None).metrics
    captured = Captured(agent, agent.sample)
    torch.manual_seed(2)
    found = captured([False], None).metrics  # going on uncompiled would be a warning, and so an error here
    assert captured.proved == {((False,), False)}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-4)


def test_what_was_compiled_for_one_thread_is_right_for_two(ring, monkeypatch, tmp_path):
    """Torch's cache outlives processes and does not tell their numbers of threads apart."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            _, captured = pair("ddpg", ring)
            captured([True], ring.env.x)  # going on uncompiled would be a warning, and so an error here
            assert captured.proved == {((True,), True)}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [Eager, Captured])
def test_several_updates_in_a_round_are_as_many_single_ones(kind, ring):
    singles, several = pair("td3", ring, kind)
    expected = {}
    torch.manual_seed(1)
    for improve in (False, True, False):
        expected |= singles.agent.update(singles.sample(), improve)
    with torch.no_grad():
        y = singles.agent.act(ring.env.x, explore=True)
    torch.manual_seed(1)
    found = several([False, True, False], ring.env.x)
    torch.testing.assert_close(found.y, y, rtol=2e-3, atol=2e-4)
    assert set(found.metrics) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found.metrics[key], value, rtol=2e-3, atol=2e-4)


def test_rounds_of_any_length_are_made_of_few_patterns(ring, monkeypatch):
    """As of 64 environments, some of which have no transition in a step: the updates are the single ones, in their order."""
    monkeypatch.setattr(rounds, "PIECE", 4)
    singles, captured = pair("td3", ring)
    patterns, numbers = set(), itertools.count()

    class Recorded(rounds.CudaGraph):
        def _replayed(self, improves, x, h):
            patterns.add((*improves, x is not None))
            return self.rounds(improves, x, h)

    captured.rounds = Recorded(Eager(captured.agent, captured.sample))
    for length in (0, 1, 9, 13, 6, 0, 8, 11, 14):
        torch.manual_seed(length)
        improves = [next(numbers) % 3 == 2 for _ in range(length)]
        found = captured(improves, ring.env.x)
        torch.manual_seed(length)
        assert torch.equal(found.y, singles(improves, ring.env.x).y)
    assert all(len(pattern) <= 5 for pattern in patterns)
    assert len(patterns) <= 3 * (1 + 5)
    states = zip(captured.agent.state_dict().values(), singles.agent.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_what_comes_after_a_failure_is_the_eager_run(ring, monkeypatch):
    """A compiler that is not there costs one warning and nothing else: parameters and random numbers are the eager ones."""

    def broken(*args, **kwargs):
        def call(*inputs):
            torch.rand(3)
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return call

    monkeypatch.setattr(rounds.torch, "compile", broken)
    eager, captured = pair("td3", ring)
    captured.rounds = rounds.Compiled(captured.agent, captured.sample)
    assert_goes_on_eagerly(eager, captured, ring, "compile: it failed.*no compiler here")


class Other:
    """A way of running rounds that is right, and is not the eager one."""

    about, beginning, compiled = "otherwise", "trying otherwise ...", 0
    pieces = Eager.pieces

    def __init__(self, agent, sample):
        self.agent, self.eager, self.calls = agent, Eager(agent, sample), 0

    def __call__(self, improves, x, h=()):
        self.calls += 1
        return self.eager(improves, x, h)


class Wrong(Other):
    about = "wrongly"

    def __call__(self, improves, x, h=()):
        found = super().__call__(improves, x, h)
        with torch.no_grad():
            self.agent.critic.ensemble.layers[0].weight.mul_(1.1)
        return found


class Raises(Other):
    """Fails at rounds of `improve`, after it has drawn and changed something."""

    about = "recklessly"

    def __call__(self, improves, x, h=()):
        found = super().__call__(improves, x, h)
        if any(improves):
            raise AssertionError("an Inductor of its time")
        return found


def test_ways_are_tried_in_order_each_failure_is_said_once_and_the_run_is_the_eager_one(ring):
    eager, captured = pair("td3", ring)
    agent, sample = captured.agent, captured.sample
    wrong, raises, other, last = (kind(agent, sample) for kind in (Wrong, Raises, Other, Eager))
    captured = Captured(agent, sample, [wrong, raises, other, last])
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"so updates go on recklessly \(its first .* in critic.ensemble.layers.0.weight\)"):
        captured([False], ring.env.x)
    assert captured.rounds is raises
    captured([False], ring.env.x)
    with pytest.warns(UserWarning, match=r"so updates go on otherwise \(AssertionError: an Inductor of its time\)"):
        captured([True], ring.env.x)  # where the second fails, though it has passed another pattern
    captured([False], ring.env.x)  # another warning would be an error
    captured([True], ring.env.x)
    assert captured.proved == {((True,), True), ((False,), True)}
    assert captured.rounds is other
    assert (wrong.calls, raises.calls, other.calls) == (1, 2, 3)
    torch.manual_seed(1)
    for improve in (False, False, True, False, True):
        eager([improve], ring.env.x)
    states = zip(agent.state_dict().values(), eager.agent.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_what_is_compiled_for_a_graph_computes_the_same():
    """Inductor with the settings of a CUDA graph, here on the CPU: they exist, and change nothing but speed."""
    torch.manual_seed(1)
    agent = Drawing()
    captured = Captured(agent, agent.sample, [rounds.Compiled(agent, agent.sample, rounds.for_graph())])
    captured([False], None)  # going on otherwise would be an error: there is no other way
    assert captured.proved == {((False,), False)}


def test_on_a_gpu_updates_are_compiled_and_captured_or_captured_or_eager(ring, monkeypatch):
    with fake_cuda(monkeypatch):
        env = open_env("Pendulum-v1", count=1, device=CUDA)
        agent = learner("sac", env.spec).to(CUDA)
        first, second, last = capture.ways_of(agent, lambda: None)
    assert (type(first), type(first.rounds)) == (rounds.CudaGraph, rounds.Compiled)
    assert (type(second), type(second.rounds), type(last)) == (rounds.CudaGraph, Eager, Eager)
    assert [way.about for way in (first, second, last)] == [
        "compiled in a CUDA graph", "uncompiled in a CUDA graph", "uncompiled",
    ]  # fmt: skip


def test_a_graph_that_computes_something_else_is_not_used(ring):
    """Its first round is held against the eager one: the agent goes on from the right one."""
    eager, captured = pair("sac", ring)
    captured.rounds = Wrong(captured.agent, captured.sample)
    assert_goes_on_eagerly(eager, captured, ring, r"differs from the uncompiled one in critic.ensemble.layers.0.weight")


class Ten(TorchDispatchMode):
    """Products of factors with the ten bits of TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.bmm):
            bits = [factor.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF for factor in args[-2:]]
            args = *args[:-2], *(part.view(torch.float32) for part in bits)
        return func(*args, **(kwargs or {}))


def test_updates_in_tf32_have_room_for_its_rounding_and_no_more():
    env = open_env("HalfCheetah-v5", count=1)
    env.reset(0)
    ring = Replay(env, buffer_size=1000)
    for _ in range(300):
        ring.collect(lambda: env.domain.uniform(1))
    exact, rounded = (one.agent for one in pair("sac", ring, Eager, hidden=(256, 256)))
    found = []
    for agent, products in ((exact, contextlib.nullcontext()), (rounded, Ten())):
        torch.manual_seed(1)
        with products:
            found.append(capture.named(Eager(agent, lambda: ring.sample(256))([True], env.x), agent))
    left, right = found
    with tf32_products():
        assert not [name for name in left if not close(left[name], right[name])]
        assert not any(close(1.1 * left[name], left[name]) for name in left if left[name].double().norm() > 0.01)


def assert_goes_on_eagerly(eager, captured, ring, warning):
    """One warning, in the first of two rounds, and then the state that two eager rounds leave."""
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=warning):
        captured([True], ring.env.x)
    captured([False], ring.env.x)
    torch.manual_seed(1)
    eager([True], ring.env.x)
    eager([False], ring.env.x)
    states = zip(captured.agent.state_dict().values(), eager.agent.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
