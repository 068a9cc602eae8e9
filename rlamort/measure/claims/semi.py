"""Semi-amortized models beside the networks alone that they refine, in as many updates, on ten problems."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from rlamort.constraints import Constraints, Penalised
from rlamort.env.one_step import problem_of
from rlamort.measure.claims import choosing, constrained, user
from rlamort.measure.fit import HELD_OUT, SEED, amortize
from rlamort.measure.verdict import Measured, at_most
from rlamort.problem import Problem

UPDATES = 1_000
SEEDS = (0, 1, 2)
WEIGHT = 100.0  # of the penalty, where constraints are not a domain
PROBLEMS: dict[str, Callable[[], Problem[Any]]] = {
    "portfolio": user.Portfolio,
    "portfolio with risks": choosing.Portfolio,
    "crates, a piecewise constant cost": choosing.Crates,
    "dispatch by a penalty": constrained.ByPenalty,
    "dispatch by an equation": constrained.ByEquation,
    "DC3's nonconvex programs": constrained.Wavy,
    "arm": lambda: problem_of("rlamort/Arm-v0"),
    "arm beside an obstacle": lambda: problem_of("rlamort/ObstacleArm-v0"),
    "sphere": lambda: problem_of("rlamort/Sphere-v0"),
    "lasso": lambda: problem_of("rlamort/Lasso-v0"),
}


def measure() -> Measured:
    """What `semi` costs above `full` on held-out contexts, over seeds, beyond the noise of two standard errors."""
    verdicts, data, infinite = [], {}, 0
    for name, make in PROBLEMS.items():
        costs = {model: [_cost(make(), model, seed) for seed in SEEDS] for model in ("full", "semi")}
        above = [semi - full for full, semi in zip(costs["full"], costs["semi"], strict=True)]
        infinite += sum(not math.isfinite(cost) for cost in costs["semi"])
        noise = 2 * statistics.stdev(above) / math.sqrt(len(SEEDS))
        claim = f"{name}: mean cost of semi above full, less two standard errors over {len(SEEDS)} seeds"
        verdicts.append(at_most(claim, statistics.mean(above) - noise, 0))
        data[name] = costs
    verdicts.append(at_most("mean costs of semi that are not finite", infinite, 0))
    return Measured(verdicts, data, {})


def _cost(problem: Problem[Any], model: str, seed: int) -> float:
    """The mean cost on held-out contexts after training."""
    print(f"training: {type(problem).__name__}, {model}, seed {seed}", flush=True)
    constraints = Constraints.of(problem)
    loss = "objective" if constraints is None else {"kind": "penalty", "weight": WEIGHT}
    solver = amortize(problem, model=model, loss=loss, steps=UPDATES, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x = solver.draw(HELD_OUT)
    f = solver.f if constraints is None else Penalised(solver.f, constraints, WEIGHT)
    with torch.no_grad():
        return f(solver.predict_rows(x), x).mean().item()
