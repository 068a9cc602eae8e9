"""Training beside other processes: fewer threads while cores are short, where that changes no number."""

import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rlamort.agent import Agent
from rlamort.capture import Moment, Round, named
from rlamort.train import Updates

WINDOW = 100  # rounds whose mean time is compared with others
SLOW = 2.0  # times the usual, from which on another way is tried
FASTER = 0.8  # of the time on all threads, from which on fewer are kept
AGAIN = 20.0  # seconds until all threads are tried again


class Sharing:
    """Rounds of updates on all threads, or on one while others use the same cores and one is faster.

    A thread that waits for another one, which the system has put aside for somebody else, keeps a core busy meanwhile; so two
    threads beside a busy process may be slower than one. Rounds are timed. Where they take much longer than they did, one
    thread is tried, if a round on it gives bit for bit what it gives on all: a run must not depend on who else was there.

    Args:
        updates: the rounds.
        agent: what they update.
        threads: all of them.
    """

    def __init__(self, updates: Updates, agent: Agent, threads: int) -> None:
        self.updates, self.agent, self.threads = updates, agent, threads
        self.alone = False  # whether rounds are on one thread
        self.same: bool | None = None  # whether that gives the same bits; None until it was tried
        self.usual = self.slow = 0.0  # seconds of a round: as it began, and when one thread was last preferred
        self.tried = -AGAIN
        self._rounds, self._seconds, self._first = 0, 0.0, True

    def __call__(self, improves: Sequence[bool], x: Tensor | None) -> Round:
        started = time.perf_counter()
        found = self.updates(improves, x)
        self._seconds += time.perf_counter() - started
        self._rounds += 1
        if self._rounds == WINDOW:
            mean, self._rounds, self._seconds = self._seconds / WINDOW, 0, 0.0
            if not self._first:  # in which something may have been compiled
                self._choose(mean, improves, x)
            self._first = False
        return Round(*found)

    def _choose(self, mean: float, improves: Sequence[bool], x: Tensor | None) -> None:
        """What the next window's rounds run on, by what those of the last one took."""
        now = time.perf_counter()
        if self.alone:
            if mean > FASTER * self.slow or now - self.tried > AGAIN:
                self._take(self.threads)
                self.tried = now
            return
        self.usual = min(self.usual or mean, mean)
        if mean > SLOW * self.usual and now - self.tried > AGAIN and self.same is not False:
            self.slow = mean
            if self.same is None:
                self._compare(improves, x)
            if self.same:
                self._take(1)
                self.tried = now

    def _take(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.alone = threads == 1

    def _compare(self, improves: Sequence[bool], x: Tensor | None) -> None:
        """One round on all threads and on one, from where the agent is, and back to there."""
        before, results = Moment(self.agent), []
        for threads in (self.threads, 1):
            self._take(threads)
            results.append(
                {name: tensor.clone() for name, tensor in named(Round(*self.updates(improves, x)), self.agent).items()}
            )
            before.restore()
        self._take(self.threads)
        self.same = all(torch.equal(results[0][name], results[1][name]) for name in results[0])
        how = "updates run on one thread as long as that is faster" if self.same else "threads=1 may be faster"
        warnings.warn(
            f"updates take {self.slow / self.usual:.1f} times as long as they did: other processes use these cores; {how}",
            stacklevel=2,
        )
