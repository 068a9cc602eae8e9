"""X with dynamics: what an agent acts in. B rows, one environment each · d = x_dim · n = dim of an action"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlamort.domain import Box, unit_box
from rlamort.problem import Problem


class Step(NamedTuple):
    """What B environments answered. Numbers on the training device; flags on the host, where the loop decides by them."""

    x_next: Tensor  # (B, d) the true successor, also where the episode ended
    reward: Tensor  # (B,)
    terminated: np.ndarray  # (B,) bool: the task ended, the future is worth nothing
    truncated: np.ndarray  # (B,) bool: only the clock ran out, the future has a value
    valid: np.ndarray  # (B,) bool: False where the row was merely reset (NEXT_STEP autoreset): no transition


class Episode(NamedTuple):
    """One finished episode: undiscounted return, and length in steps."""

    total: float
    length: int


class Spec(NamedTuple):
    """What an agent must know of an environment: the size of x, and the action box in the environment's units."""

    x_dim: int
    low: list[float]
    high: list[float]
    problem: Problem | None = None  # the known objective behind it, where it has one

    def facts(self) -> dict[str, Any]:
        """What can be written of it; of a problem, its name."""
        named = {} if self.problem is None else {"problem": type(self.problem).__name__}
        return {"x_dim": self.x_dim, "low": self.low, "high": self.high, **named}


class Env:
    """`count` environments side by side. Actions are in [-1, 1]^n; a row whose episode ended starts the next by itself.

    Attributes:
        name: for messages and records.
        count: B.
        x: (B, d), the contexts to act on now.
        domain: [-1, 1]^n.
        box: the same actions in the environment's units.
    """

    name: str
    count: int
    x: Tensor

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.box = Box(spec.low, spec.high).to(device)
        self.domain = unit_box(len(spec.low)).to(device)

    def reset(self, seed: int) -> Tensor:
        """Start every row anew, row i from seed + i, and give x (B, d)."""
        raise NotImplementedError

    def step(self, y: Tensor) -> Step:
        """Play y (B, n) in [-1, 1]^n."""
        raise NotImplementedError

    def episodes(self) -> list[Episode]:
        """The episodes that ended since this was last asked."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain values, arrays and tensors."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on where `state` was taken; False where only new episodes could be begun."""
        raise NotImplementedError

    def held_out(self) -> "Env":
        """Itself, or its like over contexts that training never meets, where there are such: what evaluations are played in."""
        return self

    def close(self) -> None:
        """Give back what the environments hold."""
