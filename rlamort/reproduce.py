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
    """Run what is missing of a row's studies and judge them all.

    Every finished run is kept in `results`/ROW.json at once, and not run again while its command stays the same.
    """
    claims = studies(row)
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{row}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    verdicts = []
    for study in claims:
        returns = []
        for seed in study.seeds:
            command = study.command(seed)
            key = " ".join(["rlamort", *command])
            if key not in kept:
                print(f"running: {key}", flush=True)
                kept[key] = _run(command)
                file.write_text(json.dumps(kept, indent=1) + "\n")
            returns.append(float(kept[key]["evaluations"][-1]["eval/return"]))
        verdicts.append(
            Verdict(
                f"{row} on {study.env}: return at {study.steps:,} steps, each of seeds {study.seeds}",
                ", ".join(f"{value:.1f}" for value in returns),
                f">= {study.threshold:g}",
                min(returns) >= study.threshold,
            )
        )
    return verdicts


def _run(command: list[str]) -> dict[str, Any]:
    """One training in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "rlamort", *command, "video=false"], capture_output=True, text=True, check=False
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
