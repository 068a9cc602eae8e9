"""Certificates and references of problems with constraints h(y; x) = 0 and g(y; x) <= 0.

x contexts as vectors (B, d) · y solution (B, n) · h equalities (B, m) · g inequalities (B, k)
"""

import torch
from torch import Tensor

from rlamort.constraints import Constraints, Multipliers
from rlamort.domain import Domain, slack, within
from rlamort.objective import Cost, Objective
from rlamort.problem import Problem
from rlamort.solve.certificate import Aim, Certificate, Improved
from rlamort.solve.classical import CHUNK, STARTS, Reference, answers, solution_of, starting
from rlamort.solve.lagrangian import SOLVED, Constrained, augmented_lagrangian, kkt
from rlamort.solve.precision import widened

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
    """

    def __init__(self, inner: Certificate | None, f: Objective, constraints: Constraints, domain: Domain) -> None:
        self.inner, self.f, self.constraints, self.domain = inner, f, constraints, domain
        self.kind = "KKT residual" if inner is None else inner.kind

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        return self._bound(y, x, rounded, None)

    def improve(self, f: Objective, domain: Domain, x: Tensor, y: Tensor, aim: Aim) -> Improved:
        found = solved(self.f, self.constraints, domain, x, y)
        reached = self._bound(found.y, x, None, found.multipliers)  # which nobody keeps
        return Improved(found.y, reached, self._bound(found.y.to(aim.dtype).to(found.y), x, aim.dtype, found.multipliers))

    def _bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None, multipliers: Multipliers | None) -> Tensor:
        """`bound`, with estimated multipliers where none are given."""
        if self.inner is None:
            multipliers = estimated(self.f, self.constraints, y, x) if multipliers is None else multipliers
            found = self._residual(y, x, multipliers)
        else:
            found = self.inner.bound(y, x, rounded)
        inside = feasible(self.constraints, self.domain, y, x, rounded)
        return found.masked_fill(~inside | found.isnan(), torch.inf)

    def _residual(self, y: Tensor, x: Tensor, multipliers: Multipliers) -> Tensor:
        parts = kkt(self.f, self.constraints, self.domain, y, x, multipliers)
        return torch.stack([*parts, self.constraints.violation(y, x)]).amax(0)


def feasible(constraints: Constraints, domain: Domain, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """(B,) bool: y (B, n) is in Y, and within `FEASIBLE` of its constraints, or as near as rounding lets it be.

    Rounding y moves a row in proportion to its gradient, so that of a steep one no point in float32 may be within 1e-5.
    `rounded` as in `within`.
    """
    dtype = rounded or y.dtype
    least = y.new_full((len(y),), FEASIBLE.get(dtype, FEASIBLE[torch.float32]))
    return within(domain.at(x), y, rounded) & _held(constraints, y, x, least, torch.finfo(dtype).eps * y.norm(dim=-1))


def met(constraints: Constraints, y: Tensor, x: Tensor) -> Tensor:
    """(B,) bool: y (B, n) meets its constraints to the rounding that `within` excuses, as is asked of what users give."""
    return _held(constraints, y, x, slack(y), slack(y))


def _held(constraints: Constraints, y: Tensor, x: Tensor, least: Tensor, moved: Tensor) -> Tensor:
    """(B,) bool: y (B, n) violates no row by more than `least` (B,), or than a step of length `moved` (B,) changes it."""
    at = y.detach().nan_to_num(0.0, 0.0, 0.0)
    good = constraints.violation(at, x).detach() <= least
    for items in torch.split((~good).nonzero()[:, 0], CHUNK):  # of the others no gradient is needed
        with torch.enable_grad():
            some = at[items].requires_grad_()
            h, g = constraints(some, x[items])
            length = _jacobian(torch.cat([h, g], -1), some).norm(dim=-1)  # (B, m + k)
        steep = moved[items, None] * length.nan_to_num(0.0, 0.0)  # where it is infinite it says nothing
        good[items] = (torch.cat([h.abs(), g], -1).detach() <= torch.maximum(least[items, None], steep)).all(-1)
    return good


def _jacobian(rows: Tensor, y: Tensor) -> Tensor:
    """Of rows (B, r) by y (B, n) that they were computed of -> (B, r, n); 0 of rows that do not depend on it."""
    columns = [
        torch.autograd.grad(row, y, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for row in (rows.sum(0) if rows.requires_grad else ())
    ]
    return torch.stack(columns, 1) if columns else y.new_zeros(len(y), rows.shape[1], y.shape[-1])


def solved(f: Objective, constraints: Constraints, domain: Domain, x: Tensor, y: Tensor, starts: int = STARTS) -> Constrained:
    """The best found from y (B, n) and from `starts` fixed points of Y."""
    fixed = starting(domain, starts, x)
    first = domain.at(x).nearest(y.nan_to_num(0.0, 0.0, 0.0))[None]
    return augmented_lagrangian(f, constraints, domain, x, torch.cat([first, fixed]))


@torch.no_grad()
def reference(
    problem: Problem, constraints: Constraints, x: Tensor, starts: int = STARTS, extra: Tensor | None = None
) -> Reference:
    """The problem's own solution of each item where it is feasible, else what the augmented-Lagrangian method finds.

    It searches in float64, where the problem computes in it. Items for which nothing is found are NaN.

    Args:
        problem: the user's.
        constraints: of the problem.
        x: contexts (B, d).
        starts: S.
        extra: further starts (B, n), such as predictions.
    """
    wide = widened(problem, x.new_empty(len(x), problem.domain.dim), x)
    rows = x if wide is problem else x.double()
    f, domain, held = Cost(wide), wide.domain, Constraints(wide, constraints.sizes)
    y, cost = rows.new_full((len(x), domain.dim), torch.nan), rows.new_full((len(x),), torch.nan)
    name, messages = f"{type(problem).__name__}.solution", dict[str, None]()
    known = answers(solution_of(problem), x, domain.dim, name, messages)
    if known is not None:
        y = known.to(rows, copy=True)
        good = feasible(held, domain, y, rows, x.dtype)
        cost = f(y, rows).where(good, torch.nan)
        if off := int((y.isfinite().all(-1) & ~good).sum()):
            messages[f"{name}: {off} of {len(x)} points violate the constraints, or lie outside Y, and are excluded"] = None
    missing = (~cost.isfinite()).nonzero()[:, 0]
    lost: list[str] = []
    for items in torch.split(missing, CHUNK) if len(missing) else ():
        at = rows[items]
        first = domain.at(at).project(at.new_zeros(len(at), domain.inputs)) if extra is None else extra[items].to(at)
        found = solved(f, held, domain, at, first, starts)
        y[items], cost[items] = found.y.masked_fill(found.cost.isnan()[:, None], torch.nan), found.cost
        lost += [status for status in found.status if status != SOLVED]
    messages |= {f"{LABEL}: {status}": None for status in list(dict.fromkeys(lost))[:3]}
    sources = ["solution"] if len(missing) < len(x) else [LABEL]
    if 0 < len(missing) < len(x):
        sources.append(f"{LABEL} for {len(missing)} of {len(x)}")
    return Reference(y.to(x), cost.to(x), "; ".join(sources), 1 - len(lost) / len(x), tuple(messages))


def estimated(f: Objective, constraints: Constraints, y: Tensor, x: Tensor) -> Multipliers:
    """Least-squares multipliers at y (B, n) of equalities and of inequalities near their bound, of which none is negative."""
    m, _ = constraints.sizes
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        rows = torch.cat(constraints(at, x), -1)
        (slope,) = torch.autograd.grad(f(at, x).sum(), at)
        jacobian = _jacobian(rows, at)  # (B, m + k, n)
    length = jacobian.norm(dim=-1).clamp_min(torch.finfo(y.dtype).tiny)
    active = torch.cat([torch.ones_like(rows[:, :m]), (rows[:, m:] > -NEAR * length[:, m:]).to(y)], -1).detach()
    for _ in range(2):  # those that come out negative are left out of the second
        unit = jacobian / length[..., None] * active[..., None]
        gram = unit @ unit.mT + torch.diag_embed(1e-10 + 1 - active)
        found = torch.linalg.solve(gram, -(unit @ slope[..., None]))[..., 0] * active / length
        active = torch.cat([active[:, :m], active[:, m:] * (found[:, m:] > 0)], -1)
    return Multipliers(found[:, :m], found[:, m:].clamp_min(0), torch.ones_like(found))
