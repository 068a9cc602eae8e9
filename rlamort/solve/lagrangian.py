"""The augmented-Lagrangian method: problems with constraints, by projected solvers of problems without.

x contexts as vectors (B, d) · y solution (B, n) · h equalities (B, m) · g inequalities (B, k) · S starts
Inside, every start of every item is an item of its own, R = S B of them, start by start.
"""

import itertools
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlamort.constraints import AugmentedLagrangian, Constraints, Multipliers, violation_of
from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.objective import Metrics, Objective, Oracle
from rlamort.solve.classical import iterates
from rlamort.update import InY, SpectralGradient

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # by default
BOUND = 1e8  # of multipliers of rows with unit gradients, the box in which updates are safeguarded
GROWTH, SUFFICIENT = 3.0, 0.25  # of the penalty, where the violation did not fall to this share
LARGEST_PENALTY = {torch.float64: 1e8, torch.float32: 1e5}  # of rows with unit gradients; above, rounding is all that it weighs
LOOSE, TIGHTER, PATIENCE = 0.1, 0.3, 10  # stationarity of the first subproblem, its share at each next; rounds for one at most
STRAYED = 1e6  # times farther out than where it began, an inner solve has found the subproblem to be unbounded
STATIONARY = 1e-3  # norm of the gradient of the distance to feasibility, in rows of unit gradients, below which it is stuck
RESTORING = 500  # iterations of descent on the violation alone
AGREES = 1e-6  # relative difference of costs below which the better certified one is taken
SOLVED = "solved"


class Constrained(NamedTuple):
    """Solutions of problems with constraints. Nothing is to be averaged over items that are not `solved`."""

    y: Tensor  # (B, n) in Y; of an infeasible item the point of the least violation that was found
    cost: Tensor  # (B,); NaN where y is not feasible
    multipliers: Multipliers  # of h and g, in the units of the rows, and the last penalty of each row
    violation: Tensor  # (B,) as `Constraints.violation`
    residual: Tensor  # (B,) of the KKT conditions: see `augmented_lagrangian`
    iterations: Tensor  # (B,) rounds
    status: list[str]  # per item: "solved", "infeasible: ..." or "failed: ..."

    @property
    def solved(self) -> Tensor:
        """(B,) bool."""
        return torch.tensor([one == SOLVED for one in self.status], device=self.y.device)


class _Ends(NamedTuple):
    """Where every start ended, or is: R items."""

    y: Tensor  # (R, n)
    multipliers: Multipliers
    violation: Tensor  # (R,) the larger of that in the user's rows, and in rows of unit gradients
    residual: Tensor  # (R,)
    iterations: Tensor  # (R,)

    def at(self, items: Tensor) -> Self:
        """Those of some of the items."""
        y, multipliers, *rest = self
        return type(self)(y[items], Multipliers(*(part[items] for part in multipliers)), *(part[items] for part in rest))

    def put(self, items: Tensor, those: "_Ends") -> None:
        """Replace some of the items, in place."""
        for mine, theirs in zip(self.flat(), those.flat(), strict=True):
            mine[items] = theirs

    def flat(self) -> list[Tensor]:
        return [self.y, *self.multipliers, self.violation, self.residual, self.iterations]


class _Progress(NamedTuple):
    """How far the subproblems of R items are."""

    missed: Tensor  # (R,) what was missing to feasibility and complementarity at the update before
    aim: Tensor  # (R,) stationarity at which the next update is due
    waited: Tensor  # (R,) rounds since the one before


