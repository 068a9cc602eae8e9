"""Claims that a method needs fewer environment steps than another to a return."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from rlamort.measure.study import Results, Study, Task
from rlamort.measure.verdict import Verdict


class Sooner(NamedTuple):
    """Train `method` and `baseline` with the same settings, and compare the environment steps to the return `reach`.

    The steps of a run are those of its first evaluation that is not below `reach`. A run that does not get there has those of
    its whole length, which favours the slower method: so it does not pass by a baseline that fails, but by being sooner.
    """

    row: str
    method: str
    env: str
    steps: int
    seeds: list[int]
    reach: float
    share: float
    baseline: str
    overrides: Sequence[str] = ()

    @property
    def study(self) -> Study:
        """Its trainings."""
        return Study(self.method, self.env, self.steps, self.seeds, None, self.baseline, self.overrides)

    def claim(self) -> str:
        """The claim in one line."""
        what = f"{self.method} on {self.env}: a return of {self.reach:g}"
        return f"{what} in at most {self.share:g} of the environment steps of {self.baseline}"

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result."""
        return self.study.due(results)

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        return self.study.waiting(results)

    def steps_of(self, row: str, results: Results) -> list[int]:
        """Environment steps of each run of a row to the return."""
        runs = [results[self.study.key(row, seed)]["evaluations"] for seed in self.study.seeds_of(row, results)]
        return [next((one["env_step"] for one in run if one["eval/return"] >= self.reach), self.steps) for run in runs]

    def judge(self, results: Results) -> list[Verdict]:
        """A verdict from the runs that there are; one that lacks seeds is incomplete."""
        ours, theirs = (self.steps_of(row, results) for row in self.study.contenders())
        if not ours or not theirs:
            return []
        share, missing = float(np.mean(ours) / np.mean(theirs)), self.waiting(results)
        what = f"{self.method} on {self.env}, environment steps to {self.reach:g}, as a share of {self.baseline}'s"
        measured = f"{share:.2f} ({', '.join(map(str, ours))} of {', '.join(map(str, theirs))})"
        passed = share <= self.share and not missing
        return [Verdict(what, measured, f"<= {self.share:g}", passed, missing=missing)]

    def report(self, results: Results) -> list[str]:
        """Further lines of Markdown: none."""
        return []

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """As a study's."""
        return self.study.panel(results)
