"""Gradient descent that finds its step size by trial, at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.domain import Domain, nearest_each
from rlamort.objective import Oracle
from rlamort.update.base import Update
from rlamort.update.best import comparable

LENGTHS = tuple(2.0**-i for i in range(12))  # along the largest coordinate; the box is 2 wide


class LineSearch(Update):
    """Projected gradient descent with the best of several step sizes, or none, so that f never increases.

    The gradient is scaled by its largest coordinate, and the step size is chosen per item, so nothing has to be tuned to the
    scale of f. A step asks for one gradient, and for one value per length, all in one batch.

    Args:
        domain: Y.
        lengths: of a step before projection, along its largest coordinate.
    """

    def __init__(self, domain: Domain, lengths: Sequence[float] = LENGTHS) -> None:
        super().__init__()
        self.domain, self.lengths = domain, tuple(lengths)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return (oracle.value(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        slope = oracle.grad(y)
        slope = slope / slope.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
        lengths = y.new_tensor(self.lengths)[:, None, None]
        tried = torch.cat([y[None], nearest_each(self.domain, x, y - lengths * slope)])  # (L + 1, B, n)
        lowest = comparable(oracle.values(tried)).min(0)
        return tried.gather(0, lowest.indices[None, :, None].expand(1, -1, y.shape[-1]))[0], (lowest.values,)

    def value(self, y: Tensor, h: Carry, oracle: Oracle) -> Tensor:
        return h[0]
