"""Checks of the parts of a problem beside its cost: domain, contexts, solution, residual, map, convexity."""

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor

from rlamort.constraints import Constraints
from rlamort.domain import Domain, within
from rlamort.errors import UserError
from rlamort.measure.trial import CLOSE, Outcome, Trial, kept, parts, same, unit
from rlamort.problem import Layout
from rlamort.solve.classical import starting
from rlamort.solve.constrained import met
from rlamort.solve.lagrangian import Zero, augmented_lagrangian
from rlamort.solve.quadratic import exactly


def domain(trial: Trial) -> Outcome:
    """Y: whether its maps return points of it."""
    domain = getattr(trial.problem, "domain", None)
    if not isinstance(domain, Domain):
        given = "nothing" if domain is None else f"a {type(domain).__name__}"
        return "fail", f"{given} is given; a domain of rlamort.domain is needed, such as Box, Simplex or Euclid"
    if domain.needs:  # C(x): the set of some contexts, which have a check of their own later
        domain = domain.at(trial.rows(trial.problem.contexts(trial.count)))
    shape = (trial.count, domain.dim)
    y = domain.project(torch.randn(trial.count, domain.inputs, device=trial.device))
    if y.shape != shape:
        return "fail", f"project gives shape {tuple(y.shape)} for {trial.count} points; {shape} is needed"
    for scale in (1e-3, 1.0, 1e3, 1e6):
        v, y = (scale * torch.randn(trial.count, size, device=trial.device) for size in (domain.inputs, domain.dim))
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


def contexts(trial: Trial) -> Outcome:
    """Shapes, devices and numbers of x."""
    layout = Layout.of(type(trial.problem).__name__, trial.problem.contexts(2))
    if not layout.shapes:
        return "fail", "an empty dict is given; at least one tensor is needed"
    for count in (1, trial.count):
        x = trial.problem.contexts(count)
        keys = tuple(x) if isinstance(x, dict) else None
        if keys != layout.keys:
            return "fail", f"contexts({count}) gives {keys or 'a tensor'}; contexts(2) gives {layout.keys or 'a tensor'}"
        for name, part, shape in zip(keys or ("",), parts(x), layout.shapes, strict=True):
            where = f"contexts({count})" + (f"[{name!r}]" if name else "")
            if part.shape != (count, *shape):
                return "fail", f"{where} has shape {tuple(part.shape)}; {(count, *shape)} is needed"
            if part.device.type != trial.device.type:
                return "fail", f"{where} is on {part.device}, the problem on {trial.device}; one device is needed"
            if part.is_floating_point() and not part.isfinite().all():
                return "fail", f"{where} holds {float(part[~part.isfinite()][0])}; finite numbers are needed"
    back = layout.unpack(trial.rows(x))
    lossy = [part.dtype for part, other in zip(parts(x), parts(back), strict=True) if not same(part, other)]
    if lossy:
        return "fail", f"numbers of {lossy[0]} do not survive in {torch.get_default_dtype()}, in which networks see them"
    return "pass", f"{layout.dim} numbers in {len(layout.shapes)} {'tensor' if layout.keys is None else 'named tensors'}"


def reproducible(trial: Trial) -> Outcome:
    """Whether a seed determines the contexts."""
    drawn = []
    for seed in (trial.seed, trial.seed, trial.seed + 1):
        torch.manual_seed(seed)
        drawn.append(parts(trial.problem.contexts(trial.count)))
    first, again, other = drawn
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        return "fail", "the same seed gives different contexts; draw from torch's generator alone (torch.randn, torch.rand)"
    if all(torch.equal(a, b) for a, b in zip(first, other, strict=True)):
        return "warn", "every seed gives the same contexts, so there is nothing to generalise to"
    return "pass", "the same seed gives the same contexts, another one others"


def devices(trial: Trial) -> Outcome:
    """Whether all tensors of the problem move to another device."""
    plain = [
        name
        for holder in (vars(trial.problem), vars(type(trial.problem)))
        for name, value in holder.items()
        if isinstance(value, Tensor)
    ]
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        moved = copy.deepcopy(trial.problem).to(device)
        twin = Trial(moved, trial.count, trial.seed, device)
        x = twin.rows(moved.contexts(trial.count))
        twin.f(moved.domain.at(x).project(torch.randn(trial.count, moved.domain.inputs, device=device)), x)
        return "pass", "it moves to a GPU, and works there"
    if plain:
        held = ", ".join(plain)
        return (
            "warn",
            f"{held} would stay behind when the problem moves to a GPU; use self.register_buffer(name, tensor)",
        )
    return "pass", f"all that it holds is on {trial.device}, and would move to a GPU"


