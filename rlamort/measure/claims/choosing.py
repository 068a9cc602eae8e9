"""Models and losses (tutorial, section 4.1.3): all pairs that fit, with the same network, batch and updates.

y solution (B, n) · x context · f cost (B,)
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlamort.domain import Box, Simplex
from rlamort.envs.sphere import Sphere
from rlamort.measure.fit import HELD_OUT, SEED, amortize
from rlamort.measure.report import table
from rlamort.measure.verdict import Measured, Verdict, at_least
from rlamort.model import Model
from rlamort.problem import Problem
from rlamort.score import interval
from rlamort.solve.solver import Solver

SEEDS = (0, 1, 2)
FIELDS = {"batch_size": 64, "hidden": (64, 64)}
RATE = 1e-2  # of learning, for all
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # the best of which the loser of a claim is given
LOSSES = ("objective", "regress", "iterates", "es", "rl")
BESIDES: dict[str, dict[str, Any]] = {  # what only they have; TD3 learns nothing at the others' rate
    "es": {"loss.pairs": 4},
    "rl": {"learning_rate": 1e-3, "warmup_steps": 64, "update_after": 1},
}


class Contestant(NamedTuple):
    """A model, its losses, and the number of updates."""

    model: str
    losses: tuple[str, ...]
    updates: int = 300


CONTESTANTS = {  # iterates differs from objective only where there are some
    "full": Contestant("full", ("objective", "regress", "es", "rl")),
    "choice": Contestant("choice", ("objective",)),
    "semi": Contestant("semi", ("objective", "regress", "iterates", "es")),
    "recurrent": Contestant("recurrent", ("objective", "regress", "iterates", "es")),
    "latent": Contestant("latent", ("objective", "regress")),
    "full, seven times the updates": Contestant("full", ("objective", "regress", "es", "rl"), 2_100),  # in the time of semi
}


class Portfolio(Problem[dict[str, Tensor]]):
    """Maximise gain'y - risk'y^2, y on the simplex of twenty assets."""

    domain = Simplex(20)
    convex = True

    def contexts(self, count: int) -> dict[str, Tensor]:
        return {"gain": torch.randn(count, 20), "risk": 0.2 + torch.rand(count, 20)}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return (x["risk"] * y.square() - x["gain"] * y).sum(-1)

    def solution(self, x: dict[str, Tensor]) -> Tensor:
        """y_i = max(0, gain_i - nu) / (2 risk_i), the multiplier nu so that they sum to 1: it is that of the k best assets."""
        gain, order = x["gain"].sort(dim=-1, descending=True)
        weight = 0.5 / x["risk"].gather(-1, order)
        nu = ((gain * weight).cumsum(-1) - 1) / weight.cumsum(-1)  # (B, n), of the k best for every k
        k = (gain > nu).sum(-1, keepdim=True) - 1
        return (x["gain"] - nu.gather(-1, k)).clamp_min(0) * 0.5 / x["risk"]


class Crates(Problem[dict[str, Tensor]]):
    """Goods that are bought by the crate: y is rounded, so the cost is piecewise constant.

    A crate of a good costs its price, and a crate's worth of demand that is not met costs 1.
    """

    domain = Box([0.0] * 6, [8.0] * 6)

    def contexts(self, count: int) -> dict[str, Tensor]:
        return {"demand": 6 * torch.rand(count, 6), "price": 0.1 + 0.8 * torch.rand(count, 6)}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        crates = y.round()
        return (x["price"] * crates + (x["demand"] - crates).clamp_min(0)).sum(-1)

    def solution(self, x: dict[str, Tensor]) -> Tensor:
        """Full crates of the demand, and another one if the rest of the demand is worth its price."""
        whole = x["demand"].floor()
        return whole + (x["demand"] - whole > x["price"])


PROBLEMS: dict[str, Callable[[], Problem]] = {"portfolio": Portfolio, "sphere": Sphere, "crates": Crates}


def measure() -> Measured:
    """Mean gaps on held-out contexts, over seeds, of every model with every loss that fits, and training times."""
    data: dict[str, Any] = {name: _grid(Judge(make())) for name, make in PROBLEMS.items()}
    rival = {name: _best_rate(Judge(PROBLEMS[name]())) for name in ("portfolio", "crates")}
    data["full by objective, by learning rate"] = rival
    claims = [
        ("portfolio: mean gap of full, at the best of four learning rates, over that of semi", "portfolio", "semi, objective"),
        ("crates: mean gap of full by objective, at the best of four learning rates, over that by es", "crates", "full, es"),
    ]
    return Measured([_beaten(claim, rival[name], data[name][winner]["gaps"]) for claim, name, winner in claims], data, {})


class Judge:
    """Held-out contexts, and their best known solutions.

    Args:
        problem: what is solved.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.solver = Solver(Model(), problem)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            self.x = self.solver.draw(HELD_OUT)
            self.best = self.solver.reference(self.x)

    def gap(self, y: Tensor) -> float:
        """y (B, n) -> its mean gap."""
        return (self.solver.f(y, self.x) - self.best.cost).mean().item()

    def trained(self, contestant: Contestant, loss: str, seed: int, rate: float = RATE) -> tuple[float, float]:
        """Mean gap after training, and its CPU seconds, which do not depend on other load."""
        name = type(self.problem).__name__
        print(f"training: {name}, {contestant.model}, {loss}, {contestant.updates} updates, seed {seed}", flush=True)
        fields = {"model": contestant.model, "steps": contestant.updates, "learning_rate": rate, "seed": seed, "threads": 1}
        started = time.process_time()
        solver = amortize(self.problem, loss=loss, **{**FIELDS, **fields, **BESIDES.get(loss, {})})
        return self.gap(solver.predict_rows(self.x)), time.process_time() - started


