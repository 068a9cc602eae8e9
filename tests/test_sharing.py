"""Rounds on one thread or on all: whichever is faster, where both give the same numbers."""

import os
import subprocess
import sys

import pytest
import torch

import rlamort as ra
from rlamort.run import sharing
from rlamort.run.rounds import Round
from rlamort.run.sharing import Sharing


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Clocked:
    """Rounds that take as long as it is said: a clock of its own moves on, and nothing is waited for."""

    def __init__(self, agent, seconds, monkeypatch):
        self.agent, self.seconds, self.now, self.threads = agent, seconds, 100.0, []
        monkeypatch.setattr(sharing.time, "perf_counter", lambda: self.now)

    def __call__(self, improves, x, h):
        self.threads.append(torch.get_num_threads())
        self.now += self.seconds(self.now, torch.get_num_threads())
        with torch.no_grad():
            self.agent.model.net[0].weight.add_(1e-3)
        return Round({"loss": torch.zeros(())}, None)


@pytest.fixture
def agent():
    return ra.TD3("Pendulum-v1", hidden=[8], device="cpu").agent


def play(clocked, agent, rounds):
    rounds_on = Sharing(clocked, agent, 2)
    for _ in range(rounds):
        rounds_on([True], None)
    return rounds_on


def test_where_one_thread_is_faster_it_is_taken_and_tried_again_now_and_then(agent, monkeypatch):
    """Others use the cores from second 120 to second 200."""

    def seconds(now, threads):
        return 0.002 if not 120 < now < 200 else 0.050 if threads == 2 else 0.003

    idle = Clocked(agent, lambda now, threads: 0.002 if threads == 2 else 0.003, monkeypatch)
    rounds = play(idle, agent, 30_000)
    assert rounds.now == 2
    assert idle.threads.count(1) < 0.02 * len(idle.threads)
    beside = Clocked(agent, lambda now, threads: seconds(now, threads) if threads == 2 else 0.003, monkeypatch)
    rounds = Sharing(beside, agent, 2)
    on = {"before": [], "during": [], "later": [], "after": []}
    while beside.now < 300:
        when = "before" if beside.now < 120 else "during" if beside.now < 200 else "later" if beside.now < 265 else "after"
        rounds([True], None)
        on[when].append(rounds.now)
    assert on["before"].count(2) > 0.95 * len(on["before"])
    assert on["during"].count(1) > 0.95 * len(on["during"])
    assert on["after"].count(2) > 0.95 * len(on["after"])


def test_trying_changes_nothing(agent, monkeypatch):
    """Neither a parameter nor where random numbers stand."""
    first = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    torch.manual_seed(0)
    play(Clocked(agent, lambda now, threads: 0.1, monkeypatch), agent, 500)
    expected = torch.rand(3)
    moved = agent.model.net[0].weight - first["model.net.0.weight"]
    assert moved.allclose(torch.full_like(moved, 0.5), atol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), expected)


def test_where_threads_change_numbers_there_is_no_choice(agent, monkeypatch):
    clocked = Clocked(agent, lambda now, threads: 0.1 / threads**4, monkeypatch)
    plain = clocked.__call__

    def differing(improves, x, h):
        found = plain(improves, x, h)
        with torch.no_grad():
            agent.model.net[0].bias.add_(torch.get_num_threads() * 1e-3)
        return found

    rounds = Sharing(differing, agent, 2)
    for _ in range(2_000):
        rounds([True], None)
    assert rounds.same is False
    assert rounds.now == 2
    assert clocked.threads.count(1) == 1  # when that was tried


def test_what_only_some_rounds_train_is_compared_too(agent, monkeypatch):
    """A policy that is trained every other round, and never in those after which it is time to choose."""
    clocked = Clocked(agent, lambda now, threads: 0.1 / threads**4, monkeypatch)

    def differing(improves, x, h):
        found = clocked(improves, x, h)
        with torch.no_grad():
            agent.model.net[0].bias.add_(any(improves) * torch.get_num_threads() * 1e-3)
        return found

    rounds = Sharing(differing, agent, 2)
    for i in range(2_000):
        rounds([i % 2 == 0], None)
    assert rounds.same is False
    assert rounds.now == 2


@pytest.mark.parametrize("compile", [False, True])
def test_a_real_update_gives_the_same_bits_however_often_it_changes(compile, monkeypatch):
    """Real rounds, the choice made by a coin: the agent is that of all threads."""

    def learn(threads):
        agent = ra.SAC("Pendulum-v1", hidden=[32, 32], batch_size=32, warmup_steps=40, threads=threads, compile=compile, seed=2)
        return agent.learn(200).agent.state_dict()

    fixed = learn(2)
    monkeypatch.setattr(sharing, "WINDOW", 7)
    monkeypatch.setattr(sharing, "TRIAL", 3)
    monkeypatch.setattr(sharing, "AGAIN", 0.0)
    monkeypatch.setattr(sharing, "FASTER", torch.inf)
    shared = learn(None)
    assert all(torch.equal(fixed[name], shared[name]) for name in fixed)


def test_threads_that_were_asked_for_stay():
    agent = ra.TD3("Pendulum-v1", hidden=[8], batch_size=8, warmup_steps=20, threads=2).learn(30)
    assert not isinstance(agent.updates, Sharing)
    assert isinstance(ra.TD3("Pendulum-v1", hidden=[8], batch_size=8, warmup_steps=20).learn(30).updates, Sharing)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)],
)
def test_threads_wait_less_long_unless_the_user_says_how(given, expected):
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import sys, rlamort, os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=env | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(expected)]
