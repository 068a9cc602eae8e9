"""The best iterate so far, per item."""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.domain import Domain, within
from rlamort.objective import Oracle
from rlamort.update.base import Update


class BestSoFar(Update):
    """An update whose iterate is, per item, the cheapest so far of those of another update and of the start.

    So no iterate is above the one before. An iterate whose cost is not finite, or which lies outside Y, is never taken; of
    equal costs the later is. The other update continues from its own iterate, which is in the carry. Its cost is asked from
    `Update.value`, so it takes no further evaluation of f where the update knows it. f must be deterministic.

    Args:
        update: the other update; its iterates are not projected, see `Projected`.
        domain: Y.
    """

    def __init__(self, update: Update, domain: Domain) -> None:
        super().__init__()
        self.update, self.domain = update, domain

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """The other update's iterate y (B, n), the lowest cost (B,), and the other's carry."""
        h = self.update.start(y, x, oracle)
        return y, self._cost(y, h, x, oracle), *h

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        at, lowest, *rest = h
        at, carry = self.update(at, tuple(rest), x, oracle)
        cost = self._cost(at, carry, x, oracle)
        better = cost.isfinite() & (cost <= lowest)
        return at.where(better[:, None], y), (at, torch.where(better, cost, lowest), *carry)

    def value(self, y: Tensor, h: Carry, oracle: Oracle) -> Tensor:
        return h[1]

    @torch.no_grad()
    def _cost(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> Tensor:
        return comparable(self.update.value(y, h, oracle)).where(within(self.domain.at(x), y), torch.inf)


def comparable(costs: Tensor) -> Tensor:
    """Costs, infinite where they are not finite, so that these are never the lowest."""
    return costs.where(costs.isfinite(), torch.inf)


def best_so_far(path: Tensor, oracle: Oracle) -> Tensor:
    """Iterates in Y (K + 1, B, n), oldest first -> per item the cheapest so far at every step, as `BestSoFar` keeps it.

    For a path that is there already: its costs are one batch, and each iterate keeps the derivative that an adjoint gave it.
    """
    with torch.no_grad():
        best = comparable(oracle.values(path)).cummin(0).indices  # (K + 1, B), the later of equal ones
    return path.gather(0, best[..., None].expand_as(path))
