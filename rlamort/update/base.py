"""The contract of a solver's step."""

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.domain import Domain
from rlamort.objective import Oracle


class Update(nn.Module):
    """(y, h) -> (y, h), by queries to an oracle of f(.; x). The result may lie outside Y; `Unroll` projects it."""

    def start(self, y: Tensor, x: Tensor) -> Carry:
        """The carry h before the first step from y (B, n)."""
        return ()

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        """One step."""
        raise NotImplementedError


def within(domain: Domain, ys: Tensor) -> Tensor:
    """ys (S, B, n) -> their Euclidean projections onto Y."""
    return domain.nearest(ys.flatten(0, 1)).view_as(ys)


def push(history: Tensor, new: Tensor) -> Tensor:
    """history (B, M, ...), oldest first, without its oldest entry and with new (B, ...) appended."""
    return torch.cat([history[:, 1:], new[:, None]], dim=1)