@torch.no_grad()
def augmented_lagrangian(
    f: Objective,
    constraints: Constraints,
    domain: Domain,
    x: Tensor,
    starts: Tensor,
    tol: float | None = None,
    outer: int = 100,
    inner: int = 100,
) -> Constrained:
    """The best of argmin f(y; x) over y in Y with h(y; x) = 0 and g(y; x) <= 0, from several starts.

    Birgin and Martinez (2014), algorithm 4.1, with spectral projected gradient in Y for its subproblems, warm started. Its
    steps are taken where an item's subproblem is solved to an accuracy that tightens, or after some rounds: penalties that
    grow beside inexact subproblems make these worse.
    Everything is per item: multipliers, safeguarded in a box, the penalty, which grows only where violation and complementarity
    did not fall to a quarter, and its end, so an item's answer does not depend on its batch. Each row is weighed by the largest
    norm of its gradient at the item's starts, so a row's unit changes nothing. Where no start ends feasible, descent on the
    violation alone leads to a feasible point, from which the method begins again, or to a stationary point of the violation:
    the item is infeasible, as far as descent can tell.

    The KKT residual is the largest of |y - P(y - grad L(y))|, with the Lagrangian's gradient in units of the largest gradient
    of f at the starts and P the projection onto Y; of the violation; and of |max(g, -mu / rho)|, which is complementarity.

    Args:
        f: the cost.
        constraints: h and g.
        domain: Y.
        x: contexts (B, d).
        starts: points of Y (S, B, n).
        tol: of the residual and the violation; None takes 1e-6 in float64, 1e-3 in float32.
        outer: rounds, after which multipliers are updated where their subproblem is solved well enough, at the most.
        inner: iterations in each round, fixed.

    Raises:
        UserError: starts of another shape, or a number that is not positive; what f and the constraints raise.
    """
    if starts.ndim != 3 or not len(starts) or starts.shape[1:] != (len(x), domain.dim):
        raise UserError(f"starts: shape {tuple(starts.shape)} is given; (S, {len(x)}, {domain.dim}), S >= 1, is needed")
    tol = TOLERANCE.get(starts.dtype, 1e-6) if tol is None else tol
    for name, number in {"tol": tol, "outer": outer, "inner": inner}.items():
        if not number > 0:
            raise UserError(f"{name}: {number} is given; a positive number is needed")
    method = _Method(f, constraints, domain, x, starts, tol, inner)
    ends = method.run(torch.arange(method.count, device=x.device), method.first, outer)
    stuck = torch.zeros(method.count, dtype=torch.bool, device=x.device)
    lost = ~(ends.violation <= tol).view(-1, len(x)).any(0).repeat(len(starts))  # items of which no start is feasible
    if lost.any():
        items = lost.nonzero()[:, 0]
        restored, stuck[items] = method.restored(items, ends.y[items])
        least = ends.at(items)._replace(y=restored, violation=method.violation(items, restored))
        ends.put(items, least)
        back = items[least.violation <= tol]
        if len(back):
            again = method.run(back, ends.y[back], outer)
            held = (again.violation <= tol).nonzero()[:, 0]
            ends.put(back[held], again.at(held))
    return method.best(ends, stuck)


def kkt(
    f: Objective, constraints: Constraints, domain: Domain, y: Tensor, x: Tensor, multipliers: Multipliers
) -> tuple[Tensor, Tensor]:
    """How far y (B, n) is from stationarity, |y - P(y - grad L(y))|, and from complementarity, |min(-g, mu)|: (B,) each.

    Both are largest entries, with L = f + lam h + mu g in the user's own units, and P the projection onto Y.
    """
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        h, g = constraints(at, x)
        value = f(at, x) + (multipliers.equality * h).sum(-1) + (multipliers.inequality * g).sum(-1)
        (slope,) = torch.autograd.grad(value.sum(), at)
    stationarity = (domain.at(x).nearest(y - slope) - y).abs().amax(-1)
    slack = torch.cat([y.new_zeros(len(y), 1), torch.minimum(-g.detach(), multipliers.inequality)], -1)
    return stationarity, slack.abs().amax(-1)


