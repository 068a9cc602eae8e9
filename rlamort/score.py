"""Evaluation of agents in separate environments, and statistics over seeds."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit

from rlamort.agent import Agent, Player
from rlamort.env import Env
from rlamort.errors import Fault
from rlamort.host.randomness import Randomness

SEED = 1_000_000  # evaluation episodes are the same for every training seed


class Interval(NamedTuple):
    """A statistic and a 95 % interval for it; the bounds are NaN where there are fewer than two values, and all where none."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean of `values` and its Student interval."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean (...) of values (..., N): of the middle half of the last axis (Agarwal et al., 2021)."""
    from scipy import stats  # here, since importing it takes longer than loading an agent

    return np.asarray(stats.trim_mean(values, 0.25, axis=-1))


def stratified_bootstrap(
    groups: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], draws: int = 2_000, seed: int = 0
) -> Interval:
    """`statistic` of all values together, with a 95 % percentile interval over draws within each group (Agarwal et al., 2021).

    With a few values a group it is too narrow: of means of normal values it holds the true one in 74 % of cases with three, in
    84 % with five; with a group of one it has no bounds.

    Args:
        groups: the values of one task each, one per seed.
        statistic: of values (..., N), along the last axis.
        draws: how many.
        seed: of the draws.
    """
    if min(map(len, groups)) < 2:
        return Interval(float(statistic(np.concatenate(groups))), math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = np.concatenate([generator.choice(group, (draws, len(group))) for group in groups], axis=-1)
    low, high = np.percentile(statistic(drawn), [2.5, 97.5])
    return Interval(float(statistic(np.concatenate(groups))), float(low), float(high))


def mean(values: np.ndarray) -> np.ndarray:
    """Mean (...) of values (..., N)."""
    return np.asarray(values.mean(-1))


def finished(returns: Sequence[float]) -> list[float]:
    """The returns of episodes that did not fail, which those that did have none of: NaN."""
    return [one for one in returns if not math.isnan(one)]


class Score(NamedTuple):
    """Undiscounted returns and lengths of episodes played without exploration, in the order of their seeds.

    An episode in which the environment failed has no return, NaN: what it was paid until then is that of no whole episode,
    and a problem's cost that is no finite number is not 0.
    """

    returns: list[float]
    lengths: list[int]

    @property
    def failed(self) -> int:
        """How many episodes failed."""
        return len(self.returns) - len(finished(self.returns))

    def whole(self) -> list[float]:
        """All returns, for comparisons by the same episodes. Raises Fault if one failed."""
        if self.failed:
            raise Fault(f"evaluation: the environment failed in {self.failed} of {len(self.returns)} episodes; all are needed")
        return self.returns

    def values(self) -> dict[str, float | list[float]]:
        """As a record of what finished, without the bounds that a single episode and the return that none does not have.

        Where some failed it says how many.
        """
        failed: dict[str, float | list[float]] = {"eval/failed": self.failed} if self.failed else {}
        returns = finished(self.returns)
        if not returns:
            return failed
        mean, low, high = interval(returns)
        lengths = [length for one, length in zip(self.returns, self.lengths, strict=True) if not math.isnan(one)]
        record: dict[str, float | list[float]] = {"eval/return": mean, "eval/length": float(np.mean(lengths))}
        if not math.isnan(low):
            record |= {"eval/low": low, "eval/high": high}
        return record | {"eval/returns": returns} | failed


@torch.no_grad()
def score(agent: Agent, env: Env, seed: int = SEED, episodes: int | None = None) -> Score:
    """Play `episodes` episodes in `env`, by default one in each row, with deterministic actions, from seeds seed, seed + 1, ...

    As many are played side by side as it has rows. Agents that draw when they act, and environments, draw from generators of
    the evaluation's own: the same agent has the same score, and what goes on around it is not disturbed. Observation
    statistics of the agent stay as they are.
    """
    episodes, returns, lengths = episodes or env.count, list[float](), list[int]()
    with Randomness(seed, env.device)():
        for first in range(0, episodes, env.count):
            total, length = _play(agent, env, seed + first, min(env.count, episodes - first))
            returns += total.tolist()
            lengths += length.tolist()
    return Score(returns, lengths)


def _play(agent: Agent, env: Env, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One episode in each of the first `count` rows: returns, NaN of those that fail, and lengths (count,)."""
    x, player = env.reset(seed), Player(agent, env.count)
    total, length, running = np.zeros(env.count), np.zeros(env.count, dtype=np.int64), np.arange(env.count) < count
    while running.any():
        step = env.step(player(x, explore=False))
        total += running * step.reward.numpy(force=True)
        total[running & ~step.valid] = np.nan
        length += running
        running &= ~step.over
        player.begin(step.over)
        x = env.x
    env.episodes()
    return total[:count], length[:count]
