"""Guided policy search beside its own parts and beside a baseline: constraint, imitation, generalisation, samples.

M conditions · S held-out starts · cost of an episode, minus its return
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from rlamort.agents.gps import GPS
from rlamort.domain import unit_box
from rlamort.dynamics import Dynamics, Trajectory
from rlamort.measure.plot import band
from rlamort.measure.study import Results, Task, sliced
from rlamort.measure.verdict import Verdict
from rlamort.run.restore import load
from rlamort.run.track import read_records
from rlamort.score import SEED, interval
from rlamort.update import Ilqr

STARTS, ITERATIONS = 50, 50  # that are held out; of iLQR, from the network's own plan
Play = Callable[[Tensor, int], Tensor]  # x (B, d) at a step -> y (B, n)


class Guided(NamedTuple):
    """Train `row` with every seed on an environment whose key `first` is the seed of its conditions, and measure it.

    Claims: the constraint is met in a share of C-steps; the network costs at most so many times its local controllers, and
    on starts that are held out so many times what iLQR makes of its plans; and with a `baseline`, it needs so many times
    fewer samples to within 10 % of what iLQR reaches there. A baseline that does not get there counts with all of its steps.
    """

    row: str
    guided: str  # the environment
    steps: int
    seeds: list[int]
    overrides: Sequence[str] = ()
    met: float = 0.95
    follows: float = 1.1
    baseline: str = ""
    baseline_steps: int = 0
    baseline_overrides: Sequence[str] = ()
    fewer: float = 5.0

    def claim(self) -> str:
        """The claim in one line."""
        own = f"constraint met in {self.met:.0%} of C-steps, network within {self.follows - 1:.0%} of its controllers"
        beside = f", {self.fewer:g} times fewer samples than {self.baseline}" if self.baseline else ""
        return f"{self.where}, {self.steps:,} steps: {own}, and on held-out starts{beside}"

    @property
    def where(self) -> str:
        return self.guided.rpartition(":")[2]

    def command(self, row: str, seed: int) -> list[str]:
        """The command of one run, after `rlamort`."""
        steps, own = (self.steps, self.overrides) if row == self.row else (self.baseline_steps, self.baseline_overrides)
        first = [f"env={self.guided}", f"env_kwargs.first={seed}", f"steps={steps}", f"seed={seed}"]
        return ["train", row, *first, f"eval_episodes={STARTS}", *own]

    def key(self, row: str, seed: int) -> str:
        return " ".join(["rlamort", *self.command(row, seed)])

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result, the row's first."""
        tasks = [sliced(self.command(self.row, seed), followed) for seed in self.seeds]
        tasks += [sliced(self.command(self.baseline, seed)) for seed in self.seeds if self.baseline]
        return [task for task in tasks if task.key not in results]

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        left = len(self.due(results))
        return f"{self.where}: {left} runs to go" if left else ""

    def of(self, row: str, results: Results) -> list[dict[str, Any]]:
        """The stored runs of a row."""
        return [results[key] for seed in self.seeds if (key := self.key(row, seed)) in results]

    def samples(self, results: Results) -> list[tuple[int, int]]:
        """Environment steps of the row and of the baseline, of each seed with both, to 1.1 times iLQR's cost."""
        found = []
        for seed in self.seeds:
            ours, theirs = (results.get(self.key(row, seed)) for row in (self.row, self.baseline))
            if ours and theirs:
                most = 1.1 * ours["optimal"]
                found.append((_steps_to(ours, most, self.steps), _steps_to(theirs, most, self.baseline_steps)))
        return found

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts from the runs that there are; where some lack they are incomplete."""
        runs, missing = self.of(self.row, results), self.waiting(results)
        if not runs:
            return []
        met = [float(np.mean(run["met"])) for run in runs]
        ratios = {
            "network's cost over its local controllers'": [run["network"] / run["controllers"] for run in runs],
            f"network's cost over iLQR's, {STARTS} held-out starts in the hull": [run["held"] / run["optimal"] for run in runs],
        }
        verdicts = [self._verdict("share of C-steps that meet their constraint", met, f">= {self.met:g}", missing)]
        for what, values in ratios.items():
            verdicts.append(self._verdict(what, values, f"<= {self.follows:g}", missing))
        if pairs := self.samples(results):
            what = f"samples of {self.baseline} over its own, to within 10 % of iLQR's cost on held-out starts"
            verdicts.append(self._verdict(what, [b / a for a, b in pairs], f">= {self.fewer:g}", missing))
        return verdicts

    def _verdict(self, what: str, values: list[float], threshold: str, missing: str) -> Verdict:
        """Of the mean over seeds."""
        mean, low, high = interval(values)
        sign, limit = threshold.split()
        passed = mean >= float(limit) if sign == ">=" else mean <= float(limit)
        around = "" if math.isnan(low) else f" [{low:.4g}, {high:.4g}]"
        measured = f"{mean:.4g}{around} ({', '.join(f'{value:.4g}' for value in values)})"
        return Verdict(f"{self.where}: {what}", measured, threshold, passed and not missing, missing=missing)

    def report(self, results: Results) -> list[str]:
        """Further lines of Markdown: samples of each seed."""
        pairs = self.samples(results)
        listed = ", ".join(f"{ours:,} and {theirs:,}" for ours, theirs in pairs)
        return [f"{self.where}, samples of {self.row} and of {self.baseline}: {listed}."] if pairs else []

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """A function that draws costs on held-out starts, over iLQR's."""
        known = {row: self.of(row, results) for row in (self.row, self.baseline) if row}
        least = {seed: results[key]["optimal"] for seed in self.seeds if (key := self.key(self.row, seed)) in results}

        def draw(axes: Axes) -> None:
            for row in known:
                keys = [(seed, self.key(row, seed)) for seed in least]
                curves = [
                    {one["env_step"]: -one["eval/return"] / least[seed] for one in results[key]["evaluations"]}
                    for seed, key in keys
                    if key in results
                ]
                if curves:
                    band(axes, curves, row)
            axes.axhline(1.1, color="k", linewidth=0.5)
            axes.set(title=self.where, xlabel="environment steps", ylabel="cost over iLQR's, held-out starts", yscale="log")
            axes.legend()

        return draw if known[self.row] else None


