"""A user's problem of ten lines with `rlamort amortize`: quality, certificates, and time."""

import time

import torch

from rlamort.domain import Simplex
from rlamort.measure.fit import HELD_OUT, SEED, amortize
from rlamort.measure.verdict import Measured, at_least, at_most
from rlamort.problem import Problem

TOLERANCE = 1e-4
MANY = 10_000


class Portfolio(Problem[torch.Tensor]):
    """The most of x'y at a price of |y|^2 / 2, y on the simplex; y* is the point of the simplex nearest to x."""

    domain = Simplex(20)
    convex = True

    def contexts(self, count: int) -> torch.Tensor:
        return torch.randn(count, 20)

    def cost(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)


def measure() -> Measured:
    """From the class to certified solutions, on held-out contexts."""
    started = time.perf_counter()
    solver = amortize(Portfolio, model="semi")
    trained = time.perf_counter() - started
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x = torch.randn(HELD_OUT, 20)
        many = torch.randn(MANY, 20)
    best = solver.f(Portfolio.domain.nearest(x), x)
    relative = ((solver.f(solver.predict(x), x) - best).mean() / best.abs().mean()).item()
    solved = solver.solve(x, tol=TOLERANCE, certify=True)
    whole = time.perf_counter() - started
    share = (solved.bound <= TOLERANCE).double().mean().item()
    honest = (solved.cost - best <= solved.bound + 1e-6).double().mean().item()
    again = sum(status.startswith("re-solved") for status in solved.status)
    solver.predict(many)
    begun = time.perf_counter()
    solver.predict(many)
    passed = time.perf_counter() - begun
    verdicts = [
        at_most("semi: mean gap over mean |f*|, against the exact solution", relative, 1e-3),
        at_least(f"share of {HELD_OUT} answers certified at {TOLERANCE:g} by the duality gap", share, 1),
        at_least("share of those bounds that hold, against the exact solution", honest, 1),
        at_most("seconds from the class to certified answers, training included", whole, 180, " s"),
    ]
    data = {"relative gap": relative, "training seconds": trained, "re-solved": again, f"seconds for {MANY}": passed}
    return Measured(verdicts, data, {})
