"""Classical solvers of a problem: references for a model's predictions, and a fallback where they are not good enough.

x contexts as vectors (B, d) · y solution (B, n) · v unconstrained (B, inputs) · f cost (B,) · S starts

Items are solved independently: step sizes, acceptance and best iterates are per item, and an item whose cost or
gradient is not finite does not move. Results are feasible by `domain.violation`, whatever the solver.
"""

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.domain import Domain, Euclid
from rlamort.errors import Fault, UserError
from rlamort.objective import Cost, Objective, Oracle
from rlamort.problem import Problem
from rlamort.update import Cem, Lbfgs, Update

Field = Callable[[Tensor], Tensor | None]  # x (B, d) -> y (B, n), or None
STARTS = 8
CHUNK = 512  # contexts in one batch, from every start
AGREES = 1e-3  # relative difference to the best cost below which a start agrees with it
CHECK_EVERY = 10  # iterations between certificates, one of which costs as much as an iteration
FAILURES = (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError)  # of a solver or of a user's `solution`


class Reference(NamedTuple):
    """Reference solutions for a model."""

    y: Tensor  # (B, n) in Y; NaN if no solution was found
    cost: Tensor  # (B,); NaN if no finite one was found
    label: str  # "solution": the problem's own; "best found": of all starts and solvers
    agreement: float  # share of starts from which some solver came within a relative 1e-3 of the best; 1 for a solution
    messages: tuple[str, ...]  # failures, and counts of points outside Y


class Search:
    """A classical solver, one iteration at a time.

    Attributes:
        name: for messages and tables.
        iterations: the default number.
    """

    name: str
    iterations: int

    def path(self, f: Objective, domain: Domain, x: Tensor, v: Tensor) -> Iterator[Tensor]:
        """Iterates y (B, n) in Y from domain.project(v (B, inputs)), an infinite iterator. Called inside no_grad."""
        raise NotImplementedError


