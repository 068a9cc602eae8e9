"""Ledgers: what each ingredient of a method is worth, by returns over tasks and paired seeds, and by seconds.

An arm is a row with overrides. Its runs come in stages; timed runs, of which alone the seconds count, have a machine for
themselves.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from rlamort.errors import Fault, UserError, nearest
from rlamort.measure.falsifiers import judge
from rlamort.measure.ledger_report import report
from rlamort.measure.slices import Launch, Others, Slice, launch, resumable, train
from rlamort.measure.study import Results, Task
from rlamort.measure.verdict import Verdict
from rlamort.score import iqm

RUNS = Path("runs/ledger")  # unfinished ones
PLACES = ("best", "second")  # names for the arms at the top of the ranking


class Run(NamedTuple):
    """One training."""

    arm: str
    env: str
    seed: int
    steps: int
    timed: bool = False

    @property
    def name(self) -> str:
        """As a file name."""
        parts = [self.arm, self.env, str(self.seed), str(self.steps), *(["timed"] if self.timed else [])]
        return re.sub(r"[^\w.-]+", "_", "-".join(parts))


class Block(NamedTuple):
    """Every arm on every environment with every seed."""

    stage: int
    arms: list[str]  # `best` and `second` are told by the ranking
    envs: list[str]
    seeds: list[int]
    steps: int | None = None  # the ledger's if None
    timed: bool = False


class Ledger(NamedTuple):
    """Train the arms of each block, stage by stage; seed by seed within a stage, so that what there is at any time is balanced.

    Timed runs, and those of a source that cannot be resumed, are whole or not at all, and end after the slice if need be; the
    others go on from their checkpoints. Several processes may share a folder: each takes what no other has.

    What is said of `best` is said of runs in blocks that name it, which the ranking does not see: no arm is judged on what it
    was chosen by.
    """

    row: str
    ledger: dict[str, list[str]]  # arm -> a row or another arm, and overrides
    steps: int
    overrides: list[str]  # of every run, before its arm's
    timed_overrides: list[str]  # likewise, of timed runs
    tasks: dict[str, dict[str, Any]]  # environment -> `goal`, the return that is 1, and `target`, a return to reach soon
    blocks: list[dict[str, Any]]
    ranked: dict[str, Any]  # the `arms` that may be best, by the interquartile mean over `envs` of the stages up to `stage`
    reference: str  # the arm with which every other is paired
    judged: list[dict[str, Any]]
    shown: dict[str, str]  # arm -> its label in the figure
    idle: bool = False  # whether timed runs are due, and not the others
    launch: Launch = launch

    def claim(self) -> str:
        """The claim in one line."""
        stages = sorted({block.stage for block in self.stages()})
        return (
            f"{len(self.ledger)} arms on {', '.join(self.tasks)}, {self.steps:,} steps, {len(self.runs({}))} runs in "
            f"{len(stages)} stages: {len(self.judged)} claims on returns and seconds"
        )

    def arm(self, name: str) -> list[str]:
        """The row and overrides of an arm, those of the arm that it builds on first.

        Raises:
            UserError: there is no such arm.
        """
        if name not in self.ledger:
            raise UserError(f"{self.row}: there is no arm {name}. {nearest(name, self.ledger)}")
        base, *own = self.ledger[name]
        row, *below = self.arm(base) if base in self.ledger and base != name else [base]
        settings = dict(one.split("=", 1) for one in [*below, *own])
        return [row, *(f"{key}={value}" for key, value in settings.items())]

    def command(self, run: Run) -> list[str]:
        """The command of a run, after `rlamort`."""
        row, *own = self.arm(run.arm)
        common = [*self.overrides, *(self.timed_overrides if run.timed else []), *own]
        settings = dict(one.split("=", 1) for one in common)
        first = ["train", row, f"env={run.env}", f"steps={run.steps}", f"seed={run.seed}"]
        return [*first, *(f"{key}={value}" for key, value in settings.items())]

    def key(self, run: Run) -> str:
        """The command; of a timed run that it was timed, too."""
        return " ".join(["rlamort", *self.command(run), *(["(timed)"] if run.timed else [])])

    def stages(self) -> list[Block]:
        """Its blocks."""
        return [Block(**block) for block in self.blocks]

    def runs(self, results: Results) -> list[Run]:
        """All runs whose arms are known, in the order in which they are due."""
        found: dict[Run, int] = {}
        for block in self.stages():
            for run in self._of(block, results):
                found.setdefault(run, block.stage)
        arms, envs = list(self.ledger), list(self.tasks)
        return sorted(found, key=lambda run: (found[run], run.seed, envs.index(run.env), arms.index(run.arm)))

    def _of(self, block: Block, results: Results) -> Iterator[Run]:
        arms = [arm for name in block.arms if (arm := self.called(name, results)) is not None]
        for seed in block.seeds:
            for env in block.envs:
                for arm in arms:
                    yield Run(arm, env, seed, block.steps or self.steps, block.timed)

    def called(self, name: str, results: Results) -> str | None:
        """The arm of a name: `best` and `second` once the ranking is whole, None before."""
        if name not in PLACES:
            return name
        ranking = self.ranking(results)
        return ranking[PLACES.index(name)] if ranking else None

    def ranking(self, results: Results) -> list[str]:
        """The arms that may be best, best first; empty before all their runs are there."""
        stages = [one for one in self.stages() if one.stage <= self.ranked["stage"] and not one.timed]
        seeds = sorted({seed for one in stages for seed in one.seeds if set(self.ranked["arms"]) <= set(one.arms)})
        runs = {arm: [self.of(arm, env, seed) for env in self.ranked["envs"] for seed in seeds] for arm in self.ranked["arms"]}
        if not seeds or any(self.key(run) not in results for alike in runs.values() for run in alike):
            return []
        value = {arm: float(iqm(np.array([self.score(run, results) for run in alike]))) for arm, alike in runs.items()}
        return sorted(value, key=lambda arm: -value[arm])

    def of(self, arm: str, env: str, seed: int, steps: int | None = None, timed: bool = False) -> Run:
        """A run of the ledger's steps, unless `steps` says other."""
        return Run(arm, env, seed, steps or self.steps, timed)

    def stored(self, results: Results) -> list[Run]:
        """Its runs of which there are results."""
        return [run for run in self.runs(results) if self.key(run) in results]

    def evaluations(self, run: Run, results: Results) -> list[dict[str, Any]]:
        """Of a stored run, with env_step, eval/return and time/seconds."""
        return list(results[self.key(run)]["evaluations"])

    def last(self, run: Run, results: Results) -> float:
        """The return of a stored run's last evaluation."""
        return float(self.evaluations(run, results)[-1]["eval/return"])

    def area(self, run: Run, results: Results) -> float:
        """The mean return over a stored run's evaluations."""
        return float(np.mean([one["eval/return"] for one in self.evaluations(run, results)]))

    def goal(self, env: str) -> float:
        """The return on a task that scores 1."""
        return float(self.tasks[env]["goal"])

    def score(self, run: Run, results: Results) -> float:
        """The last return over the task's goal."""
        return self.last(run, results) / self.goal(run.env)

    def declared(self, arms: Sequence[str], envs: Sequence[str], timed: bool = False, steps: int | None = None) -> list[int]:
        """Seeds with which blocks train all these arms, by the names that the blocks have, on all these environments."""
        length, places = steps or self.steps, set(PLACES)
        alike = [one for one in self.stages() if one.timed == timed and (one.steps or self.steps) == length]
        blocks = [one for one in alike if places.isdisjoint(one.arms) == places.isdisjoint(arms)]
        pairs = [(arm, env) for arm in arms for env in envs]
        planned = [{seed for one in blocks if arm in one.arms and env in one.envs for seed in one.seeds} for arm, env in pairs]
        return sorted(set.intersection(*planned)) if planned else []

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result, timed or others, as `idle` says."""
        runs = [run for run in self.runs(results) if run.timed == self.idle and self.key(run) not in results]
        return [self.task(run) for run in runs]

    def task(self, run: Run) -> Task:
        """The training of a run."""
        return Task(self.key(run), lambda slice: self._train(run, slice), f"{run.name}.json")

    def folder(self, run: Run) -> Path:
        """Of an unfinished run: another one after its arm is edited."""
        return RUNS / f"{run.name}-{hashlib.sha256(self.key(run).encode()).hexdigest()[:8]}"

    def _train(self, run: Run, slice: Slice) -> dict[str, Any] | None:
        command, others = self.command(run), Others()
        whole = run.timed or not resumable(command[1])
        try:
            if run.timed:
                others.require_idle(self.key(run))
            found = train(command, self.folder(run), math.inf if whole else slice.ends, whole, self.launch)
            if run.timed and found:
                others.require_idle(self.key(run))
        except Fault as error:
            print(f"  {error}", flush=True)  # the other arms' runs do not depend on it
            return None
        return found and {**run._asdict(), **found}

    def waiting(self, results: Results) -> str:
        """A line about missing runs, by stage, or ""."""
        lines = []
        for timed, stage in sorted({(one.timed, one.stage) for one in self.stages()}):
            blocks = [one for one in self.stages() if (one.timed, one.stage) == (timed, stage)]
            runs = {run for one in blocks for run in self._of(one, results)}
            left = sum(self.key(run) not in results for run in runs)
            open = any(self.called(name, results) is None for one in blocks for name in one.arms)
            later = ", and those of the best arms, which are not known yet" if open else ""
            if left or open:
                lines.append(f"{'timed' if timed else 'stage'} {stage}: {left} of {len(runs)} runs to go{later}")
        return "; ".join(lines)

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts; what lacks runs is incomplete."""
        return [judge(self, one, results) for one in self.judged]

    def report(self, results: Results) -> list[str]:
        """Tables of what is there, and the figure."""
        return report(self, results)

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        return None  # its figure is its own
