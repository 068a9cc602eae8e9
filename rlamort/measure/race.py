"""Races: wall-clock time to a return."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from rlamort.measure.study import Results, Task, training
from rlamort.measure.verdict import Verdict, at_most


class Race(NamedTuple):
    """Train each of `race`, contender -> row and overrides, interleaved, and measure the time to the `targets`.

    The claims are that `ours` reaches the first target in at most `limit` of the baseline's seconds, and that the
    first to reach the last target is not the baseline.
    """

    row: str
    race: dict[str, list[str]]
    env: str
    steps: int
    seeds: list[int]
    targets: list[float]  # returns
    every: int  # steps between evaluations, the resolution of the time to a target
    ours: str
    baseline: str
    limit: float
    overrides: Sequence[str] = ()

    def claim(self) -> str:
        """The claim in one line."""
        first = f"{self.ours} returns {self.targets[0]:g} in {self.limit:g} of {self.baseline}'s seconds"
        of = f"{len(self.race)} contenders, {len(self.seeds)} seed{'' if len(self.seeds) == 1 else 's'}"
        last = f"who first returns {self.targets[-1]:g} is not {self.baseline}"
        return f"{self.env}, {self.steps:,} steps, {of}: {first}, and {last}"

    def command(self, contender: str, seed: int) -> list[str]:
        """The command of one of its runs, after `rlamort`. Training seconds are logged at evaluations."""
        row, *own = self.race[contender]
        every = [f"eval_every={self.every}", f"log_every={self.every}"]
        return ["train", row, f"env={self.env}", f"steps={self.steps}", f"seed={seed}", *every, *self.overrides, *own]

    def key(self, contender: str, seed: int) -> str:
        return " ".join(["rlamort", *self.command(contender, seed)])

    def tasks(self) -> list[Task]:
        """All its runs, interleaved."""
        return [training(self.command(contender, seed)) for seed in self.seeds for contender in self.race]

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result."""
        return [task for task in self.tasks() if task.key not in results]

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        left = len(self.due(results))
        return f"{self.env}, {self.steps:,} steps, {len(self.race)} contenders: {left} runs to go" if left else ""

    def whole(self, results: Results) -> list[str]:
        """Contenders with stored runs for every seed."""
        return [one for one in self.race if all(self.key(one, seed) in results for seed in self.seeds)]

    def reached(self, contender: str, target: float, measure: str, results: Results) -> np.ndarray:
        """(seeds,) of `measure`, time/seconds or env_step, at the first evaluation at or above `target`; inf without one."""
        runs = [results[self.key(contender, seed)]["evaluations"] for seed in self.seeds]
        return np.array([next((one[measure] for one in run if one["eval/return"] >= target), math.inf) for run in runs])

    def results(self, contender: str, results: Results) -> list[float]:
        """Medians over seeds of last return, area, and steps per training second."""
        runs = [results[self.key(contender, seed)] for seed in self.seeds]
        returns = np.array([[one["eval/return"] for one in run["evaluations"]] for run in runs])
        speeds = [self.steps / run["seconds"] for run in runs]
        return [float(np.median(values)) for values in (returns[:, -1], returns.mean(-1), speeds)]

    def seconds(self, contender: str, target: float, results: Results) -> float:
        """Median over seeds until it reaches the target."""
        return float(np.median(self.reached(contender, target, "time/seconds", results)))

    def judge(self, results: Results) -> list[Verdict]:
        """The first claim, once both of its contenders have run with every seed; the second, once all have."""
        where, whole = f"on {self.env}, seeds {self.seeds}", self.whole(results)
        verdicts = []
        if {self.ours, self.baseline} <= set(whole):
            ours, theirs = (self.reached(one, self.targets[0], "time/seconds", results) for one in (self.ours, self.baseline))
            with np.errstate(invalid="ignore"):  # where neither reaches it there is no ratio, and a NaN fails
                ratio = float(np.median(ours / theirs))
            what = f"training seconds to a return of {self.targets[0]:g} {where}: {self.ours} over {self.baseline}"
            verdicts.append(at_most(what, ratio, self.limit, "x"))
        if whole == list(self.race):
            target = self.targets[-1]
            seconds = {one: self.seconds(one, target, results) for one in whole}
            first = min(seconds, key=seconds.__getitem__)
            measured = f"{first}: {seconds[first]:.0f} s; {self.baseline}: {seconds[self.baseline]:.0f} s"
            passed = first != self.baseline and seconds[first] < math.inf
            verdicts.append(Verdict(f"first at a return of {target:g} {where}", measured, f"not {self.baseline}", passed))
        return verdicts

    def report(self, results: Results) -> list[str]:
        """A table of the contenders with stored runs for all seeds: medians, with the fastest to each target in bold."""
        done = self.whole(results)
        if not done:
            return []
        lines = [
            f"### Fastest to a return on {self.env}: optional, measured effect",
            "",
            f"{self.steps:,} steps, seeds {self.seeds}, all with `{' '.join(self.overrides)}`; medians over seeds.",
            f"Seconds are of training, without evaluations, until the first evaluation, one every {self.every:,} steps, at or",
            "above the return; inf means none. Compilation counts in the run that does it; compiled code is cached for",
            "later runs.",
            "",
        ]
        seconds = {target: {one: self.seconds(one, target, results) for one in done} for target in self.targets}
        names = ["contender", "command", *(f"{what} to {t:g}" for t in self.targets for what in ("seconds", "steps"))]
        lines.append(f"| {' | '.join([*names, 'last return', 'area', 'steps/s'])} |")
        lines.append("|---" * (len(names) + 3) + "|")
        for one in done:
            cells = [one, f"`{' '.join(self.race[one])}`"]
            for target, taken in seconds.items():
                steps = np.median(self.reached(one, target, "env_step", results))
                best = taken[one] == min(taken.values()) < math.inf
                cells += [f"**{taken[one]:.0f}**" if best else f"{taken[one]:.0f}", f"{steps:.0f}"]
            lines.append(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in self.results(one, results))])} |")
        return lines

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """A function that draws returns against training seconds, one line per run."""
        done = self.whole(results)

        def draw(axes: Axes) -> None:
            for i, one in enumerate(done):
                for j, seed in enumerate(self.seeds):
                    run = results[self.key(one, seed)]["evaluations"]
                    at, returns = [e["time/seconds"] for e in run], [e["eval/return"] for e in run]
                    axes.plot(at, returns, marker="o", markersize=3, color=f"C{i}", label=None if j else one)
            for target in self.targets:
                axes.axhline(target, color="k", linewidth=0.5)
            axes.set(title=self.env, xlabel="seconds of training", ylabel="evaluation return")
            axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))

        return draw if done else None