def solution(trial: Trial) -> Outcome:
    """Whether it is in Y and meets the constraints, and no better point that does is found."""
    x, v, _ = trial.sample()
    best, changed = kept(trial.problem.solution, None, trial.problem.layout.unpack(x))
    if best is None:
        return "absent", "it is not defined; the best of reference solvers is used instead"
    domain = trial.problem.domain.at(x)
    if (wrong := changed or trial.misshapen(best, (trial.count, domain.dim))) is not None:
        return wrong
    best = best.to(x)
    outside = domain.violation(best)
    if (outside > CLOSE * (1 + best.norm(dim=-1))).any():
        return "fail", f"it lies up to {float(outside.max()):.3g} outside {type(domain).__name__}; a point in it is needed"
    held = Constraints.of(trial.problem)
    if held is not None and not met(held, best, x).all():
        off = float(held.violation(best, x).max())
        return "fail", f"it violates the constraints by up to {off:.3g}; a point that meets them is needed"
    twin, x, v, *_ = trial.widened(x, v)
    best, domain, held = best.to(x), twin.problem.domain.at(x), held and Constraints.of(twin.problem)
    cost = twin.value(best, x).detach()
    candidates = [domain.project(scale * torch.randn_like(v)) for scale in (0.3, 1.0, 3.0) for _ in range(8)]
    for size in (1e-1, 1e-2, 1e-3):
        candidates += [domain.nearest(best + size * torch.randn_like(best)) for _ in range(8)]
    if trial.passed("cost, gradient", "warn"):
        slope = twin.f.oracle(x).grad(best)
        candidates += [domain.nearest(best - 10.0**-k * slope) for k in range(6)]
    values = torch.stack([twin.value(candidate, x).detach() for candidate in candidates])  # (tries, B)
    near = unit(torch.cat([values, cost[None]]))
    if held is not None:  # what violates them by more than it does is no rival
        least = held.violation(best, x)
        values = values.where(torch.stack([held.violation(candidate, x) <= least for candidate in candidates]), torch.inf)
    better = (cost - values.nan_to_num(float("inf")).amin(0)) / torch.maximum(cost.abs(), near)
    if better.max() > CLOSE or not cost.isfinite().all():
        i = int(better.argmax())
        found = float(values[:, i].nan_to_num(float("inf")).min())
        return (
            "fail",
            f"item {i} costs {float(cost[i]):.6g}, and {found:.6g} was found in a few trials; a minimiser is needed",
        )
    rivals = f"{len(candidates)} other points" + ("" if held is None else ", where these meet the constraints")
    return "pass", f"in {type(domain).__name__}, and better than {rivals}"


def residual(trial: Trial) -> Outcome:
    """Whether it is zero at a solution, and nowhere negative."""
    x, _, y = trial.sample()
    user_x = trial.problem.layout.unpack(x)
    somewhere, changed = kept(trial.problem.residual, y, user_x)
    if somewhere is None:
        return "absent", "it is not defined; without it, or convexity, certificates are statistical"
    if (wrong := changed or trial.misshapen(somewhere, (trial.count,))) is not None:
        return wrong
    if (somewhere < 0).any():
        return "fail", f"it is {float(somewhere.min()):.3g} for some y; it must not be negative"
    best = trial.problem.solution(user_x) if trial.passed("solution") else None
    if best is None:
        return "pass", "one number per item, none negative; there is no solution to try it on"
    there = trial.problem.residual(best.to(y), user_x)
    assert there is not None, "it gave one just now"
    if (there > 1e-3 * somewhere.median() + CLOSE).any():
        usual = f"{float(somewhere.median()):.3g} at random points"
        return "fail", f"it is {float(there.max()):.3g} at `solution`, and {usual}; zero is needed at a solution"
    return "pass", f"{float(there.max()):.1e} at `solution`, {float(somewhere.median()):.1e} at random points"