def _steps_to(run: dict[str, Any], most: float, steps: int) -> int:
    """Environment steps at the first evaluation that costs at most `most`; all of them where none does."""
    return next((int(one["env_step"]) for one in run["evaluations"] if -one["eval/return"] <= most), steps)


@torch.no_grad()
def followed(directory: Path) -> dict[str, Any]:
    """Of a finished run: its C-steps, and the costs of network, controllers and iLQR."""
    records = read_records(directory)
    learner = load(str(directory))
    agent = learner.agent
    assert isinstance(agent, GPS), "the claims are its"
    held, env = learner.environments.another(STARTS), learner.source.env
    starts, inside = env.reset(learner.config.run.seed), held.reset(SEED)

    def network(x: Tensor, t: int) -> Tensor:
        return agent.policy(x)

    def controllers(x: Tensor, t: int) -> Tensor:
        gain, offset, _ = (part[:, t] for part in agent.controllers())
        y = (gain @ x.to(gain)[..., None])[..., 0] + offset
        return agent.domain.nearest(y).to(x)

    def cost(play: Play, x: Tensor) -> float:
        return rolled(agent.dynamics, play, x, agent.horizon)[0].mean().item()

    found = {
        "met": [one["gps/met"] for one in records if "gps/met" in one],
        "divergence": [one["gps/kl"] for one in records if "gps/kl" in one],
        "network": cost(network, starts), "controllers": cost(controllers, starts), "held": cost(network, inside),
        "optimal": improved(agent.dynamics, network, inside, agent.horizon).mean().item(),
    }  # fmt: skip
    learner.close()
    return found


def rolled(dynamics: Dynamics, play: Play, x: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """The cost (B,) of playing from x (B, d), and the plan that was played (B, T n)."""
    total, plan = torch.zeros(len(x)), []
    for t in range(horizon):
        plan.append(play(x, t))
        x, reward, _ = dynamics(x, plan[-1])
        total -= reward
    return total, torch.cat(plan, -1)


def improved(dynamics: Dynamics, play: Play, x: Tensor, horizon: int) -> Tensor:
    """The cost (B,) of what iLQR makes of what was played from x (B, d)."""
    (cost, plan), f = rolled(dynamics, play, x, horizon), Trajectory(dynamics, horizon)
    update, oracle = Ilqr(unit_box(plan.shape[-1])), f.oracle(x)
    h = update.start(plan, x, oracle)
    for _ in range(ITERATIONS):
        plan, h = update(plan, h, x, oracle)
    return torch.minimum(cost, f(plan, x))
