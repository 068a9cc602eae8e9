"""What a solver's step is."""

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.domain import Domain
from rlamort.objective import Oracle


class Update(nn.Module):
    """(y, h) -> (y, h), on what an oracle tells of f(.; x). The result may lie outside Y; `Unroll` takes it back."""

    def start(self, y: Tensor, x: Tensor) -> Carry:
        """The carry h before the first step from y (B, n)."""
        return ()

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        """One step."""
        raise NotImplementedError


def within(domain: Domain, ys: Tensor) -> Tensor:
    """ys (S, B, n) -> the points of Y nearest to them."""
    return domain.nearest(ys.flatten(0, 1)).view_as(ys)


def push(history: Tensor, new: Tensor) -> Tensor:
    """history (B, M, ...), oldest first, with new (B, ...) in the place of the oldest."""
    return torch.cat([history[:, 1:], new[:, None]], dim=1)
