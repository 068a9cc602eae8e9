"""Problems with constraints: a dispatch said three ways, and the programs of DC3, beside OSQP, IPOPT and SciPy."""

import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from rlamort.domain import Box, Domain, PerItem, Polyhedron
from rlamort.measure.fit import HELD_OUT, SEED, amortize
from rlamort.measure.verdict import Measured, Verdict, at_least, at_most
from rlamort.problem import Problem
from rlamort.solve.by_scipy import by_scipy
from rlamort.solve.solver import Solver

TOLERANCE = 1e-4  # relative
UNITS = 30
ROUNDS = 5  # of timings, in turns


class ByPenalty(Problem[dict[str, Tensor]]):
    """Power of thirty units at the least cost; what is missing to the demand costs 50 times its square."""

    domain: Domain = Box([0.0] * UNITS, [2.0] * UNITS)
    convex = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.linspace(0.1, 1.1, UNITS))
        self.slope: Tensor

    def contexts(self, count: int) -> dict[str, Tensor]:
        return {"price": 1 + torch.rand(count, UNITS), "demand": 10 + 40 * torch.rand(count, 1)}

    def expense(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        """What the power costs, (B,)."""
        return (x["price"] * y + 0.5 * self.slope * y.square()).sum(-1)

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.expense(y, x) + 50 * (y.sum(-1, keepdim=True) - x["demand"]).square().sum(-1)


class ByEquation(ByPenalty):
    """The same, with the demand as an equation."""

    domain = Polyhedron(torch.eye(UNITS), 0.0, 2.0, torch.ones(1, UNITS), PerItem(1))

    def domain_data(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"b": x["demand"]}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.expense(y, x)


class ByRows(ByEquation):
    """The same, with every constraint a row of one matrix with bounds, as OSQP has it."""

    domain = Polyhedron(torch.cat([torch.ones(1, UNITS), torch.eye(UNITS)]), PerItem(UNITS + 1), PerItem(UNITS + 1))

    def domain_data(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ones = x["demand"].new_ones(len(x["demand"]), UNITS)
        return {"low": torch.cat([x["demand"], 0 * ones], -1), "high": torch.cat([x["demand"], 2 * ones], -1)}


def dispatch() -> Measured:
    """Dispatch as a penalty, as an equation and as rows: from the class to certified answers."""
    verdicts: list[Verdict] = []
    data: dict[str, Any] = {}
    for name, kind in {"penalty": ByPenalty, "equation": ByEquation, "rows": ByRows}.items():
        started = time.perf_counter()
        solver = amortize(kind, steps=1_000)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            x = kind().contexts(HELD_OUT)
        answer = solver.solve(x, rtol=TOLERANCE)
        seconds = time.perf_counter() - started
        certified = (answer.bound <= TOLERANCE * answer.cost.abs() * (1 + 1e-6)).double().mean().item()
        failed = sum(status.split(":")[0] not in ("predicted", "re-solved") for status in answer.status)
        verdicts += [
            at_least(f"{name}: share of {HELD_OUT} answers certified at a relative {TOLERANCE:g}", certified, 1),
            at_most(f"{name}: answers with another status than predicted or re-solved", failed, 0),
            at_most(f"{name}: largest violation", answer.violation.max().item(), 1e-6),
            at_most(f"{name}: seconds from the class to certified answers, training included", seconds, 180, " s"),
        ]
        data[name] = {"re-solved": answer.status.count("re-solved"), "training seconds": solver.training_seconds}
    return Measured(verdicts, data, {})


class Family(Problem[Tensor]):
    """min y'Q y / 2 + p'y subject to A y = x, G y <= h (Donti, Rolnick and Kolter, 2021, 4.1): 100 variables, 50 + 50 rows.

    Q is diagonal, uniform in [0, 1]; p uniform in [0, 1]; A and G normal; h the row sums of |G A^+|; x uniform in [-1, 1].
    """

    convex = True
    n, rows = 100, 50

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(17)
        self.register_buffer("Q", torch.rand(self.n, generator=generator, dtype=torch.float64).float())
        self.register_buffer("p", torch.rand(self.n, generator=generator, dtype=torch.float64).float())
        self.Q: Tensor
        self.p: Tensor
        self.A, self.G = (torch.randn(self.rows, self.n, generator=generator, dtype=torch.float64) for _ in range(2))
        self.h = (self.G @ torch.linalg.pinv(self.A)).abs().sum(-1)
        self.domain = Polyhedron(self.G, -torch.inf, self.h, self.A, PerItem(self.rows))

    def contexts(self, count: int) -> Tensor:
        return 2 * torch.rand(count, self.rows) - 1

    def domain_data(self, x: Tensor) -> dict[str, Tensor]:
        return {"b": x}

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return (0.5 * self.Q * y.square() + self.p * y).sum(-1)


class Wavy(Family):
    """The nonconvex variant, with sin y in place of y in the linear term."""

    convex = False

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return (0.5 * self.Q * y.square() + self.p * y.sin()).sum(-1)


def family() -> Measured:
    """DC3's quadratic programs: gap, violation, and speed beside OSQP."""
    solver = amortize(Family, hidden=(200, 200), steps=2_000, batch_size=256)
    x = _held_out(solver)
    y, best = solver.predict_rows(x), solver.exact(x.double())
    assert best is not None, "convex quadratic programs"
    problem = Family().double()
    cost, least = (problem.cost(one.double(), x.double()) for one in (y, best))
    gap = ((cost - least) / least.abs()).mean().item()
    violation = problem.domain.at(x.double()).violation(y.double()).max().item()
    rival, settings, theirs, reached = _osqp(problem, x, least, gap, max(violation, 1e-5))
    ours = [_seconds(lambda: solver.predict_rows(x)) for _ in range(ROUNDS)]
    exact = [_seconds(lambda: solver.exact(x)) for _ in range(ROUNDS)]
    speed = statistics.median(theirs) / statistics.median(ours)
    verdicts = [
        at_most("convex: mean gap of predictions, relative to |f*|", gap, 1e-2),
        at_most("convex: largest violation of predictions", violation, 1e-5),
        at_least(f"convex: speed beside OSQP ({rival}) at batch {len(x)}, at no better gap or violation of its own", speed, 50),
    ]
    data = {
        "osqp": settings, "osqp at equal quality": reached, "osqp seconds": theirs, "model seconds": ours,
        "exact seconds": exact, "training seconds": solver.training_seconds,
    }  # fmt: skip
    return Measured(verdicts, data, {})


def wavy(items: int = 20) -> Measured:
    """DC3's nonconvex variant: gap, violation, and speed beside IPOPT and SciPy's SLSQP, both at their defaults."""
    solver = amortize(Wavy, hidden=(200, 200), steps=2_000, batch_size=256)
    x = _held_out(solver)
    y = solver.predict_rows(x)
    problem = _Nonlinear().double()
    few = x[:items].double()
    begun = time.perf_counter()
    theirs = by_scipy(problem, few, y[:items].double() * 0)
    seconds = (time.perf_counter() - begun) / items
    interior, patience = _ipopt(problem, few)
    reference = solver.reference(x[:items], starts=2, y=y[:items])
    least = torch.fmin(theirs.cost.where(theirs.violation <= 1e-5, torch.nan), reference.cost.double())
    least = torch.fmin(least, interior)
    cost = problem.cost(y[:items].double(), few)
    gap = ((cost - least) / least.abs()).nanmean().item()
    violation = Family().double().domain.at(x.double()).violation(y.double()).max().item()
    ours = statistics.median(_seconds(lambda: solver.predict_rows(x)) for _ in range(ROUNDS)) / len(x)
    verdicts = [
        at_most("nonconvex: mean gap to the best of IPOPT, SLSQP and our reference, relative to |f|", gap, 1e-2),
        at_most("nonconvex: largest violation of predictions", violation, 1e-5),
        at_least("nonconvex: speed beside IPOPT, one item after another", patience / ours, 50),
        at_least("nonconvex: speed beside SLSQP, one item after another", seconds / ours, 50),
    ]
    below = {
        f"share of predictions below {name}": (cost < rival - 1e-6 * rival.abs()).double().mean().item()
        for name, rival in {"IPOPT": interior, "SLSQP": theirs.cost}.items()
    }
    seconds_each = {"model": ours, "IPOPT": patience, "SLSQP": seconds}
    return Measured(verdicts, {"seconds an item": seconds_each, **below, "items": items}, {})


def _ipopt(problem: "_Nonlinear", x: Tensor) -> tuple[Tensor, float]:
    """IPOPT's costs (B,) by CasADi, with exact derivatives and from zero, NaN where it fails; and its seconds an item."""
    import casadi  # an extra

    Q, p, A, G, h = (part.double().numpy() for part in (problem.Q, problem.p, problem.A, problem.G, problem.h))
    y, b = casadi.MX.sym("y", problem.n), casadi.MX.sym("b", problem.rows)
    f = casadi.dot(0.5 * Q * y, y) + casadi.dot(p, casadi.sin(y))
    rows = casadi.vertcat(casadi.mtimes(A, y) - b, casadi.mtimes(G, y) - h)
    program: dict[str, Any] = {"x": y, "p": b, "f": f, "g": rows}
    quiet: dict[str, Any] = {"print_time": False, "ipopt.print_level": 0, "ipopt.sb": "yes"}
    solver = casadi.nlpsol("solver", "ipopt", program, quiet)
    low, costs = np.concatenate([np.zeros(problem.rows), np.full(problem.rows, -np.inf)]), []
    begun = time.perf_counter()
    for item in x.numpy():
        found = solver(x0=0, p=item, lbg=low, ubg=0)
        costs.append(float(found["f"]) if solver.stats()["success"] else np.nan)
    return x.new_tensor(costs), (time.perf_counter() - begun) / len(x)


class _Nonlinear(Wavy):
    """The same for SciPy: rows as constraints on R^n."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = Box([-1e3] * self.n, [1e3] * self.n)

    def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return y @ self.A.T.to(y) - x, y @ self.G.T.to(y) - self.h.to(y)


def _held_out(solver: Solver) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return solver.draw(HELD_OUT)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _osqp(
    problem: Family, x: Tensor, least: Tensor, gap: float, violation: float
) -> tuple[str, dict[str, Any], list[float], bool]:
    """The fastest setting of OSQP whose mean gap and largest violation are no worse, with its seconds for all items."""
    import osqp  # type: ignore[import-untyped]  # an extra

    both = scipy.sparse.csc_matrix(torch.cat([problem.A, problem.G]).numpy())
    P, p = scipy.sparse.diags(problem.Q.numpy(), format="csc"), problem.p.numpy()
    low = np.concatenate([np.zeros(problem.rows), np.full(problem.rows, -np.inf)])
    high = np.concatenate([np.zeros(problem.rows), problem.h.numpy()])

    def part(items: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
        solver, least, most = osqp.OSQP(), low.copy(), high.copy()
        solver.setup(P, p, both, least, most, verbose=False, max_iter=20_000, **settings)
        found = []
        for b in items:
            least[: problem.rows] = most[: problem.rows] = b
            solver.update(l=least, u=most)
            found.append(solver.solve().x)
        return np.stack(found)

    def run(threads: int, **settings: Any) -> np.ndarray:
        """All items, in as many threads, each with a solver that is set up once; OSQP gives Python's lock back."""
        shares = np.array_split(x.double().numpy(), threads)
        with ThreadPoolExecutor(threads) as pool:
            return np.concatenate(list(pool.map(lambda items: part(items, settings), shares)))

    fastest: tuple[float, dict[str, Any]] | None = None
    for eps, polish, threads in itertools.product((1e-3, 1e-4, 1e-5, 1e-6), (False, True), {1, torch.get_num_threads()}):
        settings: dict[str, Any] = {"eps_abs": eps, "eps_rel": eps, "polishing": polish, "threads": threads}
        begun = time.perf_counter()
        y = torch.from_numpy(run(**settings))
        seconds = time.perf_counter() - begun
        cost = problem.cost(y, x.double())
        theirs = ((cost - least) / least.abs()).abs().mean().item()
        off = problem.domain.at(x.double()).violation(y).max().item()
        if theirs <= max(gap, 1e-6) and off <= violation and (fastest is None or seconds < fastest[0]):
            fastest = seconds, settings
    closest: dict[str, Any] = {"eps_abs": 1e-6, "eps_rel": 1e-6, "polishing": True, "threads": 1}
    chosen = closest if fastest is None else fastest[1]
    named = f"eps {chosen['eps_abs']:g}, {'polished' if chosen['polishing'] else 'not polished'}, {chosen['threads']} threads"
    return named, chosen, [_seconds(lambda: run(**chosen)) for _ in range(ROUNDS)], fastest is not None
