"""SciPy's solvers for problems with constraints, item by item: references for batched ones. x (B, d) · y (B, n)"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import NonlinearConstraint, minimize
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from rlamort.constraints import Constraints, Multipliers
from rlamort.domain import Box, Domain, Euclid, Orthant
from rlamort.domain.items import ItemBox
from rlamort.errors import UserError
from rlamort.objective import Cost
from rlamort.problem import Problem
from rlamort.solve.lagrangian import SOLVED, Constrained, kkt
from rlamort.solve.precision import widened

Method = Literal["SLSQP", "trust-constr"]
FEASIBLE = CLOSE = 1e-6  # violation, and residual


def by_scipy(problem: Problem, x: Tensor, y0: Tensor, method: Method = "SLSQP") -> Constrained:
    """Each item by `scipy.optimize.minimize` in float64, with derivatives by autograd.

    SLSQP (Kraft, 1988) solves a sequence of quadratic programs; trust-constr (Byrd, Hribar and Nocedal, 1999) is an interior
    point method, of which SciPy's stops at a residual of about 1e-4 where inequalities are active. Boxes, orthants and R^n are
    bounds; of any other Y the method iterates in the chart, over what `project` takes, from its origin and not from y0.

    Args:
        problem: the user's.
        x: contexts as vectors (B, d).
        y0: starts (B, n).
        method: SLSQP or trust-constr.

    Returns:
        Solutions in float64. `status` is SciPy's word, `residual` the largest number of `kkt`; `multipliers.penalty` is 0.

    Raises:
        UserError: another method, starts of another shape, or a cost or constraints of the wrong shape.
    """
    if method not in SOLVERS:
        raise UserError(f"method: {method!r} is given; allowed: {', '.join(SOLVERS)}")
    if y0.shape != (len(x), problem.domain.dim):
        raise UserError(f"y0: shape {tuple(y0.shape)} is given; {(len(x), problem.domain.dim)} is needed")
    x, y0 = x.double(), y0.detach().double()
    wide = widened(problem, y0, x)
    constraints = Constraints.of(wide) or Constraints.none(wide)
    solved = [_one(wide, constraints, x[i : i + 1], y0[i], method) for i in range(len(x))]
    y, lam, mu = (torch.stack(parts).to(x) for parts in zip(*(one[:3] for one in solved), strict=True))
    multipliers = Multipliers(lam, mu, x.new_zeros(len(x), sum(constraints.sizes)))
    f, violation = Cost(wide), constraints.violation(y, x).detach()
    stationarity, complementarity = kkt(f, constraints, wide.domain, y, x, multipliers)
    with torch.no_grad():
        cost = f(y, x).where(violation <= FEASIBLE, torch.nan)
    residual = torch.stack([stationarity, complementarity, violation]).amax(0)
    # SciPy calls it a failure where rounding ends the line search, though all that was asked for is reached
    reached = (residual <= CLOSE).tolist()
    status = [SOLVED if close else one.status for one, close in zip(solved, reached, strict=True)]
    return Constrained(y, cost, multipliers, violation, residual, torch.tensor([one.iterations for one in solved]), status)


class _Found(NamedTuple):
    """What SciPy found for one item."""

    y: Tensor  # (n,)
    equality: Tensor  # lam (m,), NaN where SciPy does not say
    inequality: Tensor  # mu (k,)
    iterations: int
    status: str


def _one(problem: Problem, constraints: Constraints, x: Tensor, y0: Tensor, method: Method) -> _Found:
    domain, f, (m, k) = problem.domain.at(x), Cost(problem), constraints.sizes
    bounds = _bounds(domain)
    place: Callable[[Tensor], Tensor] = domain.project if bounds is None else (lambda y: y)  # from the chart, or in Y
    start = np.zeros(domain.inputs) if bounds is None else y0.numpy(force=True).clip(*bounds)
    cost = _Rows(lambda z: f(place(z[None].to(x)), x)[0])
    h = _Rows(lambda z: constraints(place(z[None].to(x)), x)[0][0])
    g = _Rows(lambda z: constraints(place(z[None].to(x)), x)[1][0])
    limits = None if bounds is None else list(zip(*bounds, strict=True))
    found, lam, mu = SOLVERS[method](cost, h if m else None, g if k else None, start, limits)
    y = place(torch.as_tensor(found.x).to(y0)[None])[0]
    empty = np.zeros(0)
    dual = [torch.as_tensor(np.asarray(part)).to(y0) for part in (lam if m else empty, mu if k else empty)]
    return _Found(y, dual[0], dual[1].clamp_min(0), int(found.nit), SOLVED if found.success else f"failed: {found.message}")


class _Rows:
    """A function of one iterate as SciPy calls it, with derivatives by autograd.

    Args:
        at: z (inputs,) -> a number, or (r,).
    """

    def __init__(self, at: Callable[[Tensor], Tensor]) -> None:
        self.at = at

    def value(self, z: Any) -> Any:
        with torch.no_grad():
            return self.at(_point(z)).numpy(force=True)

    def slope(self, z: Any) -> Any:
        """(inputs,), or (r, inputs)."""
        return jacobian(self.at, _point(z)).numpy(force=True)  # type: ignore[no-untyped-call]

    def curvature(self, z: Any, weights: Any = 1.0) -> Any:
        """The Hessian (inputs, inputs) of the function, or of the weighted sum of its rows."""
        w = _point(weights)

        def weighed(point: Tensor) -> Tensor:
            value = self.at(point)
            return (w.to(value) * value).sum()

        return hessian(weighed, _point(z)).numpy(force=True)  # type: ignore[no-untyped-call]


def _slsqp(cost: _Rows, h: _Rows | None, g: _Rows | None, start: Any, limits: Any) -> tuple[Any, Any, Any]:
    rows: list[Any] = [] if h is None else [{"type": "eq", "fun": h.value, "jac": h.slope}]
    if g is not None:
        inside, slope = g.value, g.slope
        rows.append({"type": "ineq", "fun": lambda z: -inside(z), "jac": lambda z: -slope(z)})
    options = {"maxiter": 1000, "ftol": 1e-12}
    found = minimize(cost.value, start, jac=cost.slope, method="SLSQP", bounds=limits, constraints=rows, options=options)
    m = 0 if h is None else len(h.value(found.x))
    k = 0 if g is None else len(g.value(found.x))
    dual = found.get("multipliers", np.full(m + k, np.nan))  # from SciPy 1.16 on
    return found, -dual[:m], dual[m : m + k]


def _trust_constr(cost: _Rows, h: _Rows | None, g: _Rows | None, start: Any, limits: Any) -> tuple[Any, Any, Any]:
    rows = [] if h is None else [NonlinearConstraint(h.value, 0, 0, h.slope, h.curvature)]
    rows += [] if g is None else [NonlinearConstraint(g.value, -np.inf, 0, g.slope, g.curvature)]
    options = {"maxiter": 3000, "gtol": 1e-9, "xtol": 1e-12, "barrier_tol": 1e-10}
    found = minimize(cost.value, start, jac=cost.slope, hess=cost.curvature, method="trust-constr", bounds=limits,
                     constraints=rows, options=options)  # fmt: skip
    lam, mu = (found.v[0], found.v[len(rows) - 1]) if rows else (None, None)  # of nothing, `v` is of the bounds, or empty
    return found, lam, mu


SOLVERS = {"SLSQP": _slsqp, "trust-constr": _trust_constr}


def _point(z: Any) -> Tensor:
    return torch.tensor(np.asarray(z), dtype=torch.float64)


def _bounds(domain: Domain) -> tuple[np.ndarray, np.ndarray] | None:
    """Y as bounds (n,), where it is a box."""
    if isinstance(domain, Box | ItemBox):
        low, high = (part.expand(1, domain.dim)[0].numpy(force=True) for part in (domain.low, domain.high))
        return low.astype(np.float64), high.astype(np.float64)
    if isinstance(domain, Orthant | Euclid):
        least = 0.0 if isinstance(domain, Orthant) else -np.inf
        return np.full(domain.dim, least), np.full(domain.dim, np.inf)
    return None
