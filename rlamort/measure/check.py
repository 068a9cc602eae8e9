"""What a user's problem gets right and wrong, before anything is trained on it; and which models and losses fit it.

x context, as the user has it, and as rows (B, d) · y solution (B, n) · v unconstrained (B, inputs) · f cost (B,)
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.objective import Cost
from rlamort.problem import Layout, Problem, X, begun, presented
from rlamort.solve.classical import within
from rlamort.solve.refine import STEPS, TRIED, refinement

Verdict = Literal["pass", "warn", "absent", "fail"]
Outcome = tuple[Verdict, str]
MODELS = ("full", "choice", "semi", "recurrent", "latent")
LOSSES = ("objective", "regress", "iterates", "rl", "es")
CLOSE = 1e-4  # relative, where numbers ought to agree but for rounding in float32
ROOT = "a root or a norm of 0 needs a little under the root, (z.square().sum(-1) + 1e-12).sqrt()"
ENTROPY = "0 log 0 needs torch.special.entr"


class Line(NamedTuple):
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    detail: str  # what was given, and what is needed


class Fit(NamedTuple):
    """A model or a loss, and whether it can be used on the problem."""

    name: str
    fits: bool
    why: str


class Report(NamedTuple):
    """All of it; as text, what `rlamort check` prints."""

    name: str  # of the problem's class
    lines: list[Line]
    models: list[Fit]
    losses: list[Fit]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(line.verdict != "fail" for line in self.lines)

    def __str__(self) -> str:
        fits = [
            f"{kind} {fit.name:<10} {'fits' if fit.fits else 'does not fit'}: {fit.why}"
            for kind, given in (("model", self.models), ("loss ", self.losses))
            for fit in given
        ]
        return "\n".join([f"{line.verdict:<6} {self.name}.{line.what}: {line.detail}" for line in self.lines] + fits)


def check(problem: Problem, count: int = 6, seed: int = 0) -> Report:
    """Try a problem's methods on a few contexts. What they raise becomes a line; nothing is trained, and nothing moves.

    Args:
        problem: the user's; where its parameters are, it is tried.
        count: contexts per batch.
        seed: of what is drawn.

    Raises:
        UserError: its class does not call `super().__init__()`, so that nothing can be tried.
    """
    device = _device(begun(problem))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _Trial(problem, count, seed, device).report()


class _Sample(NamedTuple):
    x: Tensor  # (B, d) rows
    v: Tensor  # (B, inputs)
    y: Tensor  # (B, n) = project(v)


class _Trial:
    """One run through the checks, each of which may rely on those before it."""

    def __init__(self, problem: Problem, count: int, seed: int, device: torch.device) -> None:
        self.problem, self.count, self.seed, self.device = problem, count, seed, device
        self.f = Cost(problem)
        self.lines: list[Line] = []

    def report(self) -> Report:
        needed = (
            ("domain", self._domain),
            ("contexts", self._contexts),
            ("cost", self._cost),
            ("cost, in place", self._in_place),  # whatever comes after would blame something else
        )
        optional = (
            ("contexts, seeded", self._reproducible),
            ("cost, finite", self._finite),
            ("cost, batch independence", self._independent),
            ("cost, gradient", self._gradient),
            ("cost, second derivative", self._curvature),
            ("device", self._devices),
            ("solution", self._solution),
            ("residual", self._residual),
            ("map", self._map),
            ("convex", self._convex),
        )
        if all(self._try(what, look) for what, look in needed):
            for what, look in optional:
                self._try(what, look)
        verdicts = {line.what: line.verdict for line in self.lines}
        models, losses = _fits(verdicts)
        if verdicts.get("cost, gradient") in ("pass", "warn"):
            models = [self._semi(fit) if fit.name == "semi" else fit for fit in models]
        return Report(type(self.problem).__name__, self.lines, models, losses)

    def _semi(self, fit: Fit) -> Fit:
        """What is said of semi-amortized steps, with the space in which they are taken, once some were."""
        x = presented(self.problem, TRIED, self.device)
        found = refinement(self.f, self.problem.domain, x)
        inside, chart = found.trials["solution"].cost, found.trials["chart"].cost
        steps = fit.why if fit.fits else "gradient steps after a network, of which the best is kept"
        if found.space == "solution":
            return Fit("semi", True, f"{steps}; they are taken in Y") if math.isfinite(inside) else fit
        why = (
            f"{steps}; they are taken in the numbers that are projected to Y (space=chart): from the middle of Y {STEPS} steps "
            f"there end at a mean cost of {chart:.4g}, and in Y at {inside:.4g}"
        )
        return Fit("semi", True, why)

    def _try(self, what: str, look: Callable[[], Outcome]) -> bool:
        torch.manual_seed(self.seed)
        try:
            verdict, detail = look()
        except Exception as error:
            verdict, detail = "fail", f"it raised {type(error).__name__}: {error}"
        self.lines.append(Line(what, verdict, detail))
        return verdict != "fail"

    def _sample(self) -> _Sample:
        """Contexts and solutions as models will see them: rows, in the dtype of networks."""
        x = self._rows(self.problem.contexts(self.count))
        v = torch.randn(self.count, self.problem.domain.inputs, device=self.device)
        return _Sample(x, v, self.problem.domain.project(v))

    def _rows(self, x: X) -> Tensor:
        return self.problem.layout.pack(x).to(self.device, torch.get_default_dtype())

    def _value(self, y: Tensor, x: Tensor) -> Tensor:
        """f(y; x), with the same noise whenever it is asked, where the cost draws any."""
        torch.manual_seed(self.seed + 1)
        return self.f(y, x)

    def _special(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Points of Y (B, n) where functions tend to break, which random ones miss; and what they are called."""
        domain, like = self.problem.domain, x.new_empty(self.count, self.problem.domain.dim)
        yield "the point of Y nearest to 0", domain.nearest(torch.zeros_like(like))
        far = 1e3
        try:
            yield "corners of Y", domain.linear(torch.randn_like(like))
        except UserError:  # it is unbounded, and costs may overflow far out
            far = 3.0
        yield "the border of Y", domain.nearest(far * torch.randn_like(like))
        user_x = self.problem.layout.unpack(x)
        for name, part in _named(user_x):
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

    def _domain(self) -> Outcome:
        domain = getattr(self.problem, "domain", None)
        if not isinstance(domain, Domain):
            given = "nothing" if domain is None else f"a {type(domain).__name__}"
            return "fail", f"{given} is given; a domain of rlamort.domain is needed, such as Box, Simplex or Euclid"
        y = domain.project(torch.randn(2, domain.inputs, device=self.device))
        if y.shape != (2, domain.dim):
            return "fail", f"project gives shape {tuple(y.shape)} for two points; (2, {domain.dim}) is needed"
        for scale in (1e-3, 1.0, 1e3, 1e6):
            v, y = (scale * torch.randn(self.count, size, device=self.device) for size in (domain.inputs, domain.dim))
            for name, found in (("project", domain.project(v)), ("nearest", domain.nearest(y))):
                if not within(domain, found).all():
                    outside = f"{float(domain.violation(found).max()):.3g} outside Y, by its `violation`"
                    return "fail", f"{name} gives points {outside}, for numbers of size {scale:g}; a point of Y is needed"
        with contextlib.suppress(UserError):  # Y may be unbounded
            corner, low = domain.linear(y), domain.nearest(-y)  # g = y, of which that is nearly the lowest point
            higher = ((corner - low) * y).sum(-1) > CLOSE * ((corner.abs() + low.abs()) * y.abs()).sum(-1)
            if higher.any() or not within(domain, corner).all():
                return "fail", "linear gives points that are not the lowest of Y along g, by which certificates are computed"
        return "pass", f"{type(domain).__name__}, {domain.dim} coordinates from {domain.inputs} unconstrained numbers"

    def _contexts(self) -> Outcome:
        layout = Layout.of(type(self.problem).__name__, self.problem.contexts(2))
        if not layout.shapes:
            return "fail", "an empty dict is given; at least one tensor is needed"
        for count in (1, self.count):
            x = self.problem.contexts(count)
            keys = tuple(x) if isinstance(x, dict) else None
            if keys != layout.keys:
                return "fail", f"contexts({count}) gives {keys or 'a tensor'}; contexts(2) gives {layout.keys or 'a tensor'}"
            for name, part, shape in zip(keys or ("",), _parts(x), layout.shapes, strict=True):
                where = f"contexts({count})" + (f"[{name!r}]" if name else "")
                if part.shape != (count, *shape):
                    return "fail", f"{where} has shape {tuple(part.shape)}; {(count, *shape)} is needed"
                if part.device.type != self.device.type:
                    return "fail", f"{where} is on {part.device}, the problem on {self.device}; one device is needed"
                if part.is_floating_point() and not part.isfinite().all():
                    return "fail", f"{where} holds {float(part[~part.isfinite()][0])}; finite numbers are needed"
        back = layout.unpack(self._rows(x))
        lossy = [part.dtype for part, other in zip(_parts(x), _parts(back), strict=True) if not _same(part, other)]
        if lossy:
            return "fail", f"numbers of {lossy[0]} do not survive in {torch.get_default_dtype()}, in which networks see them"
        return "pass", f"{layout.dim} numbers in {len(layout.shapes)} {'tensor' if layout.keys is None else 'named tensors'}"

    def _cost(self) -> Outcome:
        x, _, y = self._sample()
        for size in (self.count, 1):
            cost = self.f(y[:size], x[:size])  # which checks the shape
        if not cost.is_floating_point():
            return "fail", f"numbers of {cost.dtype} are returned; floating ones are needed"
        if cost.device != y.device:
            return "fail", f"it is on {cost.device}, y on {y.device}; one device is needed"
        return "pass", f"({self.count},) in {cost.dtype} for y of shape {tuple(y.shape)}"

    def _in_place(self) -> Outcome:
        x, _, y = self._sample()
        return _kept(self.problem.cost, y, self.problem.layout.unpack(x))[1] or ("pass", "it leaves y and x as they are")

    def _reproducible(self) -> Outcome:
        drawn = []
        for seed in (self.seed, self.seed, self.seed + 1):
            torch.manual_seed(seed)
            drawn.append(_parts(self.problem.contexts(self.count)))
        first, again, other = drawn
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return "fail", "the same seed gives different contexts; draw from torch's generator alone (torch.randn, torch.rand)"
        if all(torch.equal(a, b) for a, b in zip(first, other, strict=True)):
            return "warn", "every seed gives the same contexts, so there is nothing to generalise to"
        return "pass", "the same seed gives the same contexts, another one others"

    def _finite(self) -> Outcome:
        x, v, _ = self._sample()
        for scale in (0.0, 1.0, 3.0):
            cost = self._value(self.problem.domain.project(scale * v), x)
            if not cost.isfinite().all():
                odd = cost[~cost.isfinite()]
                where = f"y = project({scale:g} v) with v ~ N(0, 1)"
                return "fail", f"{len(odd)} of {self.count} costs are {float(odd[0])} at {where}; finite numbers are needed"
        costs = {where: self._value(y, x) for where, y in self._special(x)}
        for where, cost in costs.items():
            if not (cost > -torch.inf).all():  # NaN is not
                odd = cost[~(cost > -torch.inf)]
                needed = f"a number, or inf, is needed ({ENTROPY})"
                return "fail", f"{len(odd)} of {self.count} costs are {float(odd[0])} at {where}; {needed}"
        if infinite := [where for where, cost in costs.items() if not cost.isfinite().all()]:
            return "warn", f"it is infinite at {', '.join(infinite)}, where steps and samples may end"
        return "pass", f"at project(0), project(v) and project(3 v) with v ~ N(0, 1), {', '.join(costs)}"

    def _independent(self) -> Outcome:
        x, _, y = self._sample()
        y.requires_grad_()
        cost = self._value(y, x)
        if cost.requires_grad:
            for i in range(self.count):
                slope = torch.autograd.grad(cost[i], y, retain_graph=True, allow_unused=True)[0]
                if slope is not None and (touched := [j for j in range(self.count) if j != i and slope[j].any()]):
                    return "fail", f"the cost of item {i} depends on y of item {touched[0]}; reduce over the last axes alone"
        x, y, cost = x.detach(), y.detach(), cost.detach()
        torch.manual_seed(self.seed + 2)
        if not _close(cost, self.f(y, x).detach()):  # by noise of its own, so that items cannot be compared by value
            return "pass", "df_i/dy_j = 0; it draws random numbers, so values were not compared"
        order = torch.randperm(self.count, device=self.device)
        if not _close(self._value(y[order], x[order]).detach(), cost[order]):
            return "fail", "another order of the batch gives other costs; no item may depend on its neighbours"
        for i in range(self.count):
            alone = self._value(y[i : i + 1], x[i : i + 1]).detach()
            if not _close(alone, cost[i : i + 1]):
                beside = f"{float(cost[i]):.6g} beside {self.count - 1} others"
                return "fail", f"item {i} costs {float(alone):.6g} alone and {beside}; no item may depend on its neighbours"
        return "pass", "df_i/dy_j = 0; the same alone, and in any order"

    def _gradient(self) -> Outcome:
        x, v, _ = self._sample()
        trial, x, v, size, tol, floor = self._widened(x, v)
        project = trial.problem.domain.project

        def value(v: Tensor) -> Tensor:
            return trial._value(project(v), x)

        v.requires_grad_()
        cost = value(v)
        slope = torch.autograd.grad(cost.sum(), v, allow_unused=True)[0] if cost.requires_grad else None
        if slope is None:
            return (
                "absent",
                "y does not reach it by differentiable steps: something detaches, rounds, compares, or leaves torch",
            )
        if not slope.isfinite().all():
            return "fail", f"it holds {float(slope[~slope.isfinite()][0])}; finite numbers are needed"
        v, cost = v.detach(), cost.detach()
        agreed = compared = 0
        for k in range(4):
            torch.manual_seed(self.seed + 10 + k)
            direction = nn.functional.normalize(torch.randn_like(v), dim=-1)
            along = (slope * direction).sum(-1)
            difference = (value(v + size * direction) - value(v - size * direction)).detach() / (2 * size)
            allowed = tol * torch.maximum(along.abs(), difference.abs()) + floor * cost.abs().clamp_min(1)
            agreed, compared = agreed + int(((along - difference).abs() <= allowed).sum()), compared + len(along)
        found = f"it agrees with finite differences in {agreed} of {compared} directions"
        if agreed < 0.8 * compared:  # a few may lie at kinks
            return "fail", f"{found}; the derivative of what is returned is needed"
        if not slope.any():
            return (
                "absent",
                f"it is zero wherever it was tried, where costs are {float(cost.min()):.4g} to {float(cost.max()):.4g}",
            )
        x, _, _ = self._sample()
        infinite = []
        for where, y in self._special(x):
            slope = self._derivatives(y, x)[0]
            if slope.isnan().any():
                return "fail", f"{found}; it is nan at {where} ({ROOT}; {ENTROPY})"
            if not slope.isfinite().all():
                infinite.append(where)
        if infinite:
            return "warn", f"{found}; it is infinite at {', '.join(infinite)}, where steps of a solver may end"
        return "pass", found

    def _derivatives(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the items whose cost is finite, its gradient (C, n); of those where that is too, the Hessian along a direction."""
        whole = self._value(y, x).isfinite()
        y, x = y[whole].detach().requires_grad_(), x[whole]
        if not len(y) or not (cost := self._value(y, x)).requires_grad:
            return torch.zeros_like(y), torch.zeros_like(y)
        slope = torch.autograd.grad(cost.sum(), y, create_graph=True, materialize_grads=True)[0]
        smooth = slope.isfinite().all(-1)
        along = (slope * nn.functional.normalize(torch.randn_like(y), dim=-1))[smooth].sum()
        if not along.requires_grad:
            return slope.detach(), torch.zeros_like(y)
        return slope.detach(), torch.autograd.grad(along, y, materialize_grads=True)[0][smooth]

    def _widened(self, x: Tensor, v: Tensor) -> "_Scale":
        """The same in float64, where differences are exact enough, if the problem can be moved there."""
        try:
            twin = _Trial(copy.deepcopy(self.problem).double(), self.count, self.seed, self.device)
            exact = twin._value(twin.problem.domain.project(v.double()), x.double()).dtype is torch.float64
        except Exception:  # whatever a user's code raises at a dtype that nobody asked it to take
            exact = False
        return _Scale(twin, x.double(), v.double(), 1e-6, 1e-3, 1e-7) if exact else _Scale(self, x, v, 1e-2, 5e-2, 1e-3)

    def _curvature(self) -> Outcome:
        if not self._passed("cost, gradient", "warn"):
            return "absent", "there is no first derivative to go by"
        x, v, _ = self._sample()
        trial, x, v, size, tol, floor = self._widened(x, v)
        y = trial.problem.domain.project(v).detach().requires_grad_()
        direction = nn.functional.normalize(torch.randn_like(y), dim=-1)

        def slope(y: Tensor, graph: bool) -> Tensor:
            return torch.autograd.grad(trial._value(y, x).sum(), y, create_graph=graph)[0]

        advice = "semi-amortized models need adjoint=first_order"
        try:
            first = slope(y, graph=True)
            along = (first * direction).sum()
            second = torch.autograd.grad(along, y, allow_unused=True)[0] if along.requires_grad else None
        except RuntimeError as error:
            return "warn", f"{error}; {advice}"
        second = torch.zeros_like(y) if second is None else second
        up, down = ((y + sign * size * direction).detach().requires_grad_() for sign in (1, -1))
        difference = (slope(up, graph=False) - slope(down, graph=False)) / (2 * size)
        largest = torch.maximum(second.norm(dim=-1), difference.norm(dim=-1))
        agreed = (second - difference).norm(dim=-1) <= tol * largest + floor * first.norm(dim=-1).clamp_min(1)
        if agreed.double().mean() < 0.8:  # a few may lie at kinks
            return "warn", f"it is not that of finite differences, so some step hides it from autograd; {advice}"
        x, _, _ = self._sample()
        broken = [where for where, y in self._special(x) if not self._derivatives(y, x)[1].isfinite().all()]
        if broken:
            return "warn", f"it is not finite at {', '.join(broken)}; {advice} ({ROOT})"
        return "pass", "it agrees with finite differences" if second.any() else "zero"

    def _devices(self) -> Outcome:
        plain = [
            name
            for holder in (vars(self.problem), vars(type(self.problem)))
            for name, value in holder.items()
            if isinstance(value, Tensor)
        ]
        if torch.cuda.is_available():
            device = torch.device("cuda")
            moved = copy.deepcopy(self.problem).to(device)
            trial = _Trial(moved, self.count, self.seed, device)
            trial.f(moved.domain.project(torch.randn(self.count, moved.domain.inputs, device=device)),
                    trial._rows(moved.contexts(self.count)))  # fmt: skip
            return "pass", "it moves to a GPU, and works there"
        if plain:
            held = ", ".join(plain)
            return (
                "warn",
                f"{held} would stay behind when the problem moves to a GPU; self.register_buffer(name, tensor) takes it",
            )
        return "pass", f"all that it holds is on {self.device}, and would move to a GPU"

    def _solution(self) -> Outcome:
        x, v, _ = self._sample()
        best, changed = _kept(self.problem.solution, None, self.problem.layout.unpack(x))
        if best is None:
            return "absent", "it is not defined; the best that reference solvers find stands in for it"
        domain = self.problem.domain
        if (wrong := changed or self._misshapen(best, (self.count, domain.dim))) is not None:
            return wrong
        best = best.to(x)
        outside = domain.violation(best)
        if (outside > CLOSE * (1 + best.norm(dim=-1))).any():
            return "fail", f"it lies up to {float(outside.max()):.3g} outside {type(domain).__name__}; a point in it is needed"
        cost = self._value(best, x).detach()
        candidates = [domain.project(scale * torch.randn_like(v)) for scale in (0.3, 1.0, 3.0) for _ in range(8)]
        for size in (1e-1, 1e-2, 1e-3):
            candidates += [domain.nearest(best + size * torch.randn_like(best)) for _ in range(8)]
        if self._passed("cost, gradient", "warn"):
            slope = self.f.oracle(x).grad(best)
            candidates += [domain.nearest(best - 10.0**-k * slope) for k in range(6)]
        values = torch.stack([self._value(candidate, x).detach() for candidate in candidates])  # (tries, B)
        better = (cost - values.nan_to_num(float("inf")).amin(0)) / cost.abs().clamp_min(1)
        if better.max() > CLOSE or not cost.isfinite().all():
            i = int(better.argmax())
            found = float(values[:, i].nan_to_num(float("inf")).min())
            return (
                "fail",
                f"item {i} costs {float(cost[i]):.6g}, and {found:.6g} was found by a few tries; a minimiser is needed",
            )
        return "pass", f"in {type(domain).__name__}, and better than {len(candidates)} other points"

    def _residual(self) -> Outcome:
        x, _, y = self._sample()
        user_x = self.problem.layout.unpack(x)
        somewhere, changed = _kept(self.problem.residual, y, user_x)
        if somewhere is None:
            return "absent", "it is not defined; without it, or convexity, certificates are statistical"
        if (wrong := changed or self._misshapen(somewhere, (self.count,))) is not None:
            return wrong
        if (somewhere < 0).any():
            return "fail", f"it is {float(somewhere.min()):.3g} for some y; it must not be negative"
        best = self.problem.solution(user_x) if self._passed("solution") else None
        if best is None:
            return "pass", "one number per item, none negative; there is no solution to try it on"
        there = self.problem.residual(best.to(y), user_x)
        assert there is not None, "it gave one just now"
        if (there > 1e-3 * somewhere.median() + CLOSE).any():
            usual = f"{float(somewhere.median()):.3g} at random points"
            return "fail", f"it is {float(there.max()):.3g} at `solution`, and {usual}; zero is needed at a solution"
        return "pass", f"{float(there.max()):.1e} at `solution`, {float(somewhere.median()):.1e} at random points"

    def _map(self) -> Outcome:
        x, _, y = self._sample()
        user_x = self.problem.layout.unpack(x)
        mapped, changed = _kept(self.problem.map, y, user_x)
        if mapped is None:
            return "absent", "it is not defined; updates that ask for a fixed-point map (Anderson) do not fit"
        if (wrong := changed or self._misshapen(mapped, tuple(y.shape))) is not None:
            return wrong
        best = self.problem.solution(user_x) if self._passed("solution") else None
        if best is None:
            return "pass", "one point per item; there is no solution to try it on"
        there = self.problem.map(best.to(y), user_x)
        assert there is not None, "it gave one just now"
        moved = (there - best).norm(dim=-1) / (1 + best.norm(dim=-1))
        if (moved > 1e-3).any():
            return "fail", f"it moves `solution` by {float(moved.max()):.3g}; a solution must be its fixed point"
        return "pass", f"it moves `solution` by {float(moved.max()):.1e}"

    def _convex(self) -> Outcome:
        if not self.problem.convex:
            return "absent", "it is not claimed (`convex = True`), so gradients certify nothing"
        x, v, _ = self._sample()
        domain = self.problem.domain
        for scale in (0.3, 1.0, 3.0):
            a, b = domain.project(scale * torch.randn_like(v)), domain.project(scale * torch.randn_like(v))
            middle = (a + b) / 2
            if (domain.violation(middle) > CLOSE * (1 + middle.norm(dim=-1))).any():
                return "fail", f"{type(domain).__name__} is not convex, so the problem is not; leave `convex` out"
            mean = (self._value(a, x) + self._value(b, x)).detach() / 2
            above = self._value(middle, x).detach() - mean
            if (above > CLOSE * mean.abs().clamp_min(1)).any():
                return "fail", f"a cost between two points is {float(above.max()):.3g} above their mean: f is not convex in y"
        return "pass", "no cost between two points is above their mean"

    def _passed(self, what: str, *also: Verdict) -> bool:
        return any(line.what == what and line.verdict in ("pass", *also) for line in self.lines)

    def _misshapen(self, given: object, shape: tuple[int, ...]) -> Outcome | None:
        if not isinstance(given, Tensor):
            return "fail", f"a {type(given).__name__} is returned; a tensor of shape {shape} is needed"
        if given.shape != shape:
            return "fail", f"shape {tuple(given.shape)} is returned; {shape} is needed"
        if not given.isfinite().all():
            return "fail", f"it holds {float(given[~given.isfinite()][0])}; finite numbers are needed"
        return None


class _Scale(NamedTuple):
    """At which precision differences are taken."""

    trial: _Trial
    x: Tensor  # (B, d)
    v: Tensor  # (B, inputs)
    size: float  # of a step, in v or y
    tol: float  # relative to the derivatives
    floor: float  # relative to the values


def _fits(verdicts: dict[str, Verdict]) -> tuple[list[Fit], list[Fit]]:
    """Models and losses, from what the checks said."""
    broken = [what for what in ("domain", "contexts", "cost", "cost, in place", "cost, finite", "cost, batch independence")
              if verdicts.get(what, "fail") == "fail"]  # fmt: skip
    if broken:
        why = f"{broken[0]} failed"
        return [Fit(name, False, why) for name in MODELS], [Fit(name, False, why) for name in LOSSES]
    smooth = verdicts["cost, gradient"] in ("pass", "warn")
    walled = verdicts["cost, finite"] == "warn"
    steps = smooth and not walled and verdicts["cost, gradient"] == "pass"
    no_gradient = "the cost has no useful gradient"
    no_steps = "its steps may end where the cost or its gradient is infinite" if smooth else no_gradient
    first_order = ", by adjoint=first_order" if verdicts["cost, second derivative"] == "warn" else ""
    solved = verdicts["solution"] == "pass"
    by = "" if smooth else ", trained by es, rl" + (" or regress" if solved else "")
    taught = "on what 50 steps of L-BFGS find, as `solution` is no help" if smooth else f"no `solution`, and {no_gradient}"
    values = "asks for values alone" + (", though a gradient is there" if smooth else "")
    models = [
        Fit("full", True, f"a network alone{by}"),
        Fit("choice", True, f"several predictions, of which values tell the cheapest{by}"),
        Fit("semi", steps, f"gradient steps after a network{first_order}" if steps else no_steps),
        Fit("recurrent", steps, "learned steps on gradients after a network" if steps else no_steps),
        Fit("latent", smooth, f"gradient steps in a latent space{first_order}" if smooth else no_gradient),
    ]
    losses = [
        Fit("objective", smooth, "the cost itself" if smooth else f"{no_gradient}; rl and es ask for values alone"),
        Fit("regress", solved or smooth, "on `solution`" if solved else taught),
        Fit("iterates", smooth, "the cost of every iterate" if smooth else no_gradient),
        Fit("rl", True, values),
        Fit("es", not walled, "its samples may end where the cost is infinite" if walled else values),
    ]
    return models, losses


def _device(problem: Problem) -> torch.device:
    for tensor in (*problem.parameters(), *problem.buffers()):
        return tensor.device
    return torch.device("cpu")


def _parts(x: X) -> list[Tensor]:
    return [part for _, part in _named(x)]


def _named(x: X) -> list[tuple[str, Tensor]]:
    return [("x", x)] if isinstance(x, Tensor) else [(f"x[{key!r}]", part) for key, part in x.items()]


def _kept(method: Callable[..., Any], y: Tensor | None, x: X) -> tuple[Any, Outcome | None]:
    """What a method of the problem gives for copies of y and x, and what is wrong if it changes them."""
    x = x.clone() if isinstance(x, Tensor) else {key: part.clone() for key, part in x.items()}
    given = ([] if y is None else [("y", y.clone())]) + _named(x)
    before = [part.clone() for _, part in given]
    found = method(*([] if y is None else [given[0][1]]), x)
    for (name, part), old in zip(given, before, strict=True):
        if part._version or not torch.equal(part, old):
            return found, (
                "fail",
                f"it changes {name} in place, which its caller goes on with; clone it first, {name}.clone(), or leave such "
                "operations out (add_, +=, [...] =)",
            )
    return found, None


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, but for what another floating dtype rounds."""
    return _close(a.double(), b.double()) if a.is_floating_point() else torch.equal(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= CLOSE * b.abs().clamp_min(1)).all())
