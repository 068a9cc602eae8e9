"""Quality and speed of solvers, against a reference and classical solvers: the lines of a table.

x (B, d) · y (B, n) · seconds per instance, by batch size
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.constraints import Constraints
from rlamort.errors import Fault, UserError
from rlamort.objective import Oracle
from rlamort.solve.classical import FAILURES, LBFGS, PROJECTED, Field, Minimiser, Reference, extended, solution_of
from rlamort.solve.solver import EXACT, Solver
from rlamort.update import InY, Update

WARM_UP = 3  # calls


class Row(NamedTuple):
    """Quality and speed of a model, in the unit of the cost and in seconds; times are per instance, by batch size."""

    name: str
    gap: float  # mean of f(y) - f(reference)
    low: float  # of the mean's 95 % interval over contexts (Student)
    high: float
    p99: float  # of the gap
    scale: float  # mean |f(reference)|, the unit of relative gaps
    infeasibility: float  # largest distance to Y, or violation of a constraint
    failed: int  # contexts with a prediction outside Y, or without a finite gap, which are excluded from gaps
    reference: str  # its label
    agreement: float
    seconds: dict[int, float]
    rival: dict[int, str]  # the fastest classical solver
    rival_seconds: dict[int, float]  # to the model's mean cost from a cold start; inf if it is never reached
    training_seconds: float

    @property
    def relative(self) -> float:
        """The mean gap relative to the mean |f(reference)|."""
        return self.gap / self.scale if self.scale else math.nan

    @property
    def speed_up(self) -> dict[int, float]:
        """At equal quality, by batch size."""
        return {size: self.rival_seconds[size] / seconds for size, seconds in self.seconds.items()}

    @property
    def break_even(self) -> float:
        """The number of solves, at the smallest batch, after which training has paid off: inf if never, NaN if no rival
        reaches the model's cost."""
        size = min(self.seconds)
        saved = self.rival_seconds[size] - self.seconds[size]
        if math.isinf(saved):
            return math.nan
        return math.inf if saved <= 0 else self.training_seconds / saved

    def head(self) -> list[str]:
        """Column names of a table."""
        timed = [name for size in self.seconds for name in (f"µs at {size}", f"speed-up at {size}")]
        return ["model", "gap (95 %)", "p99", "relative", "infeasible by", *timed, "break-even", "failed"]

    def cells(self) -> list[str]:
        """Its line of that table."""
        timed = []
        for size, seconds in self.seconds.items():
            reached = math.isfinite(self.rival_seconds[size])
            by = f"{self.speed_up[size]:.3g}x {self.rival[size]}" if reached else "never reached"
            timed += [f"{1e6 * seconds:.3g}", by]
        gap = f"{self.gap:.2e} ({self.low:.1e}, {self.high:.1e})"
        paid = "no rival" if math.isnan(self.break_even) else "never"
        if math.isfinite(self.break_even):
            paid = f"{self.break_even:.3g} solves"
        numbers = [f"{self.p99:.2e}", f"{self.relative:.1e}", f"{self.infeasibility:.1e}"]
        return [self.name, gap, *numbers, *timed, paid, str(self.failed)]


