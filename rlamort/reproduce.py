"""Claims as commands: a study trains what it claims, keeps what it measured, and says whether the claim holds.

An entry of configs/reproduce/ROW.yaml is a study: environment, steps, seeds, settings, and what is claimed: a return that each
seed must reach, or a baseline, trained with the same settings, that the row must not fall below. Or it is a race: contenders,
each with settings of its own, and returns that they must reach, the sooner in wall-clock the better. Or it names a function of
`rlamort.claims` that measures something else.
"""

import importlib.resources
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from rlamort.checkpoint import versions
from rlamort.config import locate
from rlamort.errors import Fault, UserError, nearest
from rlamort.plot import band
from rlamort.score import Interval, interval, iqm, stratified_bootstrap
from rlamort.track import read_records
from rlamort.verdict import Verdict, at_most

Kept = dict[str, Any]  # finished runs, by the command that a user types for them


class Study(NamedTuple):
    """Train `row`, and `baseline` where there is one, on `env` for `steps` from each seed."""

    row: str
    env: str
    steps: int
    seeds: list[int]
    threshold: float | None = None
    baseline: str | None = None
    overrides: Sequence[str] = ()

    def contenders(self) -> list[str]:
        """Whose runs it needs."""
        return [self.row, *([self.baseline] if self.baseline else [])]

    def command(self, row: str, seed: int) -> list[str]:
        """What a user types for one of its runs, after `rlamort`."""
        return ["train", row, f"env={self.env}", f"steps={self.steps}", f"seed={seed}", *self.overrides]

    def key(self, row: str, seed: int) -> str:
        return " ".join(["rlamort", *self.command(row, seed)])

    def seeds_of(self, row: str, kept: Kept) -> list[int]:
        """Those of its seeds whose runs are kept."""
        return [seed for seed in self.seeds if self.key(row, seed) in kept]

    def missing(self, kept: Kept) -> list[tuple[str, int]]:
        """Runs that are not kept yet."""
        return [(row, seed) for seed in self.seeds for row in self.contenders() if self.key(row, seed) not in kept]

    def curves(self, row: str, kept: Kept) -> np.ndarray:
        """(seeds, evaluations) returns."""
        runs = [kept[self.key(row, seed)]["evaluations"] for seed in self.seeds]
        return np.array([[one["eval/return"] for one in run] for run in runs])

    def last(self, row: str, kept: Kept) -> np.ndarray:
        """(seeds,) returns of the last evaluation."""
        return np.array(self.curves(row, kept)[:, -1])


class Race(NamedTuple):
    """Train each of `race`, contender -> row and overrides of its own, in turns, and see when it reaches the `targets`.

    The claim is that `ours` reaches the first target in at most `limit` of the seconds that `baseline` takes.
    """

    row: str
    race: dict[str, list[str]]
    env: str
    steps: int
    seeds: list[int]
    targets: list[float]  # returns
    every: int  # steps between evaluations, which is how finely the moment of reaching a target is known
    ours: str
    baseline: str
    limit: float
    overrides: Sequence[str] = ()

    def command(self, contender: str, seed: int) -> list[str]:
        """What a user types for one of its runs, after `rlamort`. Training seconds are logged where it is evaluated."""
        row, *own = self.race[contender]
        every = [f"eval_every={self.every}", f"log_every={self.every}"]
        return ["train", row, f"env={self.env}", f"steps={self.steps}", f"seed={seed}", *every, *self.overrides, *own]

    def key(self, contender: str, seed: int) -> str:
        return " ".join(["rlamort", *self.command(contender, seed)])

    def missing(self, kept: Kept) -> list[tuple[str, int]]:
        """Runs that are not kept yet, in turns."""
        return [(one, seed) for seed in self.seeds for one in self.race if self.key(one, seed) not in kept]

    def reached(self, contender: str, target: float, measure: str, kept: Kept) -> np.ndarray:
        """(seeds,) of `measure`, time/seconds or env_step, at the first evaluation at or above `target`; inf without one."""
        runs = [kept[self.key(contender, seed)]["evaluations"] for seed in self.seeds]
        return np.array([next((one[measure] for one in run if one["eval/return"] >= target), math.inf) for run in runs])

    def results(self, contender: str, kept: Kept) -> list[float]:
        """Medians over seeds of last return, area, and steps per training second."""
        runs = [kept[self.key(contender, seed)] for seed in self.seeds]
        returns = np.array([[one["eval/return"] for one in run["evaluations"]] for run in runs])
        speeds = [self.steps / run["seconds"] for run in runs]
        return [float(np.median(values)) for values in (returns[:, -1], returns.mean(-1), speeds)]


