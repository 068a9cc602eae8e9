"""The projection onto a face, where the rows that hold with equality are known: a linear system, with all its derivatives.

p, y points (B, n) · E (k, n), A (m, n) unit rows, or with a leading B · mu (B, k), lam (B, m) multipliers: y = p - E'mu - A'lam
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlamort.domain.active import Block, Gram, times

REFINEMENTS = 2  # the second removes what rounding left of the residual


class Factor(NamedTuple):
    """What is computed once for fixed rows, and for each item where they come with it; float64, detached."""

    inverse: Tensor  # (n, k), the pseudo-inverse of E
    basis: Tensor  # (n, n - rank) of the null space of E, orthonormal; of each item, (B, n, n), 0 columns in place of the rest
    scale: Tensor  # (m,), the lengths of A's rows within that space, by which they are divided
    gram: Gram  # of those rows

    @classmethod
    def of(cls, E: Tensor, A: Tensor, tol: float) -> "Factor":
        """From unit rows; singular values below `tol` times the largest are 0. NaN items are computed as if they were 0."""
        E, A = E.detach().nan_to_num(0.0, 0.0, 0.0), A.detach().nan_to_num(0.0, 0.0, 0.0)
        inverse, basis = null_space(E, tol)
        within = A @ basis
        length = within.norm(dim=-1)
        length = length.where(length > tol, 0)  # E implies such a row, or contradicts it
        scale = torch.where(length > 0, length, 1.0)
        within = torch.where(length > 0, 1 / scale, 0.0)[..., None] * within
        matrix = within @ within.mT
        values, vectors = torch.linalg.eigh(matrix)
        return cls(inverse, basis, scale, Gram(within @ basis.mT, matrix, vectors, values.clamp(min=0)))

    def to(self, device: torch.device) -> "Factor":
        inverse, basis, scale = (part.to(device) for part in self[:3])
        return Factor(inverse, basis, scale, Gram(*(part.to(device) for part in self.gram)))

    def repeated(self, times: int) -> "Factor":
        """Of items that are repeated as a block; fixed rows are everybody's."""
        if self.scale.ndim == 1:
            return self
        parts = [part.repeat(times, *[1] * (part.ndim - 1)) for part in (*self[:3], *self.gram)]
        return Factor(parts[0], parts[1], parts[2], Gram(*parts[3:]))


def null_space(E: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """E (k, n) or (B, k, n) -> its pseudo-inverse (n, k), and an orthonormal basis of its null space, as in `Factor`."""
    k, n = E.shape[-2:]
    if not k:
        return E.new_zeros(*E.shape[:-2], n, 0), torch.eye(n, dtype=E.dtype, device=E.device).expand(*E.shape[:-2], n, n)
    left, values, right = torch.linalg.svd(E, full_matrices=True)  # (k, k), (min(k, n),), (n, n)
    kept = values > tol * values.amax(-1, keepdim=True)
    count = values.shape[-1]
    inverse = (right[..., :count, :].mT * torch.where(kept, 1 / values, 0.0)[..., None, :]) @ left[..., :count].mT
    spanned = nn.functional.pad(kept, (0, n - count))  # (n,): right singular vectors
    return inverse, right.mT[:, ~spanned] if E.ndim == 2 else right.mT * ~spanned[..., None, :]


class Face(torch.autograd.Function):
    """(p, b, d, E, A) -> (y, mu, lam): the point nearest to p where E y = b, and A y = d on the active rows.

    Its system is symmetric, so the derivative is the same map once more, and has derivatives of its own (implicit function
    theorem; Amos and Kolter, OptNet, 2017, eqs. 6 to 8). Dependent rows are met by the least-squares point.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, p: Tensor, b: Tensor, d: Tensor, E: Tensor, A: Tensor, active: Tensor, factor: Factor, block: Block | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if block is None and d.shape[-1]:
            block = Block.of(factor.gram, active)
        y, lam = p, torch.zeros_like(d)
        for _ in range(REFINEMENTS):
            y = y - times(times(y, E.mT) - b, factor.inverse.mT)
            if block is not None:
                step = block.solve(times(y, A.mT) - d)
                y, lam = y - times(step, factor.gram.rows), lam + step
        y = y - times(times(y, E.mT) - b, factor.inverse.mT)
        mu = times(p - y - times(lam, A), factor.inverse)
        ctx.save_for_backward(y, mu, lam, E, A, active)
        ctx.factor, ctx.block = factor, block
        return y, mu, lam

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        y, mu, lam, E, A, active = ctx.saved_tensors
        w, nu, kappa = face(slopes[0], slopes[1], slopes[2] * active, E, A, active, ctx.factor, ctx.block)
        kappa = kappa * active
        of_rows = [
            -_outer(first, w, rows) - _outer(second, y, rows) if needed else None
            for first, second, rows, needed in ((mu, nu, E, ctx.needs_input_grad[3]), (lam, kappa, A, ctx.needs_input_grad[4]))
        ]
        return w, nu, kappa, *of_rows, None, None, None


def face(
    p: Tensor, b: Tensor, d: Tensor, E: Tensor, A: Tensor, active: Tensor, factor: Factor, block: Block | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Face`: p (B, n), b (B, k), d (B, m), active (B, m) bool -> y (B, n), mu (B, k), lam (B, m).

    `A` is divided by `factor.scale`. `block` is G on the active rows, where it is known.
    """
    found: tuple[Tensor, Tensor, Tensor] = Face.apply(p, b, d, E, A, active, factor, block)  # type: ignore[no-untyped-call]
    return found


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """(B, i), (B, j) -> (B, i, j), summed over the items for rows that all share."""
    return left.mT @ right if like.ndim == 2 else left[:, :, None] * right[:, None]
