"""Certificates of solutions without a known optimum, and solving until a certificate is small enough.

y (B, n) · x (B, d) · f cost (B,) · bound (B,) >= 0
"""

import contextlib
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlamort.domain import Domain, within
from rlamort.errors import UserError
from rlamort.objective import Objective, Oracle
from rlamort.problem import Problem
from rlamort.solve.classical import CHECK_EVERY, FAILURES, Field, best_found, descent, placed, said, subject
from rlamort.solve.quadratic import exactly

STEPS = (1e-1, 1e-3, 1e-5)  # of the projections in a duality gap, relative to |y| over the slope's largest entry


class Tolerance(NamedTuple):
    """What a certificate must reach: `absolute`, or `relative` times |f| of the item, whichever is larger."""

    absolute: float = 0.0
    relative: float = 0.0

    def of(self, f: Objective, y: Tensor, x: Tensor) -> Tensor:
        """Its value for y (B, n), (B,) in the unit of the certificate."""
        if not self.relative:
            return y.new_full((len(y),), self.absolute)
        return (self.relative * f(y, x).abs()).nan_to_num(0.0, 0.0).clamp_min(self.absolute)

    def tighter(self, share: float) -> Self:
        """A share of it."""
        return self._replace(absolute=share * self.absolute, relative=share * self.relative)

    def __str__(self) -> str:
        named = {"tol": self.absolute, "rtol": self.relative}
        return ", ".join(f"{name}={value:g}" for name, value in named.items() if value)


class Aim(NamedTuple):
    """What solving again is to reach, and with what."""

    tolerance: Tolerance  # of the bound
    iterations: int  # at most
    solution: Field  # the problem's own, if it has one
    dtype: torch.dtype  # that solutions are rounded to


class Improved(NamedTuple):
    """Solutions that were improved, with their certificates."""

    y: Tensor  # (B, n)
    reached: Tensor  # (B,) their bound
    rounded: Tensor  # (B,) that of y rounded, as it is returned


class Certificate:
    """A bound on the suboptimality of a solution, without a known optimum.

    Attributes:
        kind: the meaning of the bound, for users.
    """

    kind: str

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        """y (B, n), x (B, d) -> (B,) >= 0; inf without a bound, as for y outside Y.

        `rounded` is the dtype that y was rounded to, where it is not y's: what may be missing to feasibility.
        """
        raise NotImplementedError

    def improve(self, f: Objective, domain: Domain, x: Tensor, y: Tensor, aim: Aim) -> Improved:
        """Solve from y (B, n) for contexts x (B, d)."""
        y, reached = solve_from(f, domain, x, y, aim.tolerance, self, aim.iterations, aim.solution)
        return Improved(y, reached, self.bound(y.to(aim.dtype).to(y), x, aim.dtype))


class Residual(Certificate):
    """The problem's own residual, in the unit that the problem defines, also for tolerances.

    Args:
        problem: its class defines `residual`.
        domain: Y.
    """

    kind = "residual"

    def __init__(self, problem: Problem, domain: Domain) -> None:
        self.problem, self.domain = problem, domain

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        residual = self.problem.residual(y, self.problem.layout.unpack(x))
        if not isinstance(residual, Tensor) or residual.shape != y.shape[:1]:
            shape = f"shape {tuple(residual.shape)}" if isinstance(residual, Tensor) else f"a {type(residual).__name__}"
            given = "None" if residual is None else shape
            raise UserError(
                f"{type(self.problem).__name__}.residual: {given} is returned; one number per item, ({len(y)},), is needed"
            )
        return _claimed(residual.to(y.dtype), y, self.domain.at(x), rounded)