@torch.no_grad()
def measure(
    name: str,
    solver: Solver,
    x: Tensor,
    reference: Reference,
    training_seconds: float,
    sizes: Sequence[int] = (1, 1000),
    repeats: int = 20,
    limit: int = 300,
) -> Row:
    """Compare a solver's model with a reference on contexts x (B, d).

    Times are medians over `repeats` calls on alternating batches, warm and synchronised. A rival (projected gradient,
    L-BFGS, and the problem's own solution, or the solver of quadratic programs, if that is the reference) has a cold start, at
    domain.project(0). Its iterations are counted first, so that evaluating its cost and feasibility is not timed; more than
    `limit` count as never reached. Under constraints the rival is the augmented-Lagrangian method from all its starts, which
    goes on to feasible solutions whatever the model's cost and violation are.

    Raises:
        UserError: there are fewer than two contexts, or not one reference for each.
        Fault: the model has no finite cost.
    """
    if len(x) < 2 or len(reference.cost) != len(x):
        raise UserError(
            f"x: {len(x)} contexts, and {len(reference.cost)} references, are given; as many, and at least 2, are needed"
        )
    f, domain, constraints = solver.f, solver.problem.domain, Constraints.of(solver.problem)
    y = solver.predict_rows(x)
    gap = extended(f, domain, y, x) - reference.cost
    violation = domain.at(x).violation(y.nan_to_num(0.0, 0.0, 0.0))
    if constraints is not None:
        violation = torch.maximum(violation, constraints.violation(y.nan_to_num(0.0, 0.0, 0.0), x))
    whole = gap.isfinite()
    if int(whole.sum()) < 2:
        raise Fault(f"{name}: its predictions have a finite gap on {int(whole.sum())} of {len(x)} contexts")
    gap = gap[whole].double()
    half = float(stdtrit(len(gap) - 1, 0.975)) * (gap.std() / len(gap) ** 0.5).item()
    rivals = [PROJECTED, LBFGS]
    if reference.label.startswith("solution"):
        known = Known(solution_of(solver.problem), f"{type(solver.problem).__name__}.solution")
        rivals.append(Minimiser("solution", lambda domain: known, InY, 1))
    elif reference.label == EXACT:
        program = Known(solver.exact, f"{type(solver.problem).__name__}, as a quadratic program")
        rivals.append(Minimiser(EXACT, lambda domain: program, InY, 1))
    seconds, rival, rival_seconds = {}, {}, {}
    for size in sizes:
        different = min(repeats, -(-len(x) // size))  # so many batches until the contexts come round again
        batches = [x[(torch.arange(size, device=x.device) + i * size) % len(x)] for i in range(different)]
        seconds[size] = _median_seconds([lambda b=b: solver.predict_rows(b) for b in batches], repeats, x.device) / size  # type: ignore[misc]
        if constraints is None:
            times = {one.name: _seconds_to(one, solver, batches, repeats, limit) / size for one in rivals}
        else:  # which goes on to feasible points, of whatever cost
            times = {reference.label: _median_seconds([lambda: solver.reference(batches[0])], 1, x.device) / size}  # noqa: B023
        rival[size] = min(times, key=lambda one: times[one])
        rival_seconds[size] = times[rival[size]]
    return Row(
        name,
        gap.mean().item(),
        gap.mean().item() - half,
        gap.mean().item() + half,
        gap.quantile(0.99).item(),
        reference.cost[whole].abs().mean().item(),
        violation[y.isfinite().all(-1)].max().item(),
        len(x) - len(gap),
        reference.label,
        reference.agreement,
        seconds,
        rival,
        rival_seconds,
        training_seconds,
    )


class Known(Update):
    """The problem's own solution as a step, to be timed like those of solvers: from anywhere it ends there.

    Args:
        field: x (B, d) -> y (B, n).
        name: of it, for messages.
    """

    def __init__(self, field: Field, name: str) -> None:
        super().__init__()
        self.field, self.name = field, name

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        found = self.field(x)
        if found is None:
            raise UserError(f"{self.name}: None is returned; a solution is needed")
        return found, h


def _seconds_to(rival: Minimiser, solver: Solver, batches: Sequence[Tensor], repeats: int, limit: int) -> float:
    """Median seconds to the model's mean cost over a batch; inf if half of the batches never reach it."""
    runs: list[Callable[[], object]] = []
    lost = 0
    for x in batches:
        domain, f = solver.problem.domain, solver.f
        cost = extended(f, domain, solver.predict_rows(x), x)
        target = cost.mean() + 8 * torch.finfo(cost.dtype).eps * cost.abs().mean()
        try:
            count = _iterations_to(rival, solver, x, target, limit)
        except FAILURES:  # a rival that cannot solve this problem is none
            return math.inf
        if count is not None:
            runs.append(lambda x=x, count=count: [i for i, _ in _numbered(rival, solver, x, count)])  # type: ignore[misc]
        elif (lost := lost + 1) * 2 >= len(batches):
            return math.inf
    return _median_seconds(runs, repeats, batches[0].device)


def _iterations_to(rival: Minimiser, solver: Solver, x: Tensor, target: Tensor, limit: int) -> int | None:
    """Iterations until the mean of each item's lowest cost so far is at most the target; None beyond the limit."""
    lowest = x.new_full((len(x),), torch.inf)
    for count, y in _numbered(rival, solver, x, limit):
        lowest = torch.fmin(lowest, extended(solver.f, solver.problem.domain, y, x))
        if bool(lowest.mean() <= target):
            return count
    return None


def _numbered(rival: Minimiser, solver: Solver, x: Tensor, iterations: int) -> Iterator[tuple[int, Tensor]]:
    """Iterations of a solver from a cold start: number, from 1, and y."""
    v = x.new_zeros(1, len(x), solver.problem.domain.inputs)
    path = rival.iterates(solver.f, solver.problem.domain, x, v)
    return enumerate((y[0] for y in itertools.islice(path, iterations)), 1)


def _median_seconds(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> float:
    """The median over `repeats` alternating calls, after warm-up; synchronised."""
    times = []
    for call in itertools.islice(itertools.cycle(calls), WARM_UP + repeats):
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
