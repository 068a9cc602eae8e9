"""Rounds of many updates of a problem, for which no agent acts: the same run as rounds of one, and guards where they matter."""

import gc
import itertools
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from test_resume import assert_equal, timeless

import rlamort as ra
from rlamort.env.one_step import open_problem
from rlamort.errors import Preempted
from rlamort.problem import draw
from rlamort.run import rounds
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.source import Fresh, contexts

QUICK = {"hidden": (8,), "batch_size": 16, "seed": 3, "device": "cpu"}


class Portfolio(ra.Problem):
    domain = ra.Simplex(4)

    def contexts(self, count):
        return torch.randn(count, 4)

    def cost(self, y, x):
        return (x * y).sum(-1) + y.square().sum(-1)


class Recorded:
    """All records of a run, but for times, and the steps of its rounds."""

    def __init__(self):
        self.records, self.rounds = [], [0]

    def record(self, env_step, values):
        self.records.append((env_step, {key: value for key, value in values.items() if not key.startswith("time/s")}))

    def progress(self, env_step, pace, episode):
        self.rounds.append(env_step)


@pytest.fixture
def longest(monkeypatch):
    """Sets how many steps a round may have, however long they take."""

    def choose(steps):
        monkeypatch.setattr(contexts, "LONGEST", steps)
        monkeypatch.setattr(contexts, "AT_ONCE", 1e9)

    return choose


@pytest.fixture
def uncompiled(monkeypatch):
    """Graphs with their guards as torch traces them, run operation by operation: their numbers are the eager ones."""
    monkeypatch.setattr(rounds.torch._inductor, "compile", lambda graph, examples, options: graph.forward)


def trained(kind, steps=100, **fields):
    """What a run leaves: tensors, generators and metrics; its records; the lengths of its rounds; the learner."""
    random.seed(0)
    recorded = Recorded()
    learner = ra.AMORTIZE(kind, **{**QUICK, **fields}).learn(steps, trackers=[recorded])
    left = {"agent": dict(learner.agent.state_dict()), "random": learner.randomness.current(), "metrics": learner.clock.metrics}
    return left, recorded.records, np.diff(recorded.rounds).tolist(), learner


@pytest.mark.parametrize(
    "fields",
    [
        {"log_every": 7, "eval_every": 20, "eval_episodes": 4},
        {"log_every": 50, "utd": 2, "decay_updates": 90},
        {"log_every": 50, "dataset_size": 40, "checkpoint_every": 30},
        {"log_every": 50, "reset_every": 13},
    ],
)
def test_rounds_of_any_length_are_the_same_run(fields, longest):
    """Parameters, generators, metrics and records bit for bit, the records at the same steps."""
    longest(1)
    expected, records, lengths, _ = trained(Portfolio, compile=False, **fields)
    assert set(lengths) == {1}
    for steps in (64, 8):
        longest(steps)
        left, ours, lengths, learner = trained(Portfolio, compile=False, **fields)
        assert_equal(left, expected)
        assert_equal(ours, records)
        assert max(lengths) == 1 if "reset_every" in fields else 4 <= max(lengths) <= steps
        ends = np.cumsum(lengths)
        for every in (fields["log_every"], fields.get("eval_every", 100), fields.get("checkpoint_every", 100)):
            assert set(range(every, 101, every)) <= set(ends)  # no round goes beyond
        assert learner.clock.updates == 100 * fields.get("utd", 1)