class DualityGap(Certificate):
    """max_{s in Y} <grad f(y), y - s> >= f(y) - min f, for convex f and bounded convex Y (Jaggi, 2013, eq. 2).

    Where the domain knows a box around Y, the maximum is bounded by projections alone. Let g = grad f(y), p the projection of
    y - t g and r = (y - p) / t. Then <g, p - s> <= <r, p - s> for s in Y, so that the maximum is at most
    <g, y - p> + max over s in the box of <r, p - s>: 0 at a solution, where r = 0, for every t > 0.

    Args:
        f: the cost.
        domain: Y.
    """

    kind = "duality gap"

    def __init__(self, f: Objective, domain: Domain) -> None:
        self.f, self.domain = f, domain

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        slope = _slope(self.f, y, x)
        broken, domain = ~slope.isfinite().all(-1), self.domain.at(x)
        slope = slope.masked_fill(broken[:, None], 0)
        around = domain.around()
        if around is None:
            broken = broken | ~domain.compact().to(broken.device)  # where the maximum may be infinite
            slope = slope.masked_fill(broken[:, None], 0)
            gap = (slope.double() * (y - domain.linear(slope)).double()).sum(-1)  # the sum must not round what it bounds
        else:
            size = y.abs().amax(-1).clamp_min(1) / slope.abs().amax(-1).clamp_min(torch.finfo(y.dtype).tiny)
            gap = torch.stack([_gap_by(domain, around, y, slope, t * size[:, None]) for t in STEPS]).amin(0)
        gap = gap.clamp_min(0)
        return _claimed(gap.to(y.dtype).masked_fill(broken, torch.inf), y, self.domain.at(x), rounded)


def _gap_by(domain: Domain, around: tuple[Tensor, Tensor], y: Tensor, slope: Tensor, t: Tensor) -> Tensor:
    """The bound of `DualityGap` by a projection from a step of size t (B, 1)."""
    p = domain.nearest(y - t * slope).double()
    g, r = slope.double(), (y - p) / t
    low, high = (end.double() for end in around)
    widest = torch.maximum(r * (p - low), r * (p - high)).sum(-1)
    return (g * (y - p)).sum(-1) + widest


class Stationarity(Certificate):
    """|y - P(y - grad f(y))|, with the projection P onto Y: 0 exactly at points that meet the first-order (KKT) conditions.

    The natural residual of the variational inequality (Facchinei and Pang, 2003, section 1.5).

    It says nothing of the cost: of a nonconvex f, a local minimum, or a saddle, has a residual of 0.

    Args:
        f: the cost.
        domain: Y.
    """

    kind = "KKT residual"

    def __init__(self, f: Objective, domain: Domain) -> None:
        self.f, self.domain = f, domain

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        slope = _slope(self.f, y, x)
        broken, domain = ~slope.isfinite().all(-1), self.domain.at(x)
        residual = (y - domain.nearest(y - slope.masked_fill(broken[:, None], 0))).norm(dim=-1)
        return _claimed(residual.masked_fill(broken, torch.inf), y, domain, rounded)


def _slope(f: Objective, y: Tensor, x: Tensor) -> Tensor:
    """df/dy (B, n). Raises UserError where there is none."""
    try:
        return Oracle(f, x).first_order().grad(y)
    except RuntimeError as error:
        raise UserError(f"{subject(f)}.cost: this certificate needs its gradient: {said(error)}") from error


class Conformal(Certificate):
    """A statistical bound, which holds for a share of new contexts: a quantile of the model's gaps to the reference.

    Split conformal prediction (Vovk et al., 2005; Lei et al., 2018, algorithm 2): of n gaps on contexts that are exchangeable
    with new ones, the ceil((n + 1) level)-th smallest. It is marginal over contexts, and bounds the gap to the reference, which
    need not be the global optimum. Items that are solved again are their own reference, with a gap of 0.

    Args:
        quantile: that gap.
        level: the share for which it holds.
        count: n.
    """

    def __init__(self, quantile: float, level: float, count: int) -> None:
        self.quantile, self.level, self.count = quantile, level, count
        self.kind = f"split-conformal (statistical, {100 * level:g} %)"

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        return torch.where(y.isfinite().all(-1), self.quantile, torch.inf).to(y.dtype)

    def improve(self, f: Objective, domain: Domain, x: Tensor, y: Tensor, aim: Aim) -> Improved:
        found = best_found(f, domain, x, extra=y, solution=aim.solution)
        bound = torch.where(found.cost.isfinite(), 0.0, torch.inf).to(y.dtype)
        return Improved(found.y, bound, bound)