def _grid(judge: Judge) -> dict[str, Any]:
    y = judge.problem.domain
    middle = y.project(judge.x.new_zeros(len(judge.x), y.inputs))
    found: dict[str, Any] = {"reference": judge.best.label, "middle": judge.gap(middle)}
    known = judge.best.label == "solution"  # elsewhere a teacher must solve every batch, at many times the cost of all else
    for name, contestant in CONTESTANTS.items():
        for loss in contestant.losses:
            if loss != "regress" or known:
                runs = [judge.trained(contestant, loss, seed) for seed in SEEDS]
                found[f"{name}, {loss}"] = {"gaps": [gap for gap, _ in runs], "seconds": [taken for _, taken in runs]}
    return found


def _best_rate(judge: Judge) -> dict[str, list[float]]:
    full = CONTESTANTS["full"]
    return {f"{rate:g}": [judge.trained(full, "objective", seed, rate)[0] for seed in SEEDS] for rate in RATES}


def _beaten(claim: str, rival: dict[str, list[float]], gaps: Sequence[float]) -> Verdict:
    """By a factor of two, for the worst seed of the winner against the mean of the loser's at its best rate."""
    return at_least(
        f"{claim}, in its worst of {len(gaps)} seeds", min(interval(one).mean for one in rival.values()) / max(gaps), 2, "x"
    )


def tables(data: dict[str, Any]) -> str:
    """The results of `measure` as Markdown: for every problem, models by losses."""
    lines = []
    for name in PROBLEMS:
        found = data[name]
        rows = [[model, *(_cell(found.get(f"{model}, {loss}")) for loss in LOSSES)] for model in CONTESTANTS]
        head = f"**{name}**; reference: {found['reference']}; the middle of Y has a gap of {found['middle']:.2g}"
        lines += [head, "", *table(["model", *LOSSES], rows), ""]
    return "\n".join(lines)


def _cell(found: dict[str, list[float]] | None) -> str:
    if found is None:
        return ""
    mean, _, high = interval(found["gaps"])
    return f"{mean:.2g} ± {high - mean:.1g}, {interval(found['seconds']).mean:.1f} s"
