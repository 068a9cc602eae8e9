"""Claims as commands: a study trains what it claims, keeps what it measured, and says whether the claim holds.

A study is an entry of configs/reproduce/ROW.yaml: environment, steps, seeds, and the return that each seed must reach.
"""

import importlib.resources
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlamort.checkpoint import versions
from rlamort.errors import Fault, UserError, nearest
from rlamort.track import read_records


class Study(NamedTuple):
    """Train `row` on `env` for `steps` from each seed; its last evaluation must reach `threshold` on every one."""

    row: str
    env: str
    steps: int
    seeds: list[int]
    threshold: float
    overrides: Sequence[str] = ()

    def command(self, seed: int) -> list[str]:
        """What a user types for one of its runs, after `rlamort`."""
        return ["train", self.row, f"env={self.env}", f"steps={self.steps}", f"seed={seed}", *self.overrides]


class Verdict(NamedTuple):
    """What came of a study."""

    claim: str
    measured: str
    threshold: str
    passed: bool

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.claim}\n      measured {self.measured}; threshold {self.threshold}"


def rows() -> list[str]:
    """The rows that have claims."""
    folder = importlib.resources.files("rlamort.configs") / "reproduce"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def studies(row: str) -> list[Study]:
    """Raises UserError where a row has no claims."""
    if row not in rows():
        raise UserError(f"reproduce {row}: this row has no claims yet. {nearest(row, rows())}")
    text = (importlib.resources.files("rlamort.configs") / "reproduce" / f"{row}.yaml").read_text()
    return [Study(row, **entry) for entry in yaml.safe_load(text)]


def reproduce(row: str, results: Path) -> list[Verdict]:
    """Run what is missing of a row's studies, judge them all, and write the table of every row measured so far.

    Every finished run is kept in `results`/ROW.json at once, and not run again while its command stays the same.
    """
    claims = studies(row)
    results.mkdir(parents=True, exist_ok=True)
    for study in claims:
        for seed in study.seeds:
            kept = _kept(row, results)
            key = " ".join(["rlamort", *study.command(seed)])
            if key not in kept:
                print(f"running: {key}", flush=True)
                kept[key] = _run(study.command(seed))
                (results / f"{row}.json").write_text(json.dumps(kept, indent=1) + "\n")
    verdicts = [judge(study, _kept(row, results)) for study in claims]
    (results / "README.md").write_text(table(results))
    return verdicts


def _kept(row: str, results: Path) -> dict[str, Any]:
    file = results / f"{row}.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def judge(study: Study, kept: dict[str, Any]) -> Verdict:
    """A study whose runs are all kept."""
    runs = [kept[" ".join(["rlamort", *study.command(seed)])] for seed in study.seeds]
    returns = [float(run["evaluations"][-1]["eval/return"]) for run in runs]
    return Verdict(
        f"{' '.join([study.row, *study.overrides])} on {study.env}: return after {study.steps:,} steps on each of the seeds "
        f"{study.seeds}",
        ", ".join(f"{value:.1f}" for value in returns),
        f">= {study.threshold:g}",
        min(returns) >= study.threshold,
    )


def table(results: Path) -> str:
    """Every row with complete measurements, as Markdown."""
    lines = [
        "# What was measured here",
        "",
        "Written by `rlamort reproduce`, from the data beside it, which name command and versions of every run. A return is",
        "the mean of ten evaluation episodes at the end of training.",
        "",
        "| command | claim | threshold | measured, seed by seed | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows():
        kept = _kept(row, results)
        for study in studies(row):
            if all(" ".join(["rlamort", *study.command(seed)]) in kept for seed in study.seeds):
                claim, measured, threshold, passed = judge(study, kept)
                verdict = "pass" if passed else "**FAIL**"
                lines.append(f"| `rlamort reproduce {row}` | {claim} | {threshold} | {measured} | {verdict} |")
    return "\n".join(lines) + "\n"


def _run(command: list[str]) -> dict[str, Any]:
    """One training in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlamort", *command, "video=false"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Fault(f"rlamort {' '.join(command)}: it exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    run = Path(done.stdout.strip().splitlines()[-1])
    records = read_records(run)
    speeds = [record for record in records if "time/seconds" in record]
    return {
        "versions": versions(),
        "seconds": speeds[-1]["time/seconds"] if speeds else None,
        "evaluations": [record for record in records if "eval/return" in record],
    }