def _claimed(bound: Tensor, y: Tensor, domain: Domain, rounded: torch.dtype | None) -> Tensor:
    """The bound, or inf if it is NaN or y is outside Y."""
    return bound.masked_fill(bound.isnan() | ~within(domain, y, rounded), torch.inf)


@torch.no_grad()
def solve_from(
    f: Objective,
    domain: Domain,
    x: Tensor,
    y: Tensor,
    tol: Tolerance,
    certificate: Certificate,
    iterations: int = 2000,
    solution: Field | None = None,
) -> tuple[Tensor, Tensor]:
    """Improve y (B, n) until each item's certificate is at most `tol` -> y (B, n), bound (B,).

    Convex quadratic programs are solved exactly, in float64. Other items take projected gradient from y for at most
    `iterations`, then `best_found` if they are still above `tol`, as those of a nonconvex problem may be, and projected
    gradient from what it found. An item stops once it meets `tol`, so its solution does not depend on the batch.

    Raises:
        UserError: the cost or the residual has the wrong shape, or has no gradient that the certificate needs.
    """
    y = placed(domain.at(x), y)
    bound = certificate.bound(y, x)
    exact = exactly(f, domain, x)
    if exact is not None:
        y, bound = _tightened(certificate, f, x, y, bound, exact, tol)
    y, bound = _descended(f, domain, x, y, bound, tol, certificate, iterations)
    poor = (bound > tol.of(f, y, x)).nonzero()[:, 0]
    if len(poor):
        found = best_found(f, domain, x[poor], extra=y[poor], solution=solution)
        better = _tightened(certificate, f, x[poor], y[poor], bound[poor], found.y, tol)
        y[poor], bound[poor] = _descended(f, domain, x[poor], *better, tol, certificate, iterations)
    return y, bound


def _descended(
    f: Objective,
    domain: Domain,
    x: Tensor,
    y: Tensor,
    bound: Tensor,
    tol: Tolerance,
    certificate: Certificate,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """The best certified of y (B, n), with its bound (B,), and of iterates of projected gradient from there.

    Most items are solved long before the last: whenever half are, the others go on without them.
    """
    y, bound = y.clone(), bound.clone()
    stuck = ~f(y, x).isfinite()  # no descent can start there
    if bool((stuck | (bound <= tol.of(f, y, x))).all()):
        return y, bound
    rows, going = torch.arange(len(x), device=x.device), None  # those that go on, and which of them from now on
    with contextlib.suppress(*FAILURES):
        path = descent(f, domain, x, y)
        for count in range(1, iterations + 1):
            at, going = path.send(going), None
            if count % CHECK_EVERY == 0 or count == iterations:
                y[rows], bound[rows] = _tightened(certificate, f, x[rows], y[rows], bound[rows], at, tol)
                left = ~(stuck[rows] | (bound[rows] <= tol.of(f, y[rows], x[rows])))
                if (many := int(left.sum())) <= len(rows) // 2:
                    rows, going = rows[left], left
                if not many:
                    break
    return y, bound


def _tightened(
    certificate: Certificate, f: Objective, x: Tensor, y: Tensor, bound: Tensor, other: Tensor, tol: Tolerance
) -> tuple[Tensor, Tensor]:
    """Per item the one of y and `other` with the lower bound; y if it already meets `tol`."""
    now = certificate.bound(other, x)
    better = (now < bound) & (bound > tol.of(f, y, x))
    return other.where(better[:, None], y), now.where(better, bound)
