"""Environments that are their equations in torch, so that planners know them exactly.

x state (B, d), which is observed · u action (B, n)
"""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

Moved = tuple[Tensor, Tensor, Tensor]  # x_next (B, d), reward (B,), continues (B,)


class Equations(gymnasium.Env[np.ndarray, np.ndarray]):
    """An environment whose step is its own `dynamics` in float32, of one state.

    Args:
        dim: d.
        bounds: of each coordinate of actions, which are in [-bound, bound].
        length: steps until an episode is truncated, `max_episode_steps`.
    """

    def __init__(self, dim: int, bounds: Sequence[float], length: int) -> None:
        high = np.array(bounds, dtype=np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (dim,), np.float32)
        self.action_space = spaces.Box(-high, high, dtype=np.float32)
        self.max_episode_steps, self.time, self.x = length, 0, np.zeros(dim, np.float32)

    def dynamics(self, x: Tensor, u: Tensor) -> Moved:
        """What follows an action, in the environment's units."""
        raise NotImplementedError

    def begin(self) -> np.ndarray:
        """A first state (d,), drawn from `self.np_random`."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.time = self.begin().astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        u = np.clip(np.asarray(action, np.float32), self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]
        with torch.no_grad():
            x, reward, continues = self.dynamics(torch.from_numpy(self.x)[None], torch.from_numpy(u)[None])
        self.x, self.time = x[0].numpy().copy(), self.time + 1
        return self.x.copy(), float(reward[0]), not bool(continues[0]), self.time >= self.max_episode_steps, {}
