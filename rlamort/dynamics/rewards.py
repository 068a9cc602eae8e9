"""Rewards and ends that are known beside learned transitions. x context (B, d) · y action (B, n) in [-1, 1]^n · w = (x, y)"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlamort.dynamics.base import Known
from rlamort.dynamics.moments import saturated

Rewards = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, d), y (B, n), x_next (B, d) -> the reward (B,)
Ends = Callable[[Tensor, Tensor, Tensor], Tensor]  # likewise -> 0 where the task ends there, else 1 (B,)


class Paid(nn.Module):
    """The reward of known equations, without where they lead.

    Args:
        known: the equations.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known

    def forward(self, x: Tensor, y: Tensor, x_next: Tensor) -> Tensor:
        reward: Tensor = self.known(x, y).reward
        return reward


class GoesOn(Paid):
    """Whether a task goes on by known equations, without where they lead."""

    def forward(self, x: Tensor, y: Tensor, x_next: Tensor) -> Tensor:
        continues: Tensor = self.known(x, y).continues
        return continues


class Saturating:
    """exp(-sum_i weights_i (x_i - target_i)^2 / 2) - 1, minus the saturating cost of Deisenroth and Rasmussen (2011, eq. 25).

    Far from the target it is flat, so that a model does not chase what it cannot reach; there a wide belief raises it, which
    makes uncertain states worth a visit.

    Args:
        target: (d,).
        weights: (d,), inverse squares of widths; 0 where a coordinate does not count.
    """

    def __init__(self, target: Sequence[float], weights: Sequence[float]) -> None:
        self.target, self.weights = (torch.tensor(part, dtype=torch.float64) for part in (list(target), list(weights)))

    def __call__(self, x: Tensor, y: Tensor, x_next: Tensor) -> Tensor:
        return torch.expm1(-0.5 * ((x - self.target.to(x)).square() * self.weights.to(x)).sum(-1))

    def expected(self, mean: Tensor, cov: Tensor) -> Tensor:
        """Its mean, 0-d, where w = (x, y) is normal with this mean (d + n,) and cov."""
        d = len(self.target)
        return saturated(mean[:d], cov[:d, :d], self.target.to(mean), self.weights.to(mean)) - 1
