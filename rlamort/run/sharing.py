"""Updates on all threads or on one, whichever is faster at the machine's present load."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.run.capture import named
from rlamort.run.rounds import AgentSnapshot, Round
from rlamort.run.track import say
from rlamort.train import Updates

WINDOW, TRIAL = 100, 20  # rounds that are timed together; rounds of a trial
SLOW = 2.0  # times the usual duration, above which the alternative is tried immediately
FASTER = 0.85  # of the time on all threads, below which one thread is kept
LONG = 3  # times the expected duration, after which a trial ends early
AGAIN, SELDOM = 20.0, 60.0  # seconds between trials, at first, and after trials without a change


class Sharing:
    """Rounds of updates on all threads or on one, whichever is faster now.

    Threads synchronise many times in an update. One that is descheduled for another process blocks the others,
    so several threads on a busy machine may be slower than one; small networks are always faster on one.
    Updates are timed, and the alternative is tried periodically, and when they slow down. It is used only if a round gives
    bit for bit the same on one thread as on all, so that a run does not depend on the machine's load.

    Args:
        updates: the rounds.
        agent: the agent that they update.
        threads: the number of all threads.
    """

    def __init__(self, updates: Updates, agent: Agent, threads: int) -> None:
        self.updates, self.agent, self.threads = updates, agent, threads
        self.now = threads  # how many the rounds run on
        self.same: bool | None = None  # whether one thread gives the same bits; None until that was tried
        self._whole: Sequence[bool] = ()  # of the rounds so far, one that trained the most: what is compared
        self.mean: dict[int, float] = {}  # seconds of an update, by threads, when it was last timed
        self.usual = torch.inf  # the least of them on all threads
        self._trying, self._longest, self._wait, self._next = False, torch.inf, AGAIN, 0.0
        self._timed, self._updates, self._windows, self._seconds = 0, 0, 0, 0.0  # since the last choice

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        if torch.get_num_threads() != self.now:  # as when learning begins again
            torch.set_num_threads(self.now)
        if not improves:  # as for most rounds of utd=1/64: it says nothing of updates
            return Round(*self.updates(improves, x, h))
        self._whole = max(self._whole, improves, key=sum)
        started = time.perf_counter()
        found = self.updates(improves, x, h)
        self._seconds += time.perf_counter() - started
        self._timed += 1
        self._updates += len(improves)
        if self._timed >= (TRIAL if self._trying else WINDOW) or self._seconds > self._longest:
            mean, length = self._seconds / self._updates, self._updates / self._timed
            self._timed, self._updates, self._seconds = 0, 0, 0.0
            self._windows += 1
            if self._windows > 1 and self.same is not False:  # the first may have been compiling
                self._choose(mean, length, x, h)
        return Round(*found)

    def _choose(self, mean: float, length: float, x: Tensor | None, h: Carry) -> None:
        """Choose the number of threads of the next rounds by the last ones: seconds of an update, and updates in a round."""
        self.mean[self.now], now = mean, time.perf_counter()
        if self._trying:
            self._trying, self._longest = False, torch.inf
            best = 1 if self.mean[1] < FASTER * self.mean[self.threads] else self.threads
            self._wait = min(2 * self._wait, SELDOM) if best != self.now else AGAIN
            self._next = now + self._wait
            if best == self.now == 1:
                say.get()(
                    f"updates run on one thread now, which takes {self.mean[1] / self.mean[self.threads]:.0%} of the time"
                )
            self._take(best)
            return
        if self.now == self.threads:
            self.usual = min(self.usual, mean)
        slow = self.now == self.threads and mean > SLOW * self.usual and now > self._next - self._wait + AGAIN / 4
        if now > self._next or slow:
            self.same = self._compared(x, h) if self.same is None else self.same
            if self.same:
                self._trying, self._longest = True, LONG * TRIAL * mean * length
                self._take(1 if self.now == self.threads else self.threads)

    def _take(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.now = threads

    def _compared(self, x: Tensor | None, h: Carry) -> bool:
        """Whether a round from the present state gives the same bits on all threads as on one; restores the state."""
        before, results = AgentSnapshot(self.agent), []
        for threads in (self.threads, 1):
            self._take(threads)
            found = named(Round(*self.updates(self._whole, x, h)), self.agent)
            results.append({name: tensor.clone() for name, tensor in found.items()})
            before.restore()
        self._take(self.threads)
        return all(torch.equal(results[0][name], results[1][name]) for name in results[0])