@pytest.mark.parametrize("at", [5, 33, 64])
def test_stopped_between_any_rounds_and_resumed_with_others_is_uninterrupted(at, longest, tmp_path):
    fields = {"log_every": 40, "eval_every": 80, "eval_episodes": 4, "checkpoint_every": 25, **QUICK}
    longest(1)
    whole = learner_class("amortize")("rlamort/Sphere-v0", dir=str(tmp_path / "whole"), **fields).learn(100)
    longest(64)
    broken = learner_class("amortize")("rlamort/Sphere-v0", dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(100, stop=lambda: broken.clock.env_step >= at)
    assert at <= broken.clock.env_step < 100
    broken.close()
    longest(8)
    again, exactness = resume(tmp_path / "broken", {})
    again.learn(100 - again.clock.env_step, reset_num_timesteps=False)
    assert exactness == "exact"
    assert_equal(again.agent.state_dict(), whole.agent.state_dict())
    assert_equal(again.randomness.current(), whole.randomness.current())
    assert_equal(timeless(tmp_path / "broken"), timeless(tmp_path / "whole"))
    whole.close()
    again.close()


def test_a_round_takes_no_longer_than_an_answer_to_a_signal_may(monkeypatch):
    """A clock of its own: steps that are quick, and then slow."""
    source, now = Fresh(open_problem(Portfolio)), itertools.count()
    clock = {"now": 0.0, "step": 1e-4}
    monkeypatch.setattr(contexts.time, "perf_counter", lambda: clock["now"])

    def play(rounds, most=1_000):
        lengths = []
        for _ in itertools.islice(now, rounds):
            lengths.append(source.collect(None, most).transitions)
            clock["now"] += clock["step"] * lengths[-1]
        return lengths

    assert play(9) == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert play(2, most=40) == [32, 32]
    assert play(2, most=3) == [2, 2]
    assert source.collected == sum([1, 2, 4, 8, 16, 32, 64, 64, 64, 32, 32, 2, 2])
    clock["step"] = 0.03
    play(1)  # before it is known
    assert max(length * clock["step"] for length in play(20)) <= contexts.AT_ONCE
    clock["step"] = 3.0
    play(1)
    assert play(3) == [1, 1, 1]


@pytest.mark.slow
def test_compiled_rounds_are_the_same_run_and_keep_no_agent_alive(longest, monkeypatch):
    """By Inductor: most updates of long rounds go past the guards, with the bits of those that do not."""
    untested = []
    monkeypatch.setattr(rounds.Call, "__call__", lambda call: untested.append(call.code(*call.inputs)))
    longest(1)
    expected, *_, learner = trained(Portfolio, compile=True)
    assert not untested
    longest(64)
    left, _, lengths, other = trained(Portfolio, compile=True)
    assert_equal(left, expected)
    assert max(lengths) >= 32
    assert len(untested) > 60
    assert other.updates.proved == {((True,), False)}
    gone = [weakref.ref(learner.agent), weakref.ref(other.agent)]
    del learner, other, left, expected, _
    untested.clear()
    gc.collect()
    assert [one() for one in gone] == [None, None]


class Alternating(Portfolio):
    """Its cost is doubled at every other call."""

    doubled = False

    def cost(self, y, x):
        self.doubled = not self.doubled
        return super().cost(y, x) * (2.0 if self.doubled else 1.0)


class Remembering(Portfolio):
    """Its cost pushes away from the latest solutions, which it holds in an attribute."""

    def __init__(self):
        super().__init__()
        self.last = torch.zeros(4)

    def cost(self, y, x):
        cost = super().cost(y, x) + (y * self.last).sum(-1)
        self.last = y.detach().mean(0)
        return cost


class Buffering(Remembering):
    """The same, in place."""

    def cost(self, y, x):
        cost = Portfolio.cost(self, y, x) + (y * self.last.clone()).sum(-1)
        self.last.copy_(y.detach().mean(0))
        return cost


@pytest.mark.parametrize("kind", [Alternating, Remembering, Buffering])
def test_what_updates_change_in_python_is_seen_by_the_next_one(kind, longest, uncompiled, monkeypatch):
    """Guards stay where an update changes what they guard; what it changes within tensors needs none."""
    untested = []
    monkeypatch.setattr(rounds.Call, "__call__", lambda call: untested.append(call.code(*call.inputs)))
    longest(64)
    fields = {"steps": 63, "log_every": 100, "eval_every": 100}
    expected, *_ = trained(kind, compile=False, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is captured
        left, *_ = trained(kind, compile=True, **fields)
    assert_equal(left["agent"], expected["agent"])
    assert bool(untested) == (kind is Buffering)


class Counting(Portfolio):
    """It changes at its fortieth call."""

    calls = 0

    def cost(self, y, x):
        self.calls += 1
        return super().cost(y, x) * (2.0 if self.calls > 40 else 1.0)


class Generating(Portfolio):
    """A NumPy generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def contexts(self, count):
        return torch.from_numpy(self.generator.normal(size=(count, 4)).astype(np.float32))


class Global(Portfolio):
    """NumPy's global generator."""

    def contexts(self, count):
        return torch.from_numpy(np.random.normal(size=(count, 4)).astype(np.float32))


class Shaken(Portfolio):
    """Python's generator."""

    def cost(self, y, x):
        return super().cost(y, x) * random.random()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counting, "change from update to update"),
        (Generating, r"at .*self\.generator"),
        (Global, "differs"),
        (Shaken, r"at .*random\.random"),
    ],
)
def test_a_problem_that_cannot_be_captured_says_so_once_and_goes_on_as_if_nothing_had_been_tried(
    kind, reason, longest, uncompiled
):
    longest(64)
    fields = {"steps": 63, "log_every": 100, "eval_every": 100}
    expected, *_ = trained(kind, compile=False, **fields)
    with pytest.warns(UserWarning, match=f"compile: it failed for {kind.__name__}, .*{reason}") as said:
        left, *_ = trained(kind, compile=True, **fields)
    assert len(said) == 1
    assert_equal(left, expected)


class Reading(Portfolio):
    """Its cost reads a value of a tensor."""

    def cost(self, y, x):
        return super().cost(y, x) / max(1.0, float(x.abs().max()))


def test_a_cost_that_reads_a_value_is_captured_or_says_so(device, longest, uncompiled):
    """On a CPU torch may trace it; a GPU's graph cannot wait for the value."""
    longest(64)
    fields = {"steps": 63, "log_every": 100, "eval_every": 100, "device": device.type}
    expected, *_ = trained(Reading, compile=False, **fields)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        left, *_ = trained(Reading, compile=True, **fields)
    assert [str(one.message) for one in said if "compile: it failed for Reading" not in str(one.message)] == []
    assert len(said) <= 1
    assert len(said) == 1 or device.type == "cpu"
    for name, tensor in expected["agent"].items():
        torch.testing.assert_close(left["agent"][name], tensor, rtol=1e-4, atol=1e-5)


class Mixing(ra.Problem):
    """Contexts by a plain draw and a buffer."""

    domain = ra.Box([-1.0], [1.0])

    def __init__(self):
        super().__init__()
        self.register_buffer("mixing", torch.eye(3))

    def contexts(self, count):
        return {"x": torch.randn(count, 3) @ self.mixing, "which": torch.randint(5, (count,))}


def test_plain_draws_are_where_the_problem_is():
    """On a device that no tensor is on by default."""
    problem, meta = Mixing().to("meta"), torch.device("meta")
    assert problem.layout.dim == 4
    assert draw(problem, 5, meta).device == meta
