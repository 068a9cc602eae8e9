"""Measuring: what an agent is worth in environments of its own."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from rlamort.agent import Agent
from rlamort.env import Env

SEED = 1_000_000  # evaluation episodes are the same for every training seed


class Interval(NamedTuple):
    """A mean and a 95 % Student interval for it; the bounds are NaN where there are fewer than two values."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean of `values` and its interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


class Score(NamedTuple):
    """Undiscounted returns and lengths of episodes played without exploration."""

    returns: list[float]
    lengths: list[int]

    def values(self) -> dict[str, float | list[float]]:
        """As a record; bounds that a single episode does not have are left out."""
        mean, low, high = interval(self.returns)
        record: dict[str, float | list[float]] = {"eval/return": mean, "eval/length": float(np.mean(self.lengths))}
        if not math.isnan(low):
            record |= {"eval/low": low, "eval/high": high}
        return record | {"eval/returns": self.returns}


@torch.no_grad()
def score(agent: Agent, env: Env, seed: int = SEED) -> Score:
    """One episode in each row of `env`, from seeds seed, seed + 1, ..., with deterministic actions.

    The agent's observation statistics stay as they are.
    """
    x = env.reset(seed)
    total, length, running = np.zeros(env.count), np.zeros(env.count, dtype=np.int64), np.ones(env.count, dtype=bool)
    while running.any():
        step = env.step(agent.act(x, explore=False))
        total += running * step.reward.numpy(force=True)
        length += running
        running &= ~(step.terminated | step.truncated)
        x = env.x
    env.episodes()
    return Score(total.tolist(), length.tolist())