class Claim(NamedTuple):
    """What a function measures: `measure() -> Measured`, named by its dotted path."""

    row: str
    measure: str


def rows() -> list[str]:
    """The rows that have claims."""
    folder = importlib.resources.files("rlamort.configs") / "reproduce"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


Entry = Study | Race | Claim


def entries(row: str) -> list[Entry]:
    """Raises UserError where a row has no claims."""
    if row not in rows():
        raise UserError(f"reproduce {row}: this row has no claims yet. {nearest(row, rows())}")
    text = (importlib.resources.files("rlamort.configs") / "reproduce" / f"{row}.yaml").read_text()
    return [_kind(entry)(row, **entry) for entry in yaml.safe_load(text)]


def _kind(entry: dict[str, Any]) -> type[Entry]:
    return Claim if "measure" in entry else Race if "race" in entry else Study


def studies(row: str) -> list[Study]:
    """Those of its entries that are trainings."""
    return [entry for entry in entries(row) if isinstance(entry, Study)]


def reproduce(row: str, results: Path) -> list[Verdict]:
    """Run what is missing of a row's studies and races, judge them all, and write the table of every row measured so far.

    Every finished run is kept in `results`/ROW.json at once, and not run again while its command stays the same.
    """
    given = entries(row)
    results.mkdir(parents=True, exist_ok=True)
    for entry in given:
        if isinstance(entry, Claim):
            _keep(row, results, entry.measure, _measure(entry, results))
            continue
        for contender, seed in entry.missing(_kept(row, results)):
            key = entry.key(contender, seed)
            print(f"running: {key}", flush=True)
            _keep(row, results, key, _run(entry.command(contender, seed)))
    kept = _kept(row, results)
    (results / "README.md").write_text(table(results))
    if drawn := [study for study in studies(row) if any(study.seeds_of(one, kept) for one in study.contenders())]:
        draw_studies(drawn, kept, results / f"{row}.png")
    return [verdict for entry in given for verdict in judged(entry, kept)]


def _measure(claim: Claim, results: Path) -> Kept:
    """What it found, with when and on what; figures are drawn beside the data."""
    started = time.perf_counter()
    verdicts, data, figures = locate(claim.measure)()
    for name, figure in figures.items():
        figure.savefig(results / f"{name}.png", dpi=110, bbox_inches="tight")
    return {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "verdicts": [list(verdict) for verdict in verdicts],
        "figures": sorted(figures),
        "data": data,
    }


def judged(entry: Entry, kept: Kept) -> list[Verdict]:
    """The verdicts that are known."""
    if isinstance(entry, Study):
        return judge(entry, kept)
    if isinstance(entry, Race):
        return judge_race(entry, kept)
    return [Verdict(*one) for one in kept[entry.measure]["verdicts"]] if entry.measure in kept else []


def _kept(row: str, results: Path) -> Kept:
    file = results / f"{row}.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _keep(row: str, results: Path, key: str, found: Kept) -> None:
    (results / f"{row}.json").write_text(json.dumps(_kept(row, results) | {key: found}, indent=1) + "\n")


