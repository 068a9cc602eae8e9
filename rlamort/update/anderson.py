"""Anderson acceleration."""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.config import Count, Fraction, NonNegative
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update, push


class Anderson(Update):
    """Anderson acceleration of the oracle's map (Walker and Ni, 2011), with mixing.

    The least-squares problem is solved per item by its normal equations, with columns of unit length.

    Args:
        history: number of iterates that are combined; 1 is fixed-point iteration.
        beta: mixing parameter: 1 combines values of the map alone.
        ridge: added to the diagonal of the normal equations.
    """

    def __init__(self, history: Count = 5, beta: Fraction = 1.0, ridge: NonNegative = 1e-6) -> None:
        super().__init__()
        if history < 1:
            raise UserError(f"update.history: {history} given; at least 1 is needed")
        self.history, self.beta, self.ridge = history, beta, ridge

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        empty = y.new_zeros(len(y), self.history, y.shape[-1])
        return empty, empty, y.new_zeros(len(y), self.history)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        mapped = oracle.map(y)
        fresh = mapped - y, (1 - self.beta) * y + self.beta * mapped, torch.ones_like(y[:, 0])
        # (B, M, n) twice and (B, M), the newest last
        residuals, mixed, valid = (push(old, new) for old, new in zip(h, fresh, strict=True))
        columns = residuals.diff(dim=1) * valid[:, :-1, None]  # (B, M - 1, n)
        square = columns.square().sum(-1)
        known = square > 0
        scale = torch.where(known, square, 1).rsqrt()[..., None]
        unit = columns * scale
        normal = unit @ unit.mT + torch.diag_embed(torch.where(known, self.ridge, 1.0).to(y.dtype))
        weights = torch.linalg.solve_ex(normal, unit @ residuals[:, -1, :, None])[0] * scale  # (B, M - 1, 1)
        change = mixed.diff(dim=1) * valid[:, :-1, None]
        return mixed[:, -1] - (weights * change).sum(1), (residuals, mixed, valid)
