"""Gradient descent, with step sizes that are fixed or learned."""

import math

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.config import Count, Fraction, Positive
from rlamort.objective import Oracle
from rlamort.update.base import Update


class Fixed(nn.Module):
    """A constant step size.

    Args:
        rate: step size.
    """

    def __init__(self, rate: Positive) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor, k: Tensor) -> Tensor:
        """Steps k (B,) at y (B, n) -> step sizes that multiply a gradient (B, n)."""
        return torch.full_like(y[..., :1], self.rate)


class Learned(nn.Module):
    """A learned step size for each coordinate and step, stored as its logarithm (Li et al., 2017: Meta-SGD).

    Args:
        rate: initial step sizes.
        dim: n.
        steps: steps with their own step sizes; later ones use the last.
    """

    def __init__(self, rate: Positive, dim: Count, steps: Count = 1) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((steps, dim), math.log(rate)))

    def forward(self, y: Tensor, k: Tensor) -> Tensor:
        """Steps k (B,) at y (B, n) -> step sizes (B, n)."""
        return self.log[k.clamp(max=len(self.log) - 1)].exp()


class Gradient(Update):
    """Gradient descent, y - rate * m with m = momentum * m + grad f(y; x), per item.

    Args:
        rate: step size: a number, `Fixed`, or `Learned`.
        momentum: heavy-ball momentum (Polyak, 1964).
        clip: largest gradient norm per item; larger gradients are scaled down to it.
    """

    def __init__(self, rate: Positive | nn.Module, momentum: Fraction = 0.0, clip: Positive = math.inf) -> None:
        super().__init__()
        self.rate = rate if isinstance(rate, nn.Module) else Fixed(rate)
        self.momentum, self.clip = momentum, clip

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return torch.zeros_like(y), torch.zeros(len(y), dtype=torch.long, device=y.device)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        velocity, k = h
        slope = oracle.grad(y)
        norm = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
        long = norm > self.clip
        slope = slope * torch.where(long, self.clip / torch.where(long, norm, 1), 1)
        velocity = self.momentum * velocity + slope
        return y - self.rate(y, k) * velocity, (velocity, k + 1)