def judge(study: Study, kept: Kept) -> list[Verdict]:
    """Those claims of a study whose runs are all kept."""
    what = f"{' '.join([study.row, *study.overrides])} on {study.env}, {study.steps:,} steps, seeds {study.seeds}"
    waiting = {row for row, _ in study.missing(kept)}
    verdicts: list[Verdict] = []
    if study.row in waiting:
        return verdicts
    ours = study.last(study.row, kept)
    if study.threshold is not None:
        measured, passed = ", ".join(f"{value:.1f}" for value in ours), bool(ours.min() >= study.threshold)
        verdicts.append(Verdict(f"return of {what}: each seed", measured, f">= {study.threshold:g}", passed))
    if study.baseline is not None and not waiting:
        a, b = interval(list(ours)), interval(list(study.last(study.baseline, kept)))
        area, other = (study.curves(row, kept).mean(-1) for row in study.contenders())
        measured = f"{_shown(a)} (area {area.mean():.1f})"
        threshold = f"interval overlaps or lies above {_shown(b)} (area {other.mean():.1f})"
        verdicts.append(Verdict(f"return of {what}: beside {study.baseline}", measured, threshold, a.high >= b.low))
    return verdicts


def judge_race(race: Race, kept: Kept) -> list[Verdict]:
    """Its claim, once both whom it is about have run from every seed."""
    target = race.targets[0]
    if {race.ours, race.baseline} & {one for one, _ in race.missing(kept)}:
        return []
    ours, theirs = (race.reached(one, target, "time/seconds", kept) for one in (race.ours, race.baseline))
    with np.errstate(invalid="ignore"):  # where neither reaches it there is no ratio, and a NaN fails
        ratio = float(np.median(ours / theirs))
    what = f"training seconds to a return of {target:g} on {race.env}, seeds {race.seeds}: {race.ours} over {race.baseline}"
    return [at_most(what, ratio, race.limit, "x")]


def _shown(value: Interval) -> str:
    return f"{value.mean:.1f} [{value.low:.1f}, {value.high:.1f}]"


def draw_studies(given: Sequence[Study], kept: Kept, out: Path) -> None:
    """A panel a study: mean evaluation return of row and baseline over the seeds that are kept, with 95 % Student intervals."""
    figure = Figure(figsize=(5.2 * len(given), 3.8), layout="constrained")
    for axes, study in zip(figure.subplots(1, len(given), squeeze=False)[0], given, strict=True):
        for row in study.contenders():
            runs = [kept[study.key(row, seed)]["evaluations"] for seed in study.seeds_of(row, kept)]
            if runs:
                band(axes, [{one["env_step"]: one["eval/return"] for one in run} for run in runs], row)
        axes.set(title=study.env, xlabel="environment steps", ylabel="evaluation return")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=100)


def table(results: Path) -> str:
    """Every claim, with what was measured or how many runs it waits for, as Markdown."""
    lines = [
        "# What was measured here",
        "",
        "Written by `rlamort reproduce`, from the data beside it, which name command and versions of every run. A return is",
        "the mean of ten evaluation episodes at the end of training, its interval the 95 % Student interval over seeds, and an",
        "area the mean over the run's evaluations. A threshold beside a baseline is that baseline's own result with the same",
        "settings and seeds, on the same versions.",
        "",
        "| command | claim | threshold | measured | verdict |",
        "|---|---|---|---|---|",
    ]
    whole, races = [], []
    for row in rows():
        kept = _kept(row, results)
        for study in entries(row):
            for claim, measured, threshold, passed in judged(study, kept):
                verdict = "pass" if passed else "**FAIL**"
                lines.append(f"| `rlamort reproduce {row}` | {claim} | {threshold} | {measured} | {verdict} |")
            if isinstance(study, Claim):
                if study.measure not in kept:
                    what = study.measure.rpartition(".")[2]
                    lines.append(f"| `rlamort reproduce {row}` | all of {what} | | not measured yet | open |")
                continue
            if missing := study.missing(kept):
                what = f"{study.env}, {study.steps:,} steps, beside {study.baseline}"
                lines.append(f"| `rlamort reproduce {row}` | {what} | | {len(missing)} runs to go | open |")
            elif isinstance(study, Study) and study.baseline:
                whole.append((study, kept))
            if isinstance(study, Race) and len(study.missing(kept)) < len(study.race) * len(study.seeds):
                races += ["", *finishes(study, kept)]
    return "\n".join([*lines, *(["", *overall(whole)] if whole else []), *races]) + "\n"


