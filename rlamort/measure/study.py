"""Studies: one method trained on one environment with several seeds, against a baseline with the same settings."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from rlamort.errors import Fault
from rlamort.measure.plot import band
from rlamort.measure.slices import Also, Slice, evaluations, nothing, resumable, train
from rlamort.measure.statistics import shown, welch
from rlamort.measure.verdict import Verdict
from rlamort.run.track import read_records
from rlamort.score import interval

RUNS = Path("runs/reproduce")  # unfinished ones
LOSS = 0.5  # share of a baseline's return that may be lost by the data, so that intervals which overlap say nothing
Results = Mapping[str, Any]  # stored results, by the command that a user types for them


class Task(NamedTuple):
    """Something to run, and the key of its stored result."""

    key: str
    run: Callable[[Slice], dict[str, Any] | None]  # None if the slice ended before it did
    file: str = ""  # of its result alone, in the row's folder; empty for the row's common file
    repeats: bool = False  # whether it is due although its result is stored, outside slices


class Study(NamedTuple):
    """Train `row`, and `baseline` if there is one, on `env` for `steps` with each seed.

    Every seed of the row must reach the return `threshold`, and no return below the baseline's must be shown: the claim fails
    if the interval of the difference of the means lies wholly below 0, which it may where the intervals of the two overlap.
    Since a wide interval holds 0 whatever is true, the claim is incomplete where it reaches below minus `LOSS` of the
    baseline's mean.
    """

    row: str
    env: str
    steps: int
    seeds: list[int]
    threshold: float | None = None
    baseline: str | None = None
    overrides: Sequence[str] = ()
    also: Also = nothing

    def contenders(self) -> list[str]:
        """The rows that it trains."""
        return [self.row, *([self.baseline] if self.baseline else [])]

    def claim(self) -> str:
        """The claim in one line."""
        reached = [] if self.threshold is None else [f"every seed of {len(self.seeds)} returns {self.threshold:g}"]
        beside = [] if self.baseline is None else [f"no return below {self.baseline}'s shown"]
        return f"{self.env}, {self.steps:,} steps: {', '.join(reached + beside)}"

    def command(self, row: str, seed: int) -> list[str]:
        """The command of one of its runs, after `rlamort`."""
        return ["train", row, f"env={self.env}", f"steps={self.steps}", f"seed={seed}", *self.overrides]

    def key(self, row: str, seed: int) -> str:
        return " ".join(["rlamort", *self.command(row, seed)])

    def tasks(self) -> list[Task]:
        """All its runs, interleaved."""
        return [sliced(self.command(row, seed), self.also) for seed in self.seeds for row in self.contenders()]

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result."""
        return [task for task in self.tasks() if task.key not in results]

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        left = len(self.due(results))
        return f"{self.env}, {self.steps:,} steps, beside {self.baseline}: {left} runs to go" if left else ""

    def seeds_of(self, row: str, results: Results) -> list[int]:
        """Its seeds with stored runs."""
        return [seed for seed in self.seeds if self.key(row, seed) in results]

    def curves(self, row: str, results: Results) -> np.ndarray:
        """(seeds, evaluations) returns."""
        runs = [results[self.key(row, seed)]["evaluations"] for seed in self.seeds]
        return np.array([[one["eval/return"] for one in run] for run in runs])

    def last(self, row: str, results: Results) -> np.ndarray:
        """(seeds,) returns of the last evaluation."""
        return np.array(self.curves(row, results)[:, -1])

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts on its claims with complete runs."""
        what = f"{' '.join([self.row, *self.overrides])} on {self.env}, {self.steps:,} steps, seeds {self.seeds}"
        whole = [row for row in self.contenders() if self.seeds_of(row, results) == self.seeds]
        verdicts: list[Verdict] = []
        if self.row in whole and self.threshold is not None:
            ours = self.last(self.row, results)
            measured, passed = ", ".join(f"{value:.1f}" for value in ours), bool(ours.min() >= self.threshold)
            verdicts.append(Verdict(f"return of {what}: each seed", measured, f">= {self.threshold:g}", passed))
        if self.baseline is not None and whole == self.contenders():
            ours, theirs = (self.last(row, results) for row in whole)
            a, b, gain = interval(list(ours)), interval(list(theirs)), welch(ours, theirs)
            area, other = (self.curves(row, results).mean(-1) for row in whole)
            least = LOSS * abs(b.mean)
            below, known = gain.high < 0, gain.low >= -least
            verdict = Verdict(
                f"return of {what}: none below {self.baseline}'s shown",
                f"{shown(a, '.1f')} (area {area.mean():.1f}), less {self.baseline}'s {shown(gain, '+.1f')}",
                f"the interval of the difference reaches 0, and begins above {-least:.1f}; "
                f"{self.baseline}'s {shown(b, '.1f')} (area {other.mean():.1f})",
                known and not below,
                missing="" if known or below else f"seeds: it may be below {self.baseline} by more than {least:.1f}",
            )
            verdicts.append(verdict)
        return verdicts

    def report(self, results: Results) -> list[str]:
        """Further lines of Markdown: none."""
        return []

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """A function that draws evaluation returns of stored runs, mean over seeds with 95 % Student intervals."""
        known = {
            row: [results[self.key(row, seed)]["evaluations"] for seed in self.seeds_of(row, results)]
            for row in self.contenders()
        }

        def draw(axes: Axes) -> None:
            for row, runs in known.items():
                if runs:
                    band(axes, [{one["env_step"]: one["eval/return"] for one in run} for run in runs], row)
            axes.set(title=self.env, xlabel="environment steps", ylabel="evaluation return")
            axes.legend()

        return draw if any(known.values()) else None


def sliced(command: Sequence[str], also: Also = nothing) -> Task:
    """A training that the end of a slice stops and the next continues, where its method can be resumed; see `slices.train`."""
    name, whole = re.sub(r"[^\w.-]+", "_", "-".join(command[1:])), not resumable(command[1])
    return Task(
        " ".join(["rlamort", *command]),
        lambda slice: train(command, RUNS / name, math.inf if whole else slice.ends, whole, also=also),
    )


def training(command: Sequence[str]) -> Task:
    """A training in its own process: its evaluations, each with the training seconds logged with it."""
    return Task(" ".join(["rlamort", *command]), lambda _: _train(command))


def _train(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlamort", *command, "video=false"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Fault(f"rlamort {' '.join(command)}: it exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    directory = Path(done.stdout.strip().splitlines()[-1])
    records = read_records(directory)
    seconds = {record["env_step"]: record["time/seconds"] for record in records if "time/seconds" in record}
    return {
        "versions": json.loads((directory / "versions.json").read_text()),
        "seconds": max(seconds.values(), default=None),
        "evaluations": [
            one | ({"time/seconds": seconds[one["env_step"]]} if one["env_step"] in seconds else {})
            for one in evaluations(records, directory)
        ],
    }
