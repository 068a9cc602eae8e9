"""Classical solvers of a problem: references for a model's predictions, and a fallback where they are not good enough.

x contexts as vectors (B, d) · y solution (B, n) · v unconstrained (B, inputs) · z iterate, y or v · f cost (B,) · S starts

Items are solved independently: step sizes, acceptance and best iterates are per item, and an item whose cost or
gradient is not finite does not move. Results are feasible by `domain.violation`, whatever the solver.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlamort.domain import Domain, project_each, within
from rlamort.errors import Fault, UserError
from rlamort.objective import Cost, Objective, Oracle
from rlamort.problem import Problem
from rlamort.update import Adam, Cem, InChart, InY, Lbfgs, Space, SpectralGradient, Update

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


class Minimiser(NamedTuple):
    """A classical solver by name: an update, the space that it iterates in, and for how long."""

    name: str  # for messages and tables
    update: Callable[[Domain], Update]  # for the domain of iterates
    space: Callable[[Domain], Space]  # for Y
    iterations: int  # the default number

    def iterates(self, f: Objective, domain: Domain, x: Tensor, v: Tensor) -> Iterator[Tensor]:
        """Iterates y (S, B, n) in Y from the points project(v (S, B, inputs)), an infinite iterator."""
        space = self.space(domain)
        z = space.begin(v.flatten(0, 1), x.repeat(len(v), 1)).reshape(*v.shape[:2], -1)
        return iterates(Oracle(f, x), z, self.update(space.domain), space)


def iterates(oracle: Oracle, z: Tensor, update: Update, space: Space) -> Iterator[Tensor]:
    """An update from several starts of every item, side by side: its iterates y (S, B, n), an infinite iterator.

    They are not projected: `Projected` and `SpectralGradient` stay in Y, and what is in the chart does. Nothing is asked of the
    oracle before the first iterate is.

    Args:
        oracle: over y, for the contexts of B items; its gradients are taken without a graph.
        z: starts (S, B, m), iterates of the space: see `Space.begin`.
        update: the solver's step, for `space.domain`.
        space: `InY` or `InChart`.
    """
    x = oracle.x.repeat(len(z), 1)
    asked = space.oracle(Oracle(oracle.f, x, second_order=False), x.shape[-1])
    at = z.flatten(0, 1)
    h = update.start(at, x, asked)
    while True:
        at, h = update(at, h, x, asked)
        yield space.point(at, x).reshape(*z.shape[:2], -1)


def descent(f: Objective, domain: Domain, x: Tensor, y: Tensor) -> Generator[Tensor, Tensor | None, None]:
    """Spectral projected gradient on f itself, hidden parts of x included, from y (B, n), finite and in Y -> y (B, n).

    `send` takes which of its items (B,) bool go on, and gives their next iterates alone.
    """
    update, oracle = SpectralGradient(domain), Oracle(f, x, second_order=False)
    h = update.start(y, x, oracle)
    while True:
        y, h = update(y, h, x, oracle)
        going = yield y
        if going is not None:
            x, y, h = x[going], y[going], tuple(part[going] for part in h)
            oracle = Oracle(f, x, second_order=False)


PROJECTED = Minimiser("projected gradient", SpectralGradient, InY, 300)
LBFGS = Minimiser("L-BFGS", Lbfgs, InChart, 60)


def adam(rate: float, iterations: int) -> Minimiser:
    """Adam in the chart."""
    return Minimiser(f"Adam at {rate}", lambda domain: Adam(rate), InChart, iterations)


def minimisers() -> list[Minimiser]:
    """The default solvers: two with curvature, Adam with a grid of step sizes, and one without gradients."""
    return [
        PROJECTED._replace(iterations=100),  # from every start; the best of them all is polished for longer
        LBFGS,
        *(adam(rate, 150) for rate in (0.1, 1.0)),
        Minimiser("CEM", Cem, InChart, 30),
    ]


def solution_of(problem: Problem) -> Field:
    """`problem.solution` on contexts as vectors, in their dtype."""

    def field(x: Tensor) -> Tensor | None:
        y = problem.solution(problem.layout.unpack(x))
        return y.detach().to(x) if isinstance(y, Tensor) else y

    return field


def extended(f: Objective, domain: Domain, y: Tensor, x: Tensor) -> Tensor:
    """The extended value of f (B,), infinity outside Y, for comparisons (Boyd and Vandenberghe, 2004, 3.1.2)."""
    return f(y, x).where(within(domain.at(x), y), torch.inf)


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
    solvers: Sequence[Minimiser] | None = None,
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
        solvers: by default `minimisers()`.

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
    empty = domain.at(x).empty().to(x.device).expand(len(x))  # of these no solver needs to be asked
    if bool(empty.any()):
        messages[f"{subject(f)}.domain: {int(empty.sum())} of {len(x)} contexts leave no point, which is proven"] = None
    missing = (~cost.isfinite() & ~empty).nonzero()[:, 0]
    if not len(missing):
        return Reference(y, cost, "solution", 1.0, tuple(messages))
    agreements = []
    solvers = minimisers() if solvers is None else solvers
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        for rows in torch.split(missing, CHUNK):
            given = None if extra is None else extra[rows]
            y[rows], cost[rows], agreement = _minimise(f, domain, x[rows], starts, given, solvers, messages, lost)
            agreements.append(agreement)
    kind = type(domain).__name__
    messages |= {f"{name}: {count} of its points lie outside {kind}, and are excluded": None for name, count in lost.items()}
    label = "best found" if len(missing) == len(x) else f"solution; best found for {len(missing)} of {len(x)}"
    return Reference(y, cost, label, torch.cat(agreements).mean().item(), tuple(messages))


def _minimise(
    f: Objective,
    domain: Domain,
    x: Tensor,
    starts: int,
    extra: Tensor | None,
    solvers: Sequence[Minimiser],
    messages: dict[str, None],
    lost: Counter[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of all -> y (B, n), cost (B,), and the share of starts (B,) that agree with it."""
    v = _starts(domain, starts, x)[:, None].expand(-1, len(x), -1)  # (S, B, inputs)
    many = x.repeat(starts, 1)
    first = domain.at(many).project(v.flatten(0, 1))
    # what is wrong with the cost itself is said before any solver is blamed
    begun = first, _judged(f, domain, first, many, "the starts", lost)
    runs = [(one.name, many, one.iterations, one.iterates(f, domain, x, v)) for one in solvers]
    found = []
    if extra is not None:
        given = placed(domain.at(x), extra)
        found.append((given, _judged(f, domain, given, x, "the predictions", lost)))
        runs.append((f"{PROJECTED.name} from the prediction", x, PROJECTED.iterations, descent(f, domain, x, given)))
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
        path = descent(f, domain, x, placed(domain.at(x), y))
        polished, after = _walk(f, domain, path, x, PROJECTED.iterations, "polishing", lost)
        y, cost = _best([polished, y], [after, cost])
    ended = torch.stack(ends).nan_to_num(torch.inf).amin(0)  # (S, B): a start has found what any solver found from it
    y = y.where(cost.isfinite()[:, None], torch.nan)
    return y, cost, (ended - cost <= AGREES * cost.abs().clamp_min(1e-6)).to(cost.dtype).mean(0)


