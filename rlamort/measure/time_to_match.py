"""Time of solvers to match a policy, by its critic.

x state (B, d) · y action (B, n) in [-1, 1]^n · f = -Q · K iterations · times are seconds, or multiples of the policy's own
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlamort.domain import Domain
from rlamort.env import Policy
from rlamort.measure.report import Report, table
from rlamort.objective import Objective
from rlamort.solve.classical import PROJECTED, Minimiser, extended
from rlamort.update import Adam, Cem, InChart, InY, Lbfgs, Projected, Update

REPEATS, WITHIN = 50, 0.1  # repetitions of a timed call, and seconds; slow calls have fewer, but five
RATES = (0.03, 0.1, 0.3, 1.0)  # of Adam
FROM = (1, 2, 4, 8)  # starts of a solver
PATIENCE = 200  # iterations of a solver; a quarter of that for L-BFGS, an eighth for CEM, whose iterations are longer
TUTORIAL = (5e-3, 500)  # rate and steps of the Adam of the tutorial's protocol
WANTED = 0.01  # target gap, relative to that of the zero action


class Setting(NamedTuple):
    """A solver's settings, apart from its starts."""

    kind: str
    form: str  # settings of the same kind and form have the same time per iteration
    solver: Minimiser


def settings(patience: int) -> list[Setting]:
    """The tuning grid of solvers, apart from their starts. All stay in the box: by projection, or through tanh."""
    grid = [Setting("projected gradient", "", PROJECTED._replace(iterations=patience))]
    for form, space in (("projected", InY), ("through tanh", InChart)):
        for rate in RATES:
            name, update = f"Adam at {rate:g}, {form}", functools.partial(_adam, rate)
            grid.append(Setting("Adam", form, Minimiser(name, update, space, patience)))
        for sizes in (3, 10):
            name, update = f"L-BFGS of {sizes} step sizes, {form}", functools.partial(_lbfgs, sizes)
            grid.append(Setting("L-BFGS", f"{form}, {sizes}", Minimiser(name, update, space, patience // 4)))
    for samples, elites in ((16, 2), (16, 4), (64, 8), (64, 16)):
        name, update = f"CEM of {samples} samples, {elites} elites", functools.partial(_cem, samples, elites)
        grid.append(Setting("CEM", str(samples), Minimiser(name, update, InY, patience // 8)))
    return grid


# steps that are projected, so that bounds are reached exactly; in the chart that changes nothing


def _adam(rate: float, domain: Domain) -> Update:
    return Projected(Adam(rate), domain)


def _lbfgs(candidates: int, domain: Domain) -> Update:
    return Projected(Lbfgs(domain, candidates=candidates), domain)


def _cem(samples: int, elites: int, domain: Domain) -> Update:
    return Projected(Cem(domain, samples, elites, sigma=0.5), domain)


class Tried(NamedTuple):
    """A setting with a number of starts, and its costs."""

    setting: Setting
    starts: int
    mean: Tensor  # (K,) mean over states of the lowest cost so far

    def iterations(self, cost: float) -> int | None:
        """The iterations to a cost; None if it is not reached."""
        low = self.mean <= cost
        return int(low.int().argmax()) + 1 if bool(low.any()) else None


class Timed(NamedTuple):
    """The time of a solver with a number of starts, in its fastest setting."""

    kind: str
    goal: str
    batch: int
    starts: int
    setting: str
    iterations: int
    seconds: float
    times: float  # in multiples of the policy's time


def time_to_match(
    f: Objective, domain: Domain, x: Tensor, policy: Policy, costs: dict[str, np.ndarray], patience: int
) -> Report:
    """Time of each solver in multiples of the policy's: to the policy's own cost, and to a gap of 1 %.

    Iterations are counted on all states together, by the mean over states of the lowest cost so far; then they are
    timed without that bookkeeping. The first start is the zero action; several are solved in one batch.
    """
    best, zero, own = (float(costs[name].mean()) for name in ("best", "zero", "policy"))
    goals = {"the policy's cost": own, f"a gap of {100 * WANTED:g} %": best + WANTED * (zero - best)}
    batches = [x] if len(x) == 1 else [x[:1], x]
    forward = {len(part): timed(functools.partial(policy, part), x.device, within=2.0) for part in batches}
    weights = x.new_zeros(x.shape[1], domain.dim)  # any policy multiplies its state by some, once at least
    least = {len(part): timed(functools.partial(torch.matmul, part, weights), x.device) for part in batches}
    tried = [one for setting in settings(patience) for one in _walk(f, domain, x, setting, min(goals.values()))]
    iteration: dict[tuple[str, str, int, int], float] = {}
    found: dict[tuple[str, str, int, int], Timed] = {}
    for (goal, cost), part, one in itertools.product(goals.items(), batches, tried):
        count, size, solver = one.iterations(cost), len(part), one.setting.solver
        if count is None:
            continue
        form = one.setting.kind, one.setting.form, one.starts, size
        if form not in iteration:
            iteration[form] = _iteration(f, domain, part, solver, one.starts)
        seconds = count * iteration[form]
        mine = Timed(one.setting.kind, goal, size, one.starts, solver.name, count, seconds, seconds / forward[size])
        place = one.setting.kind, goal, size, one.starts
        found[place] = min(found.get(place, mine), mine, key=lambda timed: timed.seconds)
    rows = []
    for kind, goal in itertools.product(dict.fromkeys(one.setting.kind for one in tried), goals):
        cells = [_fastest(found.values(), kind, goal, len(part)) for part in batches]
        rows.append([kind, goal, *("not reached" if one is None else _describe(one) for one in cells)])
    lines = [
        "the policy, one call: " + ", ".join(f"{1e3 * seconds:.3f} ms at batch {size}" for size, seconds in forward.items()),
        f"solvers from {', '.join(map(str, FROM))} starts, the fastest of {len(settings(patience))} settings:",
        *table(["solver", "to", *(f"batch {size}" for size in forward)], rows),
    ]
    curves = {}
    for kind in dict.fromkeys(one.setting.kind for one in tried):
        fastest = _fastest(found.values(), kind, list(goals)[-1], len(x))
        if fastest is not None:
            (same,) = (this for this in tried if (this.setting.solver.name, this.starts) == (fastest.setting, fastest.starts))
            curves[kind] = {
                "setting": _describe(fastest), "seconds_per_iteration": fastest.seconds / fastest.iterations,
                "gap": ((same.mean - best) / (zero - best)).tolist(),
            }  # fmt: skip
    data = {
        "policy_seconds": forward, "least_seconds": least, "solvers": [one._asdict() for one in found.values()],
        "curves": curves,
    }  # fmt: skip
    return Report(lines, data)


def _fastest(found: Iterable[Timed], kind: str, goal: str, batch: int) -> Timed | None:
    """The fastest over the numbers of starts."""
    same = [one for one in found if (one.kind, one.goal, one.batch) == (kind, goal, batch)]
    return min(same, key=lambda one: one.seconds, default=None)


def _describe(one: Timed) -> str:
    start = f"{one.starts} start{'s'[: one.starts - 1]}"
    return f"{one.times:.0f}x: {one.setting}, {start}, {one.iterations} iteration{'s'[: one.iterations - 1]}"


def _path(f: Objective, domain: Domain, x: Tensor, solver: Minimiser, starts: int) -> Iterator[Tensor]:
    """A solver's iterates (starts, B, n), from the zero action and from fixed points."""
    v = torch.randn(starts, domain.inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    v[0] = 0
    return solver.iterates(f, domain, x, v[:, None].expand(-1, len(x), -1))


@torch.no_grad()
def _walk(f: Objective, domain: Domain, x: Tensor, setting: Setting, wanted: float) -> list[Tried]:
    """Costs of a setting for each number of starts, until all reach the target. Items are independent."""
    solver, starts = setting.solver, max(FROM)
    many, lowest, means = x.repeat(starts, 1), x.new_full((starts, len(x)), torch.inf), []
    counts = torch.tensor(FROM, device=x.device) - 1
    for y in itertools.islice(_path(f, domain, x, solver, starts), solver.iterations):
        lowest = torch.fmin(lowest, extended(f, domain, y.flatten(0, 1), many).view(starts, -1))
        means.append(lowest.cummin(0).values.double().mean(-1)[counts])
        if bool((means[-1] <= wanted).all()):
            break
    return [Tried(setting, count, mean) for count, mean in zip(FROM, torch.stack(means, dim=-1), strict=True)]


@torch.no_grad()
def _iteration(f: Objective, domain: Domain, x: Tensor, solver: Minimiser, starts: int) -> float:
    """Seconds per iteration, warm."""
    path = _path(f, domain, x, solver, starts)
    return timed(lambda: next(path), x.device)


def tutorial(f: Objective, x: Tensor, policy: Policy, costs: dict[str, np.ndarray]) -> Report:
    """The tutorial's protocol: Adam on the mean over all states, from zero, unconstrained.

    v is its measure of quality, (f_policy - f) / (f_zero - f_policy): -1 for the zero action, 0 for the policy; unclipped here.
    """
    rate, steps = TUTORIAL
    y = torch.zeros_like(policy(x))
    y.requires_grad_()
    adam = torch.optim.Adam([y], lr=rate)

    def step() -> None:
        adam.zero_grad()
        with torch.enable_grad():
            f(y, x).mean().backward()  # type: ignore[no-untyped-call]
        adam.step()

    start = time.perf_counter()
    for _ in range(steps):
        step()
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    seconds = time.perf_counter() - start
    own, zero = float(costs["policy"].mean()), float(costs["zero"].mean())
    with torch.no_grad():
        value = (own - f(y, x).mean().item()) / (zero - own)
        outside = (y.abs() > 1).any(-1).double().mean().item()
    times = seconds / timed(functools.partial(policy, x), x.device, within=2.0)
    line = (
        f"the tutorial's protocol, at unequal quality: {steps} steps of Adam at {rate:g} from zero, unconstrained, on all "
        f"states at once: {times:.0f}x; v = {value:.3g} (policy 0, zero action -1), outside the box in {100 * outside:.0f} %"
    )
    return Report([line], {"times_the_policy": times, "seconds": seconds, "v": value, "outside": outside})


def timed(
    call: Callable[[], Any], device: torch.device, within: float = WITHIN, statistic: Callable[[list[float]], Any] = np.median
) -> float:
    """Median seconds of a call, or another statistic, warm and synchronised, over REPEATS, or as many as fit `within` seconds,
    at least 5."""
    taken: list[float] = []
    while len(taken) < 3 + 5 or (len(taken) < 3 + REPEATS and sum(taken) < within):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return float(statistic(taken[3:]))