class _Method:
    """One call of `augmented_lagrangian`."""

    def __init__(
        self, f: Objective, constraints: Constraints, domain: Domain, x: Tensor, starts: Tensor, tol: float, inner: int
    ) -> None:
        self.f, self.constraints, self.domain, self.tol, self.inner = f, constraints, domain, tol, inner
        self.many, self.x = len(x), x.repeat(len(starts), 1)  # (R, d)
        self.count = len(self.x)
        self.lagrangian = AugmentedLagrangian(f, constraints)
        self.distance = AugmentedLagrangian(Zero(), constraints)
        self.first = domain.at(self.x).nearest(starts.flatten(0, 1))
        slope = Oracle(f, self.x).first_order().grad(self.first)
        self.size = self._largest(slope.abs().amax(-1, keepdim=True))[:, 0]  # (R,) of gradients of f
        self.rows = self._largest(_row_gradients(constraints, self.first, self.x))  # (R, m + k) of those of rows

    def _largest(self, values: Tensor) -> Tensor:
        """(R, ...) -> per item the largest finite value of its starts, 1 where that is 0, for each of them (R, ...)."""
        by_start = values.view(self.count // self.many, self.many, values.shape[-1])
        most = by_start.where(by_start.isfinite(), 0).amax(0)
        return most.where(most > 0, 1).repeat(len(by_start), 1)

    def violation(self, items: Tensor, y: Tensor) -> Tensor:
        """(R',): in the user's rows, or in those of unit gradients, whichever is larger."""
        h, g = self.constraints(y, self.x[items])
        m, rows = h.shape[1], self.rows[items]
        return torch.maximum(violation_of(h, g), violation_of(h / rows[:, :m], g / rows[:, m:]))

    def run(self, items: Tensor, y: Tensor, outer: int) -> _Ends:
        """The method from y (R', n), for the starts with numbers `items` (R',)."""
        ends = self._begun(items, y)
        progress = _Progress(ends.violation.clone(), torch.full_like(ends.violation, LOOSE), torch.zeros_like(items))
        active = torch.arange(len(items), device=y.device)
        for count in range(1, outer + 1):
            was = _Progress(*(part[active] for part in progress))
            now, moved = self._iterated(items[active], ends.at(active), was, count)
            ends.put(active, now)
            for whole, part in zip(progress, moved, strict=True):
                whole[active] = part
            done = (now.residual <= self.tol) & (now.violation <= self.tol)
            active = active[~(done | self._spent(items[active], now, was, moved))]
            if not len(active):
                break
        return ends

    def _spent(self, items: Tensor, now: _Ends, was: _Progress, moved: _Progress) -> Tensor:
        """Where the largest penalty leaves an infeasible point as it is (R',)."""
        most = LARGEST_PENALTY.get(now.y.dtype, 1e5)
        largest = (now.multipliers.penalty * self.rows[items].square() >= 0.99 * most).any(-1)
        still = (moved.waited == 0) & ~(moved.missed < 0.9 * was.missed)
        return largest & still & (now.violation > self.tol)

    def _begun(self, items: Tensor, y: Tensor) -> _Ends:
        x, (m, k) = self.x[items], self.constraints.sizes
        h, g = self.constraints(y, x)
        row = torch.cat([h, g.clamp_min(0)], -1) / self.rows[items]
        # the heuristic of the same authors' code: a penalty that weighs as the cost does
        ratio = 10 * self.f(y, x).abs().clamp_min(1) / (row.square().sum(-1) / 2).clamp_min(1)
        rho = ratio.nan_to_num(10.0).clamp(1e-3, 1e3)[:, None] / self.rows[items].square()
        multipliers = Multipliers(y.new_zeros(len(y), m), y.new_zeros(len(y), k), rho)
        endless = y.new_full((len(y),), torch.inf)
        return _Ends(y.clone(), multipliers, self.violation(items, y), endless, torch.zeros_like(items))

    def _iterated(self, items: Tensor, at: _Ends, was: _Progress, count: int) -> tuple[_Ends, _Progress]:
        """One round on the subproblem, and an update of the multipliers of items where it is solved well enough."""
        x, rows, m = self.x[items], self.rows[items], self.constraints.sizes[0]
        contexts = self.lagrangian.contexts(x, at.multipliers)
        y = self._descended(self.lagrangian, contexts, at.y, self.inner)
        astray = y.abs().amax(-1) > STRAYED * at.y.abs().amax(-1).clamp_min(1)
        y = at.y.where(astray[:, None], y)
        h, g = self.constraints(y, x)
        short = torch.cat([h, at.multipliers.shortfall(g)], -1).abs() / rows
        measure = short.amax(-1) if short.shape[1] else short.new_zeros(len(short))
        slope = Oracle(self.lagrangian, contexts).first_order().grad(y) / self.size[items, None]
        move = (self.domain.at(x).nearest(y - slope) - y).abs().amax(-1)
        violation = torch.maximum(violation_of(h, g), violation_of(h / rows[:, :m], g / rows[:, m:]))
        residual = torch.stack([move, violation, measure]).amax(0)  # NaN where one is
        residual = residual.where(~astray & residual.isfinite(), torch.inf)
        updated = at.multipliers.updated(h, g)
        bound = BOUND * self.size[items, None] / rows
        near = ~(move > was.aim)
        ready = astray | near | (was.waited >= PATIENCE)
        # an inexact subproblem says little of its penalty, unless it leads away
        share = torch.where(near, SUFFICIENT, 1.0)
        poor = ready & (astray | ~(measure <= (share * was.missed).clamp_min(self.tol / 10)))
        fine = (ready & ~astray)[:, None]
        most = LARGEST_PENALTY.get(y.dtype, 1e5) / rows.square()
        rho = torch.where(poor[:, None], torch.minimum(GROWTH * at.multipliers.penalty, most), at.multipliers.penalty)
        ahead = Multipliers(
            updated.equality.clamp(-bound[:, :m], bound[:, :m]).where(fine, at.multipliers.equality),
            updated.inequality.minimum(bound[:, m:]).where(fine, at.multipliers.inequality),
            rho,
        )
        moved = _Progress(
            torch.where(ready, measure, was.missed),
            torch.where(ready & ~poor, (TIGHTER * was.aim).clamp_min(self.tol / 2), was.aim),
            torch.where(ready, 0, was.waited + 1),
        )
        return _Ends(y, ahead, violation, residual, torch.full_like(items, count)), moved

    def _descended(self, f: Objective, contexts: Tensor, y: Tensor, iterations: int) -> Tensor:
        domain = self.domain.at(contexts)
        path = iterates(Oracle(f, contexts), y[None], SpectralGradient(domain), InY(domain))
        return next(itertools.islice(path, iterations - 1, None))[0]

    def restored(self, items: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Descent on the violation from y (R', n) -> its end (R', n), and whether it is stationary there, and above 0 (R',)."""
        x, rows, (m, k) = self.x[items], self.rows[items], self.constraints.sizes
        none = Multipliers(y.new_zeros(len(y), m), y.new_zeros(len(y), k), rows.square().reciprocal())
        contexts = self.distance.contexts(x, none)
        y = self._descended(self.distance, contexts, y, RESTORING)
        value, slope = Oracle(self.distance, contexts).first_order().value_and_grad(y)
        unit = slope / (2 * value).sqrt()[:, None].clamp_min(torch.finfo(y.dtype).tiny)  # of sqrt(|h|^2 + |max(g, 0)|^2)
        move = torch.linalg.vector_norm(self.domain.at(x).nearest(y - unit) - y, dim=-1)
        return y, (move <= STATIONARY) & (self.violation(items, y) > self.tol)

    def best(self, ends: _Ends, stuck: Tensor) -> Constrained:
        """Per item the best of its starts."""
        cost = self.f(ends.y, self.x).view(-1, self.many)  # (S, B)
        violation, residual = ends.violation.view_as(cost), ends.residual.view_as(cost)
        feasible = (violation <= self.tol) & cost.isfinite()
        value = cost.where(feasible, torch.inf)
        lowest = value.amin(0)
        alike = feasible & (value <= lowest + AGREES * lowest.abs().clamp_min(self.tol))
        rank = torch.where(alike, residual, torch.inf).where(feasible.any(0), violation.nan_to_num(torch.inf))
        which = rank.argmin(0) * self.many + torch.arange(self.many, device=rank.device)
        # where all residuals are infinite, the cheapest
        flat = (alike & rank.isinf()).any(0) & rank.isinf().all(0)
        which = torch.where(flat, value.argmin(0) * self.many + torch.arange(self.many, device=rank.device), which)
        won = ends.at(which)
        own = self.constraints.violation(won.y, self.x[: self.many])
        feasible = feasible.any(0)
        status = [
            self._said(*one)
            for one in zip(feasible.tolist(), stuck[which].tolist(), won.residual.tolist(), won.iterations.tolist(),
                           own.tolist(), strict=True)
        ]  # fmt: skip
        cost = value.flatten()[which].where(feasible, torch.nan)
        return Constrained(won.y, cost, won.multipliers, own, won.residual, won.iterations, status)

    def _said(self, feasible: bool, stuck: bool, residual: float, iterations: int, violation: float) -> str:
        if feasible and residual <= self.tol:
            return SOLVED
        if feasible:
            return f"failed: the KKT residual is {residual:.2g} after {iterations} rounds; tol={self.tol:g}"
        if stuck:
            return f"infeasible: the violation, {violation:.3g}, is stationary there, and no start led to less"
        return f"failed: the violation is {violation:.3g} after {iterations} rounds; tol={self.tol:g}"


class Zero(Objective):
    """f = 0, of which the augmented Lagrangian is the distance to feasibility."""

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return (0 * y).sum(-1), {}


def _row_gradients(constraints: Constraints, y: Tensor, x: Tensor) -> Tensor:
    """Norms (R, m + k) of the gradients of each row at y (R, n)."""
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        columns = torch.cat(constraints(at, x), -1).sum(0)  # (m + k,), each a sum of items, which are independent
        slopes = [
            torch.autograd.grad(column, at, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for column in columns
        ]
    return torch.stack([torch.linalg.vector_norm(one, dim=-1) for one in slopes], -1) if slopes else y.new_zeros(len(y), 0)
