"""Environments of the claims of guided policy search, whose conditions have a hull that other episodes begin in.

d numbers in a state · M conditions
"""

from typing import Any

import numpy as np
import torch

from rlamort.config import Seed, Size
from rlamort.envs.lqr import Lqr
from rlamort.envs.twolink import TwoLink

BOUND = 6.0  # N, above what optimal control of the point mass asks for


class Corners:
    """Start states: resets with the seeds first, ..., first + M - 1 begin in a corner each, all others in the corners' hull.

    Args:
        corners: (M, d).
        first: seed of the first corner's.
    """

    def __init__(self, corners: np.ndarray, first: int) -> None:
        self.corners, self.first, self.at = corners, first, -1

    def reset(self, seed: int | None) -> None:
        """Note the seed of a reset."""
        self.at = -1 if seed is None else seed - self.first

    def begin(self, random: np.random.Generator) -> np.ndarray:
        """The state (d,) to begin in."""
        inside = 0 <= self.at < len(self.corners)
        weight = np.eye(len(self.corners))[self.at] if inside else random.dirichlet(np.ones(len(self.corners)))
        start: np.ndarray = weight @ self.corners
        return start


class PointMass(Lqr):
    """The point mass, which begins in the hull of four states, all at random in [-1, 1]^4.

    Args:
        first: seed of the states, and of the resets that begin in them.
        conditions: how many.
    """

    def __init__(self, first: Seed = 0, conditions: Size = 4) -> None:
        super().__init__(bound=BOUND)
        self.corners = Corners(np.random.default_rng(first).uniform(-1, 1, (conditions, 4)), first)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.corners.reset(seed)
        return super().reset(seed=seed, options=options)

    def begin(self) -> np.ndarray:
        return self.corners.begin(self.np_random)


class Reach(TwoLink):
    """The arm of two links, whose hand is to reach one target from the hull of four postures within 0.7 rad of one, at rest.

    Args:
        first: seed of target and postures, and of the resets that begin in these.
        conditions: how many.
    """

    def __init__(self, first: Seed = 0, conditions: Size = 4) -> None:
        super().__init__()
        random = np.random.default_rng(first)
        middle = random.uniform(-np.pi, np.pi, 2)
        target = self.hand(torch.tensor(middle + random.uniform(-1.5, 1.5, 2))[None])[0].numpy()
        postures = middle + random.uniform(-0.7, 0.7, (conditions, 2))
        self.corners = Corners(np.concatenate([postures, np.zeros_like(postures), np.tile(target, (conditions, 1))], 1), first)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.corners.reset(seed)
        return super().reset(seed=seed, options=options)

    def begin(self) -> np.ndarray:
        return self.corners.begin(self.np_random)
