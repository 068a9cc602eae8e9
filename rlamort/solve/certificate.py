"""Certificates of solutions without a known optimum, and solving until a certificate is small enough.

y (B, n) · x (B, d) · f cost (B,) · bound (B,) >= 0
"""

import contextlib
import itertools
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlamort.domain import Domain, within
from rlamort.errors import UserError
from rlamort.objective import Objective, Oracle
from rlamort.problem import Problem
from rlamort.solve.classical import CHECK_EVERY, FAILURES, Field, best_found, descent, placed, said, subject


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

    def improve(
        self, f: Objective, domain: Domain, x: Tensor, y: Tensor, tol: Tolerance, iterations: int, solution: Field
    ) -> tuple[Tensor, Tensor]:
        """Solve from y until the bound is at most `tol`, or for `iterations` -> y (B, n), bound (B,)."""
        return solve_from(f, domain, x, y, tol, self, iterations, solution)


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
        if residual is None or residual.shape != y.shape[:1]:
            given = "None" if residual is None else f"shape {tuple(residual.shape)}"
            raise UserError(
                f"{type(self.problem).__name__}.residual: {given} is returned; one number per item, ({len(y)},), is needed"
            )
        return _claimed(residual.to(y.dtype), y, self.domain, rounded)


class DualityGap(Certificate):
    """max_{s in Y} <grad f(y), y - s> >= f(y) - min f, for convex f and bounded convex Y (Jaggi, 2013, eq. 2).

    Args:
        f: the cost.
        domain: Y.
    """

    kind = "duality gap"

    def __init__(self, f: Objective, domain: Domain) -> None:
        self.f, self.domain = f, domain

    def bound(self, y: Tensor, x: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        try:
            slope = Oracle(self.f, x).first_order().grad(y)
        except RuntimeError as error:
            raise UserError(f"{subject(self.f)}.cost: a certificate by `convex` needs its gradient: {said(error)}") from error
        broken = ~slope.isfinite().all(-1)
        s = self.domain.linear(slope.masked_fill(broken[:, None], 0))
        gap = (slope.double() * (y - s).double()).sum(-1).clamp_min(0)  # the sum must not round what it bounds
        return _claimed(gap.to(y.dtype).masked_fill(broken, torch.inf), y, self.domain, rounded)


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

    def improve(
        self, f: Objective, domain: Domain, x: Tensor, y: Tensor, tol: Tolerance, iterations: int, solution: Field
    ) -> tuple[Tensor, Tensor]:
        found = best_found(f, domain, x, extra=y, solution=solution)
        return found.y, torch.where(found.cost.isfinite(), 0.0, torch.inf).to(y.dtype)


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

    Projected gradient from y for at most `iterations`; then `best_found` for items that are still above `tol`, such as those
    of a nonconvex problem, and projected gradient from what it found. An item stops once it meets `tol`, so its solution does
    not depend on the batch.

    Raises:
        UserError: the cost or the residual has the wrong shape, or has no gradient that the certificate needs.
    """
    y = placed(domain, y)
    y, bound = _descended(f, domain, x, y, certificate.bound(y, x), tol, certificate, iterations)
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
    """The best certified of y (B, n), with its bound (B,), and of iterates of projected gradient from there."""
    stuck = ~f(y, x).isfinite()  # no descent can start there
    with contextlib.suppress(*FAILURES):
        for count, at in enumerate(itertools.islice(descent(f, domain, x, y), iterations), 1):
            if count % CHECK_EVERY == 0 or count == iterations:
                y, bound = _tightened(certificate, f, x, y, bound, at, tol)
                if bool((stuck | (bound <= tol.of(f, y, x))).all()):
                    break
    return y, bound


def _tightened(
    certificate: Certificate, f: Objective, x: Tensor, y: Tensor, bound: Tensor, other: Tensor, tol: Tolerance
) -> tuple[Tensor, Tensor]:
    """Per item the one of y and `other` with the lower bound; y if it already meets `tol`."""
    now = certificate.bound(other, x)
    better = (now < bound) & (bound > tol.of(f, y, x))
    return other.where(better[:, None], y), now.where(better, bound)
