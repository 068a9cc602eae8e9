"""Convex quadratic programs, solved exactly: min y'Q y / 2 + q'y over a polyhedron, as a projection in the metric of Q.

x contexts as vectors (B, d) · y solution (B, n) · Q (n, n), or (B, n, n) where it depends on x · q (B, n)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlamort.domain import Domain, PerItem, Rows, within
from rlamort.objective import Objective, Oracle
from rlamort.solve.classical import FAILURES

LARGEST = 300  # n up to which the gradient is asked n times for Q
SAME = 1e-9  # relative difference below which gradients are affine, and Q the same for all items
SOLVED = 1e-8  # KKT residual of a solution, relative to the gradient
SINGULAR = 1e-9  # relative eigenvalue of Q below which a proximal term is added
PROXIMAL = 1e-3  # its weight, relative to Q's largest eigenvalue
STEPS = 100  # proximal steps at most


class Quadratic(NamedTuple):
    """A quadratic cost, but for a constant."""

    Q: Tensor
    q: Tensor


@torch.no_grad()
def exactly(f: Objective, domain: Domain, x: Tensor) -> Tensor | None:
    """Solutions (B, n) of convex quadratic programs; None where f or C(x) is of another kind, for these contexts as a whole.

    NaN for items that are not convex, or whose result is not a feasible point with a KKT residual of 0 to rounding: those whose
    set is empty, or on which f only looked quadratic.

    Args:
        f: the cost.
        domain: Y.
        x: contexts (B, d) in float64.
    """
    at = domain.at(x)
    if at.polyhedral() is None:
        return None
    try:
        program = quadratic(f, x, domain.dim)
        y = None if program is None else minimise(program, at)
        if y is None:
            return None
        y = at.nearest(y)  # which the change of coordinates has left by a rounding
        slope = Oracle(f, x).first_order().grad(y)
    except FAILURES:  # a cost without a gradient, or one that is not defined on all of R^n
        return None
    residual = (y - at.nearest(y - slope)).norm(dim=-1)
    return y.where(((residual <= SOLVED * (1 + slope.norm(dim=-1))) & within(at, y))[:, None], torch.nan)


def possible(domain: Domain, x: Tensor) -> bool:
    """Whether a cost over C(x), for contexts x (B, d) of any dtype, may be solved so at all."""
    return domain.dim <= LARGEST and domain.at(x).polyhedral() is not None


@torch.no_grad()
def quadratic(f: Objective, x: Tensor, dim: int) -> Quadratic | None:
    """The cost as a quadratic function of y, from its gradients at dim + 1 points; None if others show that it is none.

    Args:
        f: the cost, finite and differentiable on all of R^dim.
        x: contexts (B, d) in float64.
        dim: n.
    """
    if dim > LARGEST or x.dtype is not torch.float64:
        return None
    oracle, zero = Oracle(f, x).first_order(), x.new_zeros(len(x), dim)
    q = oracle.grad(zero)
    unit = torch.eye(dim).to(x)
    Q = torch.stack([oracle.grad(zero + e) - q for e in unit], dim=-1)
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 30.0):
        y = scale * torch.randn(dim, generator=generator, dtype=torch.float64).to(x).expand_as(zero)
        slope, affine = oracle.grad(y), (Q @ y[..., None])[..., 0] + q
        size = (Q.abs() @ y.abs()[..., None])[..., 0] + q.abs()
        if not bool(((slope - affine).abs() <= SAME * size.amax(-1, keepdim=True)).all()):
            return None
    shared = bool(((Q - Q[:1]).abs() <= SAME * Q.abs().amax()).all())
    return Quadratic(Q[0] if shared else Q, q)


@torch.no_grad()
def minimise(program: Quadratic, domain: Domain) -> Tensor | None:
    """The solution (B, n), NaN where an item's Q is not positive semidefinite; None unless Y is a polyhedron.

    With Q = L L' and z = L'y it is the projection of -L^-1 q onto the polyhedron in z. Where Q is singular, proximal steps
    (Rockafellar, 1976), min y'Q y / 2 + q'y + delta / 2 |y - y_k|^2, have the same form, and converge to a solution.

    Args:
        program: the cost.
        domain: C(x), of the same items.
    """
    data = domain.polyhedral()
    if data is None:
        return None
    data = {name: part.to(program.q) for name, part in data.items()}
    Q, q = (program.Q + program.Q.mT) / 2, program.q
    values = torch.linalg.eigvalsh(Q)
    most = values[..., -1:].where(values[..., -1:] > 0, 1.0)
    definite = values[..., 0] >= -SINGULAR * most[..., 0]
    singular = values[..., :1] < SINGULAR * most
    delta = torch.where(singular, PROXIMAL * most, 0.0)  # (1,) or (B, 1)
    inverse = torch.linalg.inv(torch.linalg.cholesky_ex(Q + torch.diag_embed(delta.expand(*Q.shape[:-1])))[0])  # L^-1
    rows = _rows(data, inverse, len(q))
    y = torch.zeros_like(q)
    for _ in range(STEPS if bool(singular.any()) else 1):
        target = -(inverse @ (q - delta * y)[..., None])[..., 0]
        after = (inverse.mT @ rows.nearest(target[None])[0][..., None])[..., 0]
        moved = ((after - y).abs().amax(-1) > 1e-14 * after.abs().amax(-1).clamp_min(1)).any()
        y = after
        if not bool(moved):
            break
    return y.where(definite.expand(len(q))[:, None], torch.nan)


def _rows(data: dict[str, Tensor], inverse: Tensor, count: int) -> Rows:
    """{z : y = L^-T z is in the polyhedron}."""
    rows = {name: data[name] @ inverse.mT for name in ("E", "A")}
    rows |= {name: data[name].expand(count, -1) for name in ("b", "low", "high")}
    if max(rows["E"].ndim, rows["A"].ndim) == 3:  # then both are of items
        rows |= {name: rows[name].expand(count, *rows[name].shape[-2:]) for name in ("E", "A")}
    own = {name: part for name, part in rows.items() if part.ndim == (3 if name in ("E", "A") else 2)}
    full = {name: part for name, part in own.items() if part.numel()}  # of no rows there is nothing to bind
    declared: dict[str, Tensor | PerItem] = {name: part[0] if name in own else part for name, part in rows.items()}
    declared |= {name: PerItem(*part.shape[1:]) for name, part in full.items()}
    return Rows(declared, max(data["A"].shape[-2:]) * torch.finfo(inverse.dtype).eps).bind(full)
