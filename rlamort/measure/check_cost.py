"""Checks of a problem's cost: shapes, values, batch independence, derivatives."""

import torch
from torch import Tensor, nn

from rlamort.measure.trial import ENTROPY, ROOT, Holdings, Outcome, Trial, close, kept


def cost(trial: Trial) -> Outcome:
    """Shape, dtype and device of f(y; x)."""
    x, _, y = trial.sample()
    for size in (trial.count, 1):
        cost = trial.f(y[:size], x[:size])  # which checks the type, shape and dtype
    if cost.device != y.device:
        return "fail", f"it is on {cost.device}, y on {y.device}; one device is needed"
    return "pass", f"({trial.count},) in {cost.dtype} for y of shape {tuple(y.shape)}"


def in_place(trial: Trial) -> Outcome:
    """Whether it modifies y or x in place, or, so that it costs something else each time, what the problem holds."""
    x, _, y = trial.sample()
    changed = kept(trial.problem.cost, y, trial.problem.layout.unpack(x))[1]
    if changed is not None:
        return changed
    before = Holdings.of(trial.problem)
    first, again = (trial.value(y, x).detach().nan_to_num() for _ in range(2))
    moved = before.moved(trial.problem)
    if moved and not close(again, first):  # a workspace, or what is computed once, may change
        i = int((again - first).abs().argmax())
        costs = f"item {i} costs {float(first[i]):.6g}, and {float(again[i]):.6g} when asked again"
        return "fail", f"it changes {', '.join(moved)} of the problem: {costs}; a function of y and x alone is needed"
    return "pass", "it does not modify y or x"


def finite(trial: Trial) -> Outcome:
    """Values at points where functions tend to fail."""
    x, v, _ = trial.sample()
    for scale in (0.0, 1.0, 3.0):
        cost = trial.value(trial.problem.domain.at(x).project(scale * v), x)
        if not cost.isfinite().all():
            odd = cost[~cost.isfinite()]
            where = f"y = project({scale:g} v) with v ~ N(0, 1)"
            return "fail", f"{len(odd)} of {trial.count} costs are {float(odd[0])} at {where}; finite numbers are needed"
    costs = {where: trial.value(y, x) for where, y in trial.special(x)}
    for where, cost in costs.items():
        if not (cost > -torch.inf).all():  # NaN is not
            odd = cost[~(cost > -torch.inf)]
            needed = f"a number, or inf, is needed ({ENTROPY})"
            return "fail", f"{len(odd)} of {trial.count} costs are {float(odd[0])} at {where}; {needed}"
    if infinite := [where for where, cost in costs.items() if not cost.isfinite().all()]:
        return "warn", f"it is infinite at {', '.join(infinite)}, where steps and samples may end"
    return "pass", f"at project(0), project(v) and project(3 v) with v ~ N(0, 1), {', '.join(costs)}"


def independent(trial: Trial) -> Outcome:
    """Whether an item's cost is independent of the others."""
    x, _, y = trial.sample()
    y.requires_grad_()
    cost = trial.value(y, x)
    if cost.requires_grad:
        for i in range(trial.count):
            slope = torch.autograd.grad(cost[i], y, retain_graph=True, allow_unused=True)[0]
            if slope is not None and (touched := [j for j in range(trial.count) if j != i and slope[j].any()]):
                return "fail", f"the cost of item {i} depends on y of item {touched[0]}; reduce over the last axes alone"
    x, y, cost = x.detach(), y.detach(), cost.detach()
    torch.manual_seed(trial.seed + 2)
    if not close(cost, trial.f(y, x).detach()):  # by noise of its own, so that items cannot be compared by value
        return "pass", "df_i/dy_j = 0; it draws random numbers, so values were not compared"
    order = torch.randperm(trial.count, device=trial.device)
    if not close(trial.value(y[order], x[order]).detach(), cost[order]):
        return "fail", "another order of the batch gives other costs; no item may depend on its neighbours"
    for i in range(trial.count):
        alone = trial.value(y[i : i + 1], x[i : i + 1]).detach()
        if not close(alone, cost[i : i + 1]):
            beside = f"{float(cost[i]):.6g} beside {trial.count - 1} others"
            return "fail", f"item {i} costs {float(alone):.6g} alone and {beside}; no item may depend on its neighbours"
    return "pass", "df_i/dy_j = 0; the same alone, and in any order"


def gradient(trial: Trial) -> Outcome:
    """df/dy, against finite differences."""
    x, v, _ = trial.sample()
    twin, x, v, size, tol, floor = trial.widened(x, v)
    project = twin.problem.domain.at(x).project

    def value(v: Tensor) -> Tensor:
        return twin.value(project(v), x)

    v.requires_grad_()
    cost = value(v)
    slope = torch.autograd.grad(cost.sum(), v, allow_unused=True)[0] if cost.requires_grad else None
    if slope is None:
        return (
            "absent",
            "it is not differentiable in y: something detaches, rounds, compares, or leaves torch",
        )
    if not slope.isfinite().all():
        return "fail", f"it holds {float(slope[~slope.isfinite()][0])}; finite numbers are needed"
    v, cost = v.detach(), cost.detach()
    agreed = compared = 0
    for k in range(4):
        torch.manual_seed(trial.seed + 10 + k)
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
    x, _, _ = trial.sample()
    infinite = []
    for where, y in trial.special(x):
        slope = trial.derivatives(y, x)[0]
        if slope.isnan().any():
            return "fail", f"{found}; it is nan at {where} ({ROOT}; {ENTROPY})"
        if not slope.isfinite().all():
            infinite.append(where)
    if infinite:
        return "warn", f"{found}; it is infinite at {', '.join(infinite)}, where steps of a solver may end"
    return "pass", found


def curvature(trial: Trial) -> Outcome:
    """The second derivative along a direction, against finite differences."""
    if not trial.passed("cost, gradient", "warn"):
        return "absent", "there is no first derivative"
    x, v, _ = trial.sample()
    twin, x, v, size, tol, floor = trial.widened(x, v)
    y = twin.problem.domain.at(x).project(v).detach().requires_grad_()
    direction = nn.functional.normalize(torch.randn_like(y), dim=-1)

    def slope(y: Tensor, graph: bool) -> Tensor:
        return torch.autograd.grad(twin.value(y, x).sum(), y, create_graph=graph)[0]

    advice = "semi-amortized models need model.adjoint=first_order"
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
        return "warn", f"it differs from finite differences, so some step is not differentiable; {advice}"
    x, _, _ = trial.sample()
    broken = [where for where, y in trial.special(x) if not trial.derivatives(y, x)[1].isfinite().all()]
    if broken:
        return "warn", f"it is not finite at {', '.join(broken)}; {advice} ({ROOT})"
    return "pass", "it agrees with finite differences" if second.any() else "zero"
