"""Noise of exploring actions from step to step. N environments side by side · n coordinates of an action"""

import torch
from torch import Tensor, nn

Carry = tuple[Tensor, ...]  # what is remembered of each environment


class FreshNoise(nn.Module):
    """A draw of its own at every step."""

    def start(self, count: int, dim: int, device: torch.device) -> Carry:
        """What is remembered of `count` environments where episodes begin."""
        return ()

    def forward(self, fresh: Tensor, h: Carry) -> tuple[Tensor, Carry]:
        """A new draw (N, n), and what is remembered -> the noise of this step (N, n), and what is remembered after it."""
        return fresh, h


class HeldNoise(nn.Module):
    """A draw that is held for k steps, P(k) proportional to k^-2 up to `longest` (Dabney, Ostrovski and Barreto, 2021).

    Args:
        longest: the largest k.
    """

    below: Tensor

    def __init__(self, longest: int = 16) -> None:
        super().__init__()
        weights = torch.arange(1, longest + 1, dtype=torch.float64) ** -2
        self.register_buffer("below", (weights.cumsum(0) / weights.sum())[:-1].float(), persistent=False)  # P(length <= k)

    def start(self, count: int, dim: int, device: torch.device) -> Carry:
        return torch.zeros(count, dim, device=device), torch.zeros(count, dtype=torch.int64, device=device)

    def forward(self, fresh: Tensor, h: Carry) -> tuple[Tensor, Carry]:
        held, left = h
        length = 1 + (torch.rand(len(fresh), 1, device=fresh.device) > self.below).sum(-1)
        over = left == 0
        noise = torch.where(over[:, None], fresh, held)
        return noise, (noise, torch.where(over, length, left) - 1)


NOISES: dict[str, type[FreshNoise] | type[HeldNoise]] = {"fresh": FreshNoise, "held": HeldNoise}