def _walk(
    f: Objective, domain: Domain, path: Iterator[Tensor], x: Tensor, iterations: int, name: str, lost: Counter[str]
) -> tuple[Tensor, Tensor]:
    """The best of some iterates and the last -> y (B, n), cost (B,), NaN if it never was finite in Y.

    It judges the update's own iterates, not those of `BestSoFar`, which would hide how many lie outside Y.
    """
    kept = [
        at.reshape(len(x), -1)
        for i, at in enumerate(itertools.islice(path, iterations), 1)
        if i % CHECK_EVERY == 0 or i == iterations
    ]
    return _best(kept[::-1], [_judged(f, domain, at, x, name, lost) for at in reversed(kept)])


def _judged(f: Objective, domain: Domain, y: Tensor, x: Tensor, name: str, lost: Counter[str]) -> Tensor:
    """f(y; x) (B,), NaN if it is not finite or y is outside Y, which `lost[name]` counts."""
    cost, inside = f(y, x), within(domain.at(x), y)
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


def starting(domain: Domain, count: int, x: Tensor) -> Tensor:
    """Points of Y (S, B, n) to begin from, the same for every item."""
    v = _starts(domain, count, x)[:, None].expand(-1, len(x), -1)
    return project_each(domain, x, v)


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


def placed(domain: Domain, y: Tensor) -> Tensor:
    """The projection onto Y; y itself if that is feasible and its projection is not."""
    near = domain.nearest(y.nan_to_num(0.0, 0.0, 0.0))
    return y.where((within(domain, y) & ~within(domain, near))[:, None], near)