def map(trial: Trial) -> Outcome:
    """Whether a solution is its fixed point."""
    x, _, y = trial.sample()
    user_x = trial.problem.layout.unpack(x)
    mapped, changed = kept(trial.problem.map, y, user_x)
    if mapped is None:
        return "absent", "it is not defined; updates that need a fixed-point map (Anderson) do not fit"
    if (wrong := changed or trial.misshapen(mapped, tuple(y.shape))) is not None:
        return wrong
    best = trial.problem.solution(user_x) if trial.passed("solution") else None
    if best is None:
        return "pass", "one point per item; there is no solution to try it on"
    there = trial.problem.map(best.to(y), user_x)
    assert there is not None, "it gave one just now"
    moved = (there - best).norm(dim=-1) / (1 + best.norm(dim=-1))
    if (moved > 1e-3).any():
        return "fail", f"it moves `solution` by {float(moved.max()):.3g}; a solution must be its fixed point"
    return "pass", f"it moves `solution` by {float(moved.max()):.1e}"


def convex(trial: Trial) -> Outcome:
    """The claim, on chords."""
    if not trial.problem.convex:
        return "absent", "it is not claimed (`convex = True`), so gradients certify nothing"
    x, v, _ = trial.sample()
    twin, x, v, *_ = trial.widened(x, v)
    domain = twin.problem.domain.at(x)
    for scale in (0.3, 1.0, 3.0):
        a, b = domain.project(scale * torch.randn_like(v)), domain.project(scale * torch.randn_like(v))
        middle = (a + b) / 2
        if (domain.violation(middle) > CLOSE * (1 + middle.norm(dim=-1))).any():
            return "fail", f"{type(domain).__name__} is not convex, so the problem is not; leave `convex` out"
        ends = torch.stack([twin.value(a, x), twin.value(b, x)]).detach()
        mean = ends.mean(0)
        above = twin.value(middle, x).detach() - mean
        if (above > CLOSE * torch.maximum(mean.abs(), unit(ends))).any():
            return "fail", f"a cost between two points is {float(above.max()):.3g} above their mean: f is not convex in y"
    solved = exactly(twin.f, twin.problem.domain, x)
    program = "" if solved is None or not solved.isfinite().all() else "; it is a quadratic program, which is solved exactly"
    return "pass", f"no cost between two points is above their mean{program}"


def constraints(trial: Trial) -> Outcome:
    """Values and derivatives of constraints, points that meet them, and whether equalities are independent there."""
    found = Constraints.of(trial.problem)
    if found is None:
        return "absent", "there are none beside the domain"
    x, v, y = trial.sample()
    found.check(y, x)
    twin, x, v, size, tol, floor = trial.widened(x, v)
    wide = Constraints.of(twin.problem) or found
    y = twin.problem.domain.at(x).project(v)
    direction = torch.nn.functional.normalize(torch.randn_like(y), dim=-1)
    values, along = torch.autograd.functional.jvp(  # type: ignore[no-untyped-call]
        lambda y: torch.cat(wide(y, x), -1), y, direction
    )
    ahead, behind = (torch.cat(wide(y + sign * size * direction, x), -1).detach() for sign in (1, -1))
    difference = (ahead - behind) / (2 * size)
    allowed = 10 * tol * torch.maximum(along.abs(), difference.abs()) + floor * values.abs().clamp_min(1)
    if ((along - difference).abs() > allowed).double().mean() > 0.2:  # a few may lie at kinks
        return "fail", "their derivatives differ from finite differences, so some step is not differentiable"
    domain = twin.problem.domain
    ends = augmented_lagrangian(Zero(), wide, domain, x, starting(domain, 4, x))
    lost = [i for i, status in enumerate(ends.status) if status.startswith("infeasible")]
    h, g = wide(ends.y, x)
    count = f"{h.shape[1]} equalities, {g.shape[1]} inequalities"
    if lost:
        where = f"{len(lost)} of {len(x)} contexts, of which {lost[0]} is the first"
        return "warn", f"{count}; no point that meets them was found for {where}"
    if h.shape[1]:
        rows = [gradient_of(lambda y, i=i: wide(y, x)[0][:, i].sum(), ends.y) for i in range(h.shape[1])]  # type: ignore[misc]
        jacobian = torch.stack(rows, 1)  # (B, m, n): items are independent
        least = torch.linalg.svdvals(jacobian / jacobian.norm(dim=-1, keepdim=True).clamp_min(1e-300))[:, -1].amin().item()
        if least < 1e-6:
            return "warn", f"{count}; equalities depend on each other at feasible points, so multipliers are not unique"
    return "pass", f"{count}; derivatives agree with finite differences, and every context tried has a point that meets them"


def gradient_of(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """The gradient of a scalar function at y."""
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(at), at, allow_unused=True, materialize_grads=True)
    return slope