def finishes(race: Race, kept: Kept) -> list[str]:
    """Every contender of a race that has run from all seeds: medians over them, the fastest to each target in bold."""
    waiting = {one for one, _ in race.missing(kept)}
    done = [one for one in race.race if one not in waiting]
    lines = [
        f"## Fastest to a return on {race.env}: optional, measured effect",
        "",
        f"{race.steps:,} steps, seeds {race.seeds}, all with `{' '.join(race.overrides)}`; medians over seeds. Seconds are of",
        f"training, without evaluations, until the first evaluation, one every {race.every:,} steps, at or above the return;",
        "inf says that none was. Compiling counts in the run that does it; what was compiled is kept for later runs.",
        "",
    ]
    seconds = {
        target: {one: np.median(race.reached(one, target, "time/seconds", kept)) for one in done} for target in race.targets
    }
    names = ["contender", "command", *(f"{what} to {t:g}" for t in race.targets for what in ("seconds", "steps"))]
    lines.append(f"| {' | '.join([*names, 'last return', 'area', 'steps/s'])} |")
    lines.append("|---" * (len(names) + 3) + "|")
    for one in done:
        cells = [one, f"`{' '.join(race.race[one])}`"]
        for target, taken in seconds.items():
            steps = np.median(race.reached(one, target, "env_step", kept))
            best = taken[one] == min(taken.values()) < math.inf
            cells += [f"**{taken[one]:.0f}**" if best else f"{taken[one]:.0f}", f"{steps:.0f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in race.results(one, kept))])} |")
    return lines


def overall(whole: Sequence[tuple[Study, Kept]]) -> list[str]:
    """All studies with a baseline as one: interquartile means with stratified bootstrap intervals (Agarwal et al., 2021).

    A return counts from 0, the lowest evaluation of any run of its study, to 1, the baseline's mean at the end.
    """
    ours, theirs = [], []
    for study, kept in whole:
        assert study.baseline is not None
        low = min(study.curves(row, kept).min() for row in study.contenders())
        high = study.last(study.baseline, kept).mean()
        ours.append((study.last(study.row, kept) - low) / (high - low))
        theirs.append((study.last(study.baseline, kept) - low) / (high - low))
    return [
        f"Over these {len(whole)} studies with a baseline, returns scaled from 0, the lowest evaluation of any run, to 1, the",
        "baseline's mean: interquartile mean of rlamort "
        f"{_share(stratified_bootstrap(ours, iqm))}, of the baselines {_share(stratified_bootstrap(theirs, iqm))}",
        "(95 % stratified bootstrap intervals over seeds).",
    ]


def _share(value: Interval) -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _run(command: list[str]) -> Kept:
    """One training in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlamort", *command, "video=false"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Fault(f"rlamort {' '.join(command)}: it exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    run = Path(done.stdout.strip().splitlines()[-1])
    records = read_records(run)
    seconds = {record["env_step"]: record["time/seconds"] for record in records if "time/seconds" in record}
    evaluations = [record for record in records if "eval/return" in record]
    return {
        "versions": versions(),
        "seconds": max(seconds.values(), default=None),
        "evaluations": [
            one | ({"time/seconds": seconds[one["env_step"]]} if one["env_step"] in seconds else {}) for one in evaluations
        ],
    }
