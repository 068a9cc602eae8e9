"""Shared parts of the checks of a problem: samples, points where functions tend to fail, derivatives, and result lines.

x context, as the user has it, and as rows (B, d) · y solution (B, n) · v unconstrained (B, inputs) · f cost (B,)
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.domain import within
from rlamort.errors import UserError
from rlamort.objective import Cost
from rlamort.problem import Parts, Problem

Verdict = Literal["pass", "warn", "absent", "fail"]
Outcome = tuple[Verdict, str]
CLOSE = 1e-4  # relative, where numbers ought to agree but for rounding in float32
ROOT = "a root or a norm of 0 needs a little under the root, (z.square().sum(-1) + 1e-12).sqrt()"
ENTROPY = "0 log 0 needs torch.special.entr"


class Line(NamedTuple):
    """The result of one check."""

    what: str
    verdict: Verdict
    detail: str  # what was given, and what is needed


class Sample(NamedTuple):
    x: Tensor  # (B, d) rows
    v: Tensor  # (B, inputs)
    y: Tensor  # (B, n) = project(v)


class Trial:
    """A problem during its checks, each of which may rely on those before it.

    Args:
        problem: the user's.
        count: contexts per batch.
        seed: of what is drawn.
        device: where the problem is.

    Attributes:
        lines: results so far.
    """

    def __init__(self, problem: Problem, count: int, seed: int, device: torch.device) -> None:
        self.problem, self.count, self.seed, self.device = problem, count, seed, device
        self.f = Cost(problem)
        self.lines: list[Line] = []

    def look(self, what: str, check: "Callable[[Trial], Outcome]") -> bool:
        """Run one check and add its line; returns whether it did not fail."""
        torch.manual_seed(self.seed)
        try:
            verdict, detail = check(self)
        except Exception as error:
            verdict, detail = "fail", f"it raised {type(error).__name__}: {error}"
        self.lines.append(Line(what, verdict, detail))
        return verdict != "fail"

    def passed(self, what: str, *also: Verdict) -> bool:
        return any(line.what == what and line.verdict in ("pass", *also) for line in self.lines)

    def sample(self) -> Sample:
        """Contexts and solutions as models see them: vectors, in the dtype of networks."""
        x = self.rows(self.problem.contexts(self.count))
        v = torch.randn(self.count, self.problem.domain.inputs, device=self.device)
        return Sample(x, v, self.problem.domain.at(x).project(v))

    def rows(self, x: Parts) -> Tensor:
        return self.problem.layout.pack(x).to(self.device, torch.get_default_dtype())

    def value(self, y: Tensor, x: Tensor) -> Tensor:
        """f(y; x), with fixed noise if the cost is random."""
        torch.manual_seed(self.seed + 1)
        return self.f(y, x)

    def special(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Points of Y (B, n) where functions tend to fail, which random ones miss, with their names."""
        domain, like = self.problem.domain.at(x), x.new_empty(self.count, self.problem.domain.dim)
        yield "the point of Y nearest to 0", domain.nearest(torch.zeros_like(like))
        far = 1e3
        try:
            yield "corners of Y", domain.linear(torch.randn_like(like))
        except UserError:  # it is unbounded, and costs may overflow far out
            far = 3.0
        yield "the boundary of Y", domain.nearest(far * torch.randn_like(like))
        user_x = self.problem.layout.unpack(x)
        for name, part in named(user_x):
            if part.is_floating_point() and part[0].numel() == domain.dim:
                y = part.reshape(like.shape).to(x)
                inside = within(domain, y)
                what = f"y = {name}" if inside.all() else f"the point of Y nearest to {name}"
                yield what, y.where(inside[:, None], domain.nearest(y))
        try:
            best = self.problem.solution(user_x)
        except Exception:  # which has a line of its own
            return
        if isinstance(best, Tensor) and best.shape == like.shape and best.isfinite().all():
            yield "`solution`", best.to(x)

    def derivatives(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient (C, n) of items with finite cost, and a Hessian-vector product of those with finite gradient."""
        whole = self.value(y, x).isfinite()
        y, x = y[whole].detach().requires_grad_(), x[whole]
        if not len(y) or not (cost := self.value(y, x)).requires_grad:
            return torch.zeros_like(y), torch.zeros_like(y)
        slope = torch.autograd.grad(cost.sum(), y, create_graph=True, materialize_grads=True)[0]
        smooth = slope.isfinite().all(-1)
        along = (slope * nn.functional.normalize(torch.randn_like(y), dim=-1))[smooth].sum()
        if not along.requires_grad:
            return slope.detach(), torch.zeros_like(y)
        return slope.detach(), torch.autograd.grad(along, y, materialize_grads=True)[0][smooth]

    def widened(self, x: Tensor, v: Tensor) -> "Scale":
        """The trial in float64, for accurate differences, if the problem can be moved there."""
        try:
            twin = Trial(copy.deepcopy(self.problem).double(), self.count, self.seed, self.device)
            exact = twin.value(twin.problem.domain.at(x.double()).project(v.double()), x.double()).dtype is torch.float64
        except Exception:  # whatever a user's code raises at a dtype that nobody asked it to take
            exact = False
        return Scale(twin, x.double(), v.double(), 1e-6, 1e-3, 1e-7) if exact else Scale(self, x, v, 1e-2, 5e-2, 1e-3)

    def misshapen(self, given: object, shape: tuple[int, ...]) -> Outcome | None:
        if not isinstance(given, Tensor):
            return "fail", f"a {type(given).__name__} is returned; a tensor of shape {shape} is needed"
        if given.shape != shape:
            return "fail", f"shape {tuple(given.shape)} is returned; {shape} is needed"
        if not given.isfinite().all():
            return "fail", f"it holds {float(given[~given.isfinite()][0])}; finite numbers are needed"
        return None


class Scale(NamedTuple):
    """The precision of finite differences."""

    trial: Trial
    x: Tensor  # (B, d)
    v: Tensor  # (B, inputs)
    size: float  # of a step, in v or y
    tol: float  # relative to the derivatives
    floor: float  # relative to the values


def parts(x: Parts) -> list[Tensor]:
    return [part for _, part in named(x)]


def named(x: Parts) -> list[tuple[str, Tensor]]:
    return [("x", x)] if isinstance(x, Tensor) else [(f"x[{key!r}]", part) for key, part in x.items()]


def kept(method: Callable[..., Any], y: Tensor | None, x: Parts) -> tuple[Any, Outcome | None]:
    """The result of a problem's method on copies of y and x, and a failure if it modifies them."""
    x = x.clone() if isinstance(x, Tensor) else {key: part.clone() for key, part in x.items()}
    given = ([] if y is None else [("y", y.clone())]) + named(x)
    before = [part.clone() for _, part in given]
    found = method(*([] if y is None else [given[0][1]]), x)
    for (name, part), old in zip(given, before, strict=True):
        if part._version or not torch.equal(part, old):
            return found, (
                "fail",
                f"it changes {name} in place, which its caller uses later; clone it first, {name}.clone(), or avoid in-place "
                "operations (add_, +=, [...] =)",
            )
    return found, None


class Holdings(NamedTuple):
    """Tensors and arrays that a problem holds, by name, with what tells whether they change."""

    held: dict[str, tuple[Any, Any]]  # with the version of a tensor, of which there may be too much to copy, or a copy

    @classmethod
    def of(cls, problem: Problem) -> Self:
        found: dict[str, Any] = dict(itertools.chain(problem.named_parameters(), problem.named_buffers()))
        for prefix, module in problem.named_modules():
            own = {name: value for name, value in vars(module).items() if isinstance(value, Tensor | np.ndarray)}
            found |= {f"{prefix}.{name}" if prefix else name: value for name, value in own.items()}
        return cls({name: (one, one._version if isinstance(one, Tensor) else one.copy()) for name, one in found.items()})

    def moved(self, problem: Problem) -> list[str]:
        """The names of those that changed since, or were replaced."""
        now = type(self).of(problem).held
        return [
            name
            for name, (one, mark) in self.held.items()
            if name not in now or now[name][0] is not one or not np.array_equal(now[name][1], mark)
        ]


def unit(costs: Tensor) -> Tensor:
    """costs (tries, B) -> (B,): beside what differences of costs near 0 are small: the largest of an item's costs, at most 1.

    It is 1 in float32, where the rounding of terms that cancel may be as large as small costs are.
    """
    if costs.dtype is not torch.float64:
        return torch.ones_like(costs[0])
    return costs.abs().nan_to_num(0.0, 0.0, 0.0).amax(0).clamp(1e-8, 1)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of another floating dtype."""
    return close(a.double(), b.double()) if a.is_floating_point() else torch.equal(a, b)


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= CLOSE * b.abs().clamp_min(1)).all())
