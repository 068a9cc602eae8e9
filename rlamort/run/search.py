"""A search by Optuna: what its sweeper is told, and what the search has found."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlamort.config import locate
from rlamort.env.one_step import open_problem
from rlamort.errors import UserError
from rlamort.host.publish import published_file
from rlamort.run.track import last_evaluation

DIRECTION, FAILURES = "hydra.sweeper.direction", "hydra.sweeper.max_failure_rate"
DIRECTIONS = ("maximize", "minimize")


class Trial(NamedTuple):
    """One of several runs: the overrides that were chosen for it, its exit code, and its folder if it has finished."""

    settings: list[str]
    code: int
    run: Path | None


class Search:
    """A search for settings.

    Args:
        row: the method's.
        given: the value of each override, as typed.

    Raises:
        UserError: its direction is none.

    Attributes:
        overrides: what is said unless the user says otherwise: Optuna itself would look for the lowest return, and end at the
            first failure.
    """

    def __init__(self, row: Mapping[str, Any], given: Mapping[str, str]) -> None:
        costs = locate(row["opens"]) is open_problem  # where evaluations have a cost
        self.direction = given.get(DIRECTION, DIRECTIONS[costs])
        if self.direction not in DIRECTIONS:
            raise UserError(f"{DIRECTION}={self.direction}: a run has one score; {' or '.join(DIRECTIONS)} is needed")
        self.overrides = {DIRECTION: self.direction, FAILURES: "1"}

    def answer(self, trials: Sequence[Trial], out: Path) -> list[str]:
        """Write all trials, best first, to the JSON file `out`; returns lines that say which is the best and where it is."""
        found = [(trial, None if trial.run is None else last_evaluation(trial.run)) for trial in trials]
        scored = [(trial, score) for trial, score in found if score is not None]
        scored.sort(key=lambda one: one[1].mean, reverse=self.direction == "maximize")
        table = [{"settings": trial.settings, one.name: one.mean, "run": str(trial.run)} for trial, one in scored]
        failed = [{"settings": trial.settings, "exit_code": trial.code} for trial, score in found if score is None]
        with published_file(out) as fresh:
            fresh.write_text(json.dumps({"best": table[0] if table else None, "trials": [*table, *failed]}, indent=1) + "\n")
        if not scored:
            return [f"none of {len(trials)} runs has a score; all: {out}"]
        best, score = scored[0]
        but = f", {len(failed)} of which have no score" if failed else ""
        return [f"best of {len(trials)} runs{but}: {score} with {' '.join(best.settings)}; all: {out}", str(best.run)]
