"""The contract of a solver's step."""

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.domain import Domain
from rlamort.objective import Oracle


class Update(nn.Module):
    """(y, h) -> (y, h), by queries to an oracle of f(.; x). The result may lie outside Y; `Unroll` projects it.

    Attributes:
        keeps: points k, beside the last iterate, from which it goes on in a next problem that is like this one.
    """

    keeps = 0

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """The carry h before the first step from y (B, n)."""
        return ()

    def resume(self, y: Tensor, kept: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """As `start`, with points (B, k, n) that were kept of another problem."""
        return self.start(y, x, oracle)

    def kept(self, y: Tensor, h: Carry) -> Tensor:
        """The points (B, k, n) to go on from in a next problem."""
        return y[:, None][:, :0]

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        """One step."""
        raise NotImplementedError

    def value(self, y: Tensor, h: Carry, oracle: Oracle) -> Tensor:
        """f(y; x) (B,) at an iterate y with its carry h: from h where the update knows it, else by asking the oracle."""
        return oracle.value(y)


class Projected(Update):
    """Another update, of which each step is projected onto Y.

    Args:
        update: the other update.
        domain: Y.
    """

    def __init__(self, update: Update, domain: Domain) -> None:
        super().__init__()
        self.update, self.domain = update, domain

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return self.update.start(y, x, oracle)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        y, h = self.update(y, h, x, oracle)
        return self.domain.at(x).nearest(y), h


def push(history: Tensor, new: Tensor) -> Tensor:
    """history (B, M, ...), oldest first, without its oldest entry and with new (B, ...) appended."""
    return torch.cat([history[:, 1:], new[:, None]], dim=1)
