"""Certificates and references of problems with constraints h(y; x) = 0 and g(y; x) <= 0.

x contexts as vectors (B, d) · y solution (B, n) · h equalities (B, m) · g inequalities (B, k)
"""

import torch
from torch import Tensor

from rlamort.constraints import Constraints, Multipliers
from rlamort.domain import Domain, within
from rlamort.objective import Cost, Objective
from rlamort.problem import Problem
from rlamort.solve.certificate import Certificate, Tolerance
from rlamort.solve.classical import STARTS, Field, Reference, starting
from rlamort.solve.lagrangian import Constrained, augmented_lagrangian, kkt

LABEL = "augmented Lagrangian"
FEASIBLE = {torch.float64: 1e-6, torch.float32: 1e-5}  # violation, in the rows' own units, of a solution of that dtype
NEAR = 1e-3  # distance to an inequality's bound, in rows of unit gradients, below which it may have a multiplier


class UnderConstraints(Certificate):
    """Another certificate, of feasible solutions alone; without one, the KKT residual.

    That is the largest entry of |y - P(y - grad L(y))|, of |min(-g, mu)| and of the violation, with the Lagrangian L and the
    projection P onto Y. Any multipliers give a bound; those of a prediction are a least-squares estimate.

    Args:
        inner: the other certificate, in whose unit the bound is; None for the KKT residual.
        f: the cost.
        constraints: h and g.
        domain: Y.
        rounded: the dtype that solutions are rounded to; None if it is theirs.
    """

    def __init__(
        self,
        inner: Certificate | None,
        f: Objective,
        constraints: Constraints,
        domain: Domain,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.inner, self.f, self.constraints, self.domain, self.rounded = inner, f, constraints, domain, rounded
        self.kind = "KKT residual" if inner is None else inner.kind

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        if self.inner is None:
            found = self._residual(y, x, estimated(self.f, self.constraints, y, x))
        else:
            found = self.inner.bound(y, x, rounded)
        inside = feasible(self.constraints, self.domain, y, x, rounded)
        return found.masked_fill(~inside | found.isnan(), torch.inf)

    def improve(
        self, f: Objective, domain: Domain, x: Tensor, y: Tensor, tol: Tolerance, iterations: int, solution: Field
    ) -> tuple[Tensor, Tensor]:
        found = solved(self.f, self.constraints, domain, x, y)
        if self.inner is not None:
            return found.y, self.bound(found.y, x)
        y = found.y if self.rounded is None else found.y.to(self.rounded).to(x)  # with the multipliers, which nobody keeps
        residual = self._residual(y, x, found.multipliers)
        return y, residual.masked_fill(~feasible(self.constraints, domain, y, x, self.rounded), torch.inf)

    def _residual(self, y: Tensor, x: Tensor, multipliers: Multipliers) -> Tensor:
        parts = kkt(self.f, self.constraints, self.domain, y, x, multipliers)
        return torch.stack([*parts, self.constraints.violation(y, x)]).amax(0)


def feasible(constraints: Constraints, domain: Domain, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """(B,) bool: y (B, n) is in Y, and within `FEASIBLE` of its constraints; `rounded` as in `within`."""
    allowed = FEASIBLE.get(rounded or y.dtype, FEASIBLE[torch.float32])
    return within(domain.at(x), y, rounded) & (constraints.violation(y.nan_to_num(0.0, 0.0, 0.0), x) <= allowed)


def solved(f: Objective, constraints: Constraints, domain: Domain, x: Tensor, y: Tensor, starts: int = STARTS) -> Constrained:
    """The best found from y (B, n) and from `starts` fixed points of Y."""
    fixed = starting(domain, starts, x)
    first = domain.at(x).nearest(y.nan_to_num(0.0, 0.0, 0.0))[None]
    return augmented_lagrangian(f, constraints, domain, x, torch.cat([first, fixed]))


def reference(problem: Problem, constraints: Constraints, x: Tensor, starts: int, extra: Tensor | None) -> Reference:
    """Solutions that meet the constraints, NaN of items for which none was found, and how many these are."""
    y = problem.domain.at(x).project(x.new_zeros(len(x), problem.domain.inputs)) if extra is None else extra.to(x)
    found = solved(Cost(problem), constraints, problem.domain, x, y, starts)
    lost = [status for status in found.status if status != "solved"]
    messages = tuple(f"{LABEL}: {status}" for status in dict.fromkeys(lost))[:3]
    missing = found.cost.isnan()
    return Reference(found.y.masked_fill(missing[:, None], torch.nan), found.cost, LABEL, 1 - len(lost) / len(x), messages)


def estimated(f: Objective, constraints: Constraints, y: Tensor, x: Tensor) -> Multipliers:
    """Least-squares multipliers at y (B, n) of equalities and of inequalities near their bound, of which none is negative."""
    m, _ = constraints.sizes
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        rows = torch.cat(constraints(at, x), -1)
        (slope,) = torch.autograd.grad(f(at, x).sum(), at)
        columns = [
            torch.autograd.grad(row, at, retain_graph=True, allow_unused=True, materialize_grads=True)[0] for row in rows.sum(0)
        ]
    jacobian = torch.stack(columns, 1) if columns else y.new_zeros(len(y), 0, y.shape[-1])  # (B, m + k, n)
    length = jacobian.norm(dim=-1).clamp_min(torch.finfo(y.dtype).tiny)
    active = torch.cat([torch.ones_like(rows[:, :m]), (rows[:, m:] > -NEAR * length[:, m:]).to(y)], -1).detach()
    for _ in range(2):  # those that come out negative are left out of the second
        unit = jacobian / length[..., None] * active[..., None]
        gram = unit @ unit.mT + torch.diag_embed(1e-10 + 1 - active)
        found = torch.linalg.solve(gram, -(unit @ slope[..., None]))[..., 0] * active / length
        active = torch.cat([active[:, :m], active[:, m:] * (found[:, m:] > 0)], -1)
    return Multipliers(found[:, :m], found[:, m:].clamp_min(0), torch.ones_like(found))
