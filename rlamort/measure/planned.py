"""Claims about planners that learn their dynamics: several of them on one task, and what the same agents are worth with more or
fewer samples and iterations.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from rlamort.measure.plot import band
from rlamort.measure.study import Results, Task, sliced
from rlamort.measure.verdict import Verdict, at_least
from rlamort.model import Unroll
from rlamort.run.restore import load
from rlamort.score import interval
from rlamort.update import Cem

ELITES = 0.2  # of samples, and two at least, where a population is another than in training


class Planned(NamedTuple):
    """Train every arm with each seed, and evaluate those of `searched` again with other populations and iterations.

    Claims are differences of mean returns over seeds, each of at least `least`: of `above`, pairs of arms after training; of
    `matches`, an arm with a population, and another with its own; of `deeper`, an arm with its most iterations and with none.
    """

    row: str
    planned: str  # the environment
    steps: int
    seeds: list[int]
    arms: Mapping[str, Sequence[str]]  # the row and its own settings
    overrides: Sequence[str] = ()
    above: Sequence[Sequence[str]] = ()
    matches: Sequence[Sequence[Any]] = ()  # (arm, population, arm, population)
    deeper: Sequence[str] = ()
    searched: Sequence[str] = ()
    populations: Sequence[int] = ()
    iterations: Sequence[int] = ()
    episodes: int = 4  # of each evaluation after training
    least: float = 0.0
    margin: float = 5.0  # by which an arm that `matches` may be below

    def claim(self) -> str:
        """The claim in one line."""
        parts = [f"{ours} above {theirs}" for ours, theirs in self.above]
        parts += [f"{ours} with {few} samples matches {theirs} with {many}" for ours, few, theirs, many in self.matches]
        parts += [f"{arm} with {max(self.iterations)} iterations above none" for arm in self.deeper]
        return f"{self.planned}, {self.steps:,} steps, {len(self.seeds)} seeds: {', '.join(parts)}"

    def task(self, arm: str, seed: int) -> Task:
        """The training of one run, with its evaluations after it."""
        method, *own = self.arms[arm]
        command = ["train", method, f"env={self.planned}", f"steps={self.steps}", f"seed={seed}", *self.overrides, *own]
        again = (self.populations, self.iterations) if arm in self.searched else ((), ())
        return sliced(command, functools.partial(_searched, *again, self.episodes))

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result, seed by seed."""
        tasks = [self.task(arm, seed) for seed in self.seeds for arm in self.arms]
        return [task for task in tasks if task.key not in results]

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        left = len(self.due(results))
        return f"{self.planned}, {self.steps:,} steps: {left} runs to go" if left else ""

    def runs(self, arm: str, results: Results) -> list[dict[str, Any]]:
        """Stored results of an arm, in the order of seeds."""
        keys = [self.task(arm, seed).key for seed in self.seeds]
        return [results[key] for key in keys if key in results]

    def last(self, arm: str, results: Results) -> np.ndarray:
        """(seeds,) returns of the last evaluation in training."""
        return np.array([run["evaluations"][-1]["eval/return"] for run in self.runs(arm, results)])

    def again(self, arm: str, what: str, many: int, results: Results) -> np.ndarray:
        """(seeds,) returns with so many of `what`, samples or iterations."""
        return np.array([np.mean(run[what][str(many)]) for run in self.runs(arm, results)])

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts on what all seeds have; those that lack some are incomplete."""
        verdicts = []
        for ours, theirs in self.above:
            pair = self.last(ours, results), self.last(theirs, results)
            verdicts += self._compared(f"{ours} less {theirs}", *pair, self.least)
        for ours, few, theirs, many in self.matches:
            pair = (self.again(ours, "populations", few, results), self.again(theirs, "populations", many, results))
            verdicts += self._compared(f"{ours} with {few} samples less {theirs} with {many}", *pair, -self.margin)
        for arm in self.deeper:
            most = max(self.iterations)
            pair = (self.again(arm, "iterations", most, results), self.again(arm, "iterations", 0, results))
            verdicts += self._compared(f"{arm} with {most} iterations less with none", *pair, self.least)
        return verdicts

    def _compared(self, what: str, ours: np.ndarray, theirs: np.ndarray, least: float) -> list[Verdict]:
        if not len(ours) or not len(theirs):
            return []
        where = f"{self.planned}, {self.steps:,} steps, seeds {self.seeds}"
        text = f"{where}: mean return of {what} ({_shown(ours)}, {_shown(theirs)})"
        verdict = at_least(text, float(ours.mean() - theirs.mean()), least)
        lacking = 2 * len(self.seeds) - len(ours) - len(theirs)
        return [replace(verdict, passed=False, missing=f"{lacking} runs") if lacking else verdict]

    def report(self, results: Results) -> list[str]:
        """Mean returns over seeds by arm, and by samples and iterations."""
        lines = ["| arm | seeds | in training |", "|---|---|---|"]
        for arm in self.arms:
            if len(found := self.last(arm, results)):
                lines.append(f"| {arm} | {len(found)} | {_shown(found)} |")
        for what, counts in (("populations", self.populations), ("iterations", self.iterations)):
            known = [arm for arm in self.searched if self.runs(arm, results)]
            if known and counts:
                lines += ["", f"| {what} | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 1) + "|"]
                for arm in known:
                    cells = [f"{self.again(arm, what, many, results).mean():.1f}" for many in counts]
                    lines.append(f"| {arm} | {' | '.join(cells)} |")
        return lines if len(lines) > 2 else []

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """Returns in training, or against the population where agents were searched with several."""
        if not any(self.runs(arm, results) for arm in self.arms):
            return None

        def draw(axes: Axes) -> None:
            for arm in self.searched or self.arms:
                if not (runs := self.runs(arm, results)):
                    continue
                curves = [{one["env_step"]: one["eval/return"] for one in run["evaluations"]} for run in runs]
                if self.populations:
                    curves = [
                        {many: float(np.mean(run["populations"][str(many)])) for many in self.populations} for run in runs
                    ]
                band(axes, curves, arm)
            axes.set(title=self.planned, xlabel="samples" if self.populations else "environment steps", ylabel="return")
            if self.populations:
                axes.set_xscale("log")
            axes.legend(fontsize="small")

        return draw


def _searched(populations: Sequence[int], iterations: Sequence[int], episodes: int, directory: Path) -> dict[str, Any]:
    """Returns of a finished run's agent with other numbers of samples and of iterations, the others as in training."""
    if not populations and not iterations:
        return {}
    learner = load(directory)
    model = learner.agent.model
    assert isinstance(model, Unroll), "a planner's solver"
    assert isinstance(model.update, Cem), "whose samples are counted"
    trained = model.update.samples, model.update.elites
    found: dict[str, dict[str, list[float]]] = {"populations": {}, "iterations": {}}
    for samples in populations:
        model.update.samples, model.update.elites = samples, max(2, round(ELITES * samples))
        found["populations"][str(samples)] = learner.score(episodes).whole()
    model.update.samples, model.update.elites = trained
    for steps in iterations:
        model.steps = steps
        found["iterations"][str(steps)] = learner.score(episodes).whole()
    learner.close()
    return found


def _shown(values: np.ndarray) -> str:
    mean, low, high = interval(values.tolist())
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if len(values) > 1 else f"{mean:.1f}"