class Descent(Search):
    """Spectral projected gradient: a projected gradient step with the Barzilai-Borwein step size.

    Birgin, Martinez and Raydan (2000), algorithm 2.1 (SPG1): trials are on the projection arc, so Y need not be convex, and
    acceptance is the nonmonotone rule of Grippo, Lampariello and Lucidi, against the worst of the last costs. A rejected trial
    is an iteration, too. The step size comes from gradients alone, so rounding of the cost does not stop the descent before a
    certificate of 1e-4 holds in float32, as it stops FISTA's backtracking.

    Args:
        iterations: the default number; each is one evaluation of f and its gradient.
        memory: costs of the nonmonotone rule.
    """

    name = "projected gradient"

    def __init__(self, iterations: int = 300, memory: int = 10) -> None:
        self.iterations, self.memory = iterations, memory

    def path(self, f: Objective, domain: Domain, x: Tensor, v: Tensor) -> Iterator[Tensor]:
        return self.improve(f, domain, x, domain.project(v))

    def improve(self, f: Objective, domain: Domain, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The best iterates so far from y (B, n), finite and in Y, an infinite iterator."""
        oracle = Oracle(f, x)  # of the cost itself, hidden parts of x included
        cost, slope = _value_and_slope(oracle, y)  # (B,), (B, n)
        slope = slope.where(slope.isfinite(), 0)  # that item stays, and no projection sees NaN
        noise = 8 * torch.finfo(y.dtype).eps
        recent = cost[:, None].repeat(1, self.memory)
        best, lowest = y, cost
        step = 1 / (domain.nearest(y - slope) - y).abs().amax(-1).clamp(1e-8, 1e8)
        while True:
            trial = domain.nearest(y - step[:, None] * slope)
            trial_cost, trial_slope = _value_and_slope(oracle, trial)
            move, turn = trial - y, trial_slope - slope
            length, curvature = move.square().sum(-1), (move * turn).sum(-1)
            worst = recent.amax(-1)
            accepted = trial_cost <= worst - 1e-4 * length / step + noise * worst.abs()
            accepted = accepted & trial_slope.isfinite().all(-1)
            spectral = torch.where(curvature > 0, length / curvature, 2 * step)
            step = torch.where(accepted, spectral, step / 4).clamp(1e-12, 1e12)
            y, slope = trial.where(accepted[:, None], y), trial_slope.where(accepted[:, None], slope)
            recent = torch.cat([recent[:, 1:], trial_cost[:, None]], dim=-1).where(accepted[:, None], recent)
            # of costs that differ by rounding, the later is the more accurate solution
            better = accepted & (trial_cost <= lowest + noise * lowest.abs())
            best, lowest = trial.where(better[:, None], best), torch.minimum(lowest, trial_cost).where(better, lowest)
            yield best


class Unconstrained(Search):
    """Any `Update` over the unconstrained coordinates v with y = domain.project(v).

    Args:
        name: for messages and tables.
        make: the solver's step, for the domain of v.
        iterations: the default number.
    """

    def __init__(self, name: str, make: Callable[[Domain], Update], iterations: int) -> None:
        self.name, self.make, self.iterations = name, make, iterations

    def path(self, f: Objective, domain: Domain, x: Tensor, v: Tensor) -> Iterator[Tensor]:
        oracle = Oracle(f, x).first_order().through(lambda v, x: domain.project(v), x.shape[-1])
        update = self.make(Euclid(domain.inputs).to(v))
        h = update.start(v, x)
        while True:
            v, h = update(v, h, x, oracle)
            yield domain.project(v)


class Adam(Update):
    """Adam (Kingma and Ba, 2015, algorithm 1) per item, with the step size rate / (1 + t / 50).

    Args:
        rate: initial step size.
        domain: Y, which must be R^n, since there is no projection.
        decay: beta_1 and beta_2, of the moments.
    """

    def __init__(self, rate: float, domain: Domain, decay: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__()
        self.rate, self.decay = rate, decay

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return torch.zeros_like(y), torch.zeros_like(y), y.new_zeros(len(y), 1)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        mean, square, steps = h
        slope, (first, second) = oracle.grad(y), self.decay
        mean, square, steps = mean.lerp(slope, 1 - first), square.lerp(slope.square(), 1 - second), steps + 1
        direction = (mean / (1 - first**steps)) / ((square / (1 - second**steps)).sqrt() + 1e-8)
        return y - self.rate / (1 + steps / 50) * direction, (mean, square, steps)


class Known(Search):
    """The problem's own solution, as a solver of one iteration, to be timed like the others.

    Args:
        field: x (B, d) -> y (B, n).
    """

    name, iterations = "solution", 1

    def __init__(self, field: Field) -> None:
        self.field = field

    def path(self, f: Objective, domain: Domain, x: Tensor, v: Tensor) -> Iterator[Tensor]:
        while True:
            y = self.field(x)
            if y is None:
                raise UserError(f"{subject(f)}.solution: None is returned; a solution is needed")
            yield y


def solvers() -> list[Search]:
    """The default solvers: two with curvature, Adam with a grid of step sizes, and one without gradients."""
    return [
        Descent(100),  # from every start; the best of them all is polished for longer
        Unconstrained("L-BFGS", Lbfgs, 60),
        *(Unconstrained(f"Adam at {rate}", functools.partial(Adam, rate), 150) for rate in (0.1, 1.0)),
        Unconstrained("CEM", Cem, 30),
    ]


def solution_of(problem: Problem) -> Field:
    """`problem.solution` on contexts as vectors, in their dtype."""

    def field(x: Tensor) -> Tensor | None:
        y = problem.solution(problem.layout.unpack(x))
        return y.detach().to(x) if isinstance(y, Tensor) else y

    return field


def within(domain: Domain, y: Tensor) -> Tensor:
    """y (B, n) -> (B,) bool: feasibility, to rounding; False for non-finite y."""
    finite = y.isfinite().all(-1)
    return finite & (domain.violation(_finite(domain, y)) <= slack(y))


def extended(f: Objective, domain: Domain, y: Tensor, x: Tensor) -> Tensor:
    """The extended value of f (B,), infinity outside Y, for comparisons (Boyd and Vandenberghe, 2004, 3.1.2)."""
    return f(y, x).where(within(domain, y), torch.inf)


def subject(f: Objective) -> str:
    """The class that defines f, for messages."""
    return type(f.problem if isinstance(f, Cost) else f).__name__


@torch.no_grad()
def best_found(
    f: Objective,
    domain: Domain,
    x: Tensor,
    starts: int = STARTS,
    extra: Tensor | None = None,
    solution: Field | None = None,
    searches: Sequence[Search] | None = None,
) -> Reference:
    """The problem's own solution of each item if it has one, else the best of all solvers from all starts.

    The best is polished by projected gradient. Points outside Y are excluded, from every source, and counted in `messages`.
    The starts are the same for every item and every call, so that results do not depend on the batch; CEM's samples have
    their own generator state.

    Args:
        f: the cost.
        domain: Y.
        x: contexts (B, d).
        starts: S.
        extra: further starts (B, n), such as predictions; the result is never worse than feasible ones.
        solution: the problem's own, on vectors.
        searches: the solvers; by default `solvers()`.

    Raises:
        UserError: the cost has the wrong shape.
        Fault: every solver raised.
    """
    if starts < 1:
        raise UserError(f"starts: {starts} is given; at least 1 is needed")
    messages: dict[str, None] = {}  # an ordered set
    lost: Counter[str] = Counter()  # by source: points outside Y
    y = x.new_full((len(x), domain.dim), torch.nan)
    cost = x.new_full((len(x),), torch.nan)
    if solution is not None:
        known = answers(solution, x, domain.dim, f"{subject(f)}.solution", messages)
        if known is not None:  # it may be a view of what the user holds
            y, cost = known.clone(), _judged(f, domain, known, x, f"{subject(f)}.solution", lost)
    missing = (~cost.isfinite()).nonzero()[:, 0]
    if not len(missing):
        return Reference(y, cost, "solution", 1.0, tuple(messages))
    agreements = []
    searches = solvers() if searches is None else searches
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        for rows in torch.split(missing, CHUNK):
            given = None if extra is None else extra[rows]
            y[rows], cost[rows], agreement = _search(f, domain, x[rows], starts, given, searches, messages, lost)
            agreements.append(agreement)
    kind = type(domain).__name__
    messages |= {f"{name}: {count} of its points lie outside {kind}, and are excluded": None for name, count in lost.items()}
    label = "best found" if len(missing) == len(x) else f"solution; best found for {len(missing)} of {len(x)}"
    return Reference(y, cost, label, torch.cat(agreements).mean().item(), tuple(messages))


def _search(
    f: Objective,
    domain: Domain,
    x: Tensor,
    starts: int,
    extra: Tensor | None,
    searches: Sequence[Search],
    messages: dict[str, None],
    lost: Counter[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of all -> y (B, n), cost (B,), and the share of starts (B,) that agree with it."""
    v = _starts(domain, starts, x).repeat_interleave(len(x), 0)  # (S * B, inputs)
    many, first = x.repeat(starts, 1), domain.project(v)
    # what is wrong with the cost itself is said before any solver is blamed
    begun = first, _judged(f, domain, first, many, "the starts", lost)
    descent = Descent()
    runs = [(search.name, many, search.iterations, search.path(f, domain, many, v)) for search in searches]
    found = []
    if extra is not None:
        given = placed(domain, extra)
        found.append((given, _judged(f, domain, given, x, "the predictions", lost)))
        runs.append((f"{descent.name} from the prediction", x, descent.iterations, descent.improve(f, domain, x, given)))
    ends = []
    for name, contexts, iterations, path in runs:
        try:
            y, cost = _walk(f, domain, path, contexts, iterations, name, lost)
        except FAILURES as error:
            messages[f"{name} failed: {said(error)}"] = None
            continue
        if cost.isnan().all():
            messages[f"{name} failed: no finite cost"] = None
        found += _by_start(y, cost, len(x))
        if contexts is many:
            ends.append(cost.view(-1, len(x)))  # (starts, B)
    if not ends:
        raise Fault(f"{subject(f)}: every reference solver failed; {'; '.join(messages)}")
    found += _by_start(*begun, len(x))
    y, cost = _best([y for y, _ in found], [cost for _, cost in found])
    with contextlib.suppress(*FAILURES):  # if it fails it has failed before, which has been said
        path = descent.improve(f, domain, x, _finite(domain, y))
        polished, after = _walk(f, domain, path, x, descent.iterations, "polishing", lost)
        y, cost = _best([polished, y], [after, cost])
    ended = torch.stack(ends).nan_to_num(torch.inf).amin(0)  # (S, B): a start has found what any search found from it
    y = y.where(cost.isfinite()[:, None], torch.nan)
    return y, cost, (ended - cost <= AGREES * cost.abs().clamp_min(1e-6)).to(cost.dtype).mean(0)


def _walk(
    f: Objective, domain: Domain, path: Iterator[Tensor], x: Tensor, iterations: int, name: str, lost: Counter[str]
) -> tuple[Tensor, Tensor]:
    """The best of some iterates and the last -> y (B, n), cost (B,), NaN if it never was finite in Y."""
    kept = [at for i, at in enumerate(itertools.islice(path, iterations), 1) if i % CHECK_EVERY == 0 or i == iterations]
    return _best(kept[::-1], [_judged(f, domain, at, x, name, lost) for at in reversed(kept)])


def _judged(f: Objective, domain: Domain, y: Tensor, x: Tensor, name: str, lost: Counter[str]) -> Tensor:
    """f(y; x) (B,), NaN if it is not finite or y is outside Y, which `lost[name]` counts."""
    cost, inside = f(y, x), within(domain, y)
    if outside := int((y.isfinite().all(-1) & ~inside).sum()):
        lost[name] += outside
    return cost.where(inside & cost.isfinite(), torch.nan)


def _by_start(y: Tensor, cost: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """y (S * B, n), cost (S * B,) -> y (B, n), cost (B,) of each start."""
    return zip(y.view(-1, count, y.shape[-1]), cost.view(-1, count), strict=True)


def _best(ys: Sequence[Tensor], costs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Per item the y of lowest finite cost; the first on ties."""
    stacked = torch.stack(list(costs))
    which = stacked.where(stacked.isfinite(), torch.inf).argmin(0)
    items = torch.arange(len(which), device=which.device)
    return torch.stack(list(ys))[which, items], stacked[which, items]


def _starts(domain: Domain, count: int, x: Tensor) -> Tensor:
    """v (S, inputs) with x's dtype and device: the origin, then fixed normal draws of increasing width."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(count, domain.inputs, generator=generator, dtype=torch.float64)
    return (v * torch.linspace(0, 3, count, dtype=torch.float64)[:, None]).to(x)


def answers(solution: Field, x: Tensor, dim: int, name: str, messages: dict[str, None]) -> Tensor | None:
    """The problem's own solution (B, dim), NaN for items on which it raises, which `messages` says; None if it returns None."""
    try:
        y = solution(x)
    except FAILURES as error:
        if len(x) == 1:
            messages[f"{name} raised {said(error)}"] = None
            return x.new_full((1, dim), torch.nan)
        # an item that raises takes its whole batch with it: halves find it in few calls
        halves = [answers(solution, half, dim, name, messages) for half in x.tensor_split(2)]
        given = [half for half in halves if half is not None]
        return torch.cat(given) if len(given) == len(halves) else None
    if y is not None and not isinstance(y, Tensor):
        raise UserError(f"{name}: a {type(y).__name__} is returned; a tensor, or None where there is none, is needed")
    if y is not None and y.shape != (len(x), dim):
        raise UserError(f"{name}: shape {tuple(y.shape)} is returned for {len(x)} contexts; {(len(x), dim)} is needed")
    return y


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _value_and_slope(oracle: Oracle, y: Tensor) -> tuple[Tensor, Tensor]:
    """f (B,) and df/dy (B, n) from one evaluation, detached."""
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        value = oracle.value(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope


def _finite(domain: Domain, y: Tensor) -> Tensor:
    """y with non-finite items replaced by a point of Y."""
    centre = domain.project(y.new_zeros(1, domain.inputs))
    return y.where(y.isfinite().all(-1, keepdim=True), centre)


def placed(domain: Domain, y: Tensor) -> Tensor:
    """The projection onto Y; y itself if that is feasible and its projection is not."""
    near = domain.nearest(_finite(domain, y))
    return y.where((within(domain, y) & ~within(domain, near))[:, None], near)


def slack(y: Tensor) -> Tensor:
    """The tolerance (B,) of feasibility for y (B, n), for rounding."""
    return y.abs().amax(-1).clamp_min(1) * math.sqrt(torch.finfo(y.dtype).eps)
