"""Where records go: the file that is the truth, and the terminal."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rlamort.env import Episode
from rlamort.train import Pace, Values

# takes a line about what is done now that takes long; nobody does unless there is a terminal
say: ContextVar[Callable[[str], None]] = ContextVar("say", default=lambda line: None)


class Evaluation(NamedTuple):
    """What an evaluation found: a return, or of a problem its mean cost; with a 95 % interval whose bounds may be NaN."""

    name: str
    digits: str
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Values) -> Self | None:
        """The evaluation in a record, where there is one."""
        if "eval/return" not in values:
            return None
        mean, low, high = (float(values.get(f"eval/{key}", math.nan)) for key in ("return", "low", "high"))  # type: ignore[arg-type]
        return cls("mean cost", ".4g", -mean, -high, -low) if "eval/cost" in values else cls("return", ".1f", mean, low, high)

    def __str__(self) -> str:
        shown = f"{self.name} {self.mean:{self.digits}}"
        return shown if math.isnan(self.low) else f"{shown} [{self.low:{self.digits}}, {self.high:{self.digits}}]"


class Records:
    """`metrics.jsonl`: one JSON object a line, each with its `env_step`, on disk as soon as it is made."""

    def __init__(self, path: Path) -> None:
        self.path, self.missed = path, 0

    def record(self, env_step: int, values: Values) -> None:
        """Storage that fails costs a warning and a gap, which the next record tells of, not the run."""
        gap: Values = {"records/missed": self.missed} if self.missed else {}
        line = json.dumps({"env_step": env_step, **values, **gap}, allow_nan=False) + "\n"
        size = self.size()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            self.missed = 0
        except OSError as error:
            self.cut(size)  # half a line would hide the next one
            if not self.missed:
                warnings.warn(f"{self.path}: {error.strerror}; training goes on without its records", stacklevel=2)
            self.missed += 1

    def size(self) -> int:
        """Bytes so far, which a checkpoint keeps."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Take back every record after the first `size` bytes: a resumed run writes them again.

        Where there are fewer, which is no doing of rlamort's, those that are whole stay, and that is said.
        """
        held = self.size()
        if held < size:
            whole = self.path.read_bytes().rfind(b"\n") + 1 if held else 0
            warnings.warn(f"{self.path}: {size - whole} of its {size} bytes are lost; its first records are kept", stacklevel=2)
            size = whole
        if held > size:
            os.truncate(self.path, size)

    def sync(self) -> None:
        """Make durable what a checkpoint is about to vouch for."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def progress(self, env_step: int, pace: Pace, episode: Episode | None) -> None:
        pass


class Terminal:
    """A progress bar where the output is a terminal, plain lines where it is not.

    Args:
        steps: environment steps in all.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.console = Console(file=sys.stdout)
        self.bar: Progress | None = None
        self.drawn = 0.0
        self.pace = Pace()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}", markup=False))
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("steps", total=self.steps, status="")
            self.bar.start()
        self.before = say.set(self.print)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        say.reset(self.before)
        if self.bar is not None:
            self.bar.stop()

    def record(self, env_step: int, values: Values) -> None:
        if (found := Evaluation.of(values)) is not None:
            before, after = ("evaluation ", "") if found.name == "return" else ("", ", lower is better")
            self.print(f"step {env_step:,}: {before}{found}{after}")
        elif self.bar is None and "time/seconds" in values:
            shown = [f"training return {values['train/return']:.1f}"] if "train/return" in values else []
            self.print(f"step {env_step:,} of {self.steps:,}: {', '.join(self._pace(env_step, shown))}")

    def progress(self, env_step: int, pace: Pace, episode: Episode | None) -> None:
        self.pace = pace
        now = time.monotonic()
        if self.bar is not None and now - self.drawn > 0.1:
            self.drawn = now
            shown = [f"return {episode.total:.1f}"] if episode else []
            self.bar.update(self.task, completed=env_step, status=" · ".join(self._pace(env_step, shown)))

    def _pace(self, env_step: int, shown: list[str]) -> list[str]:
        """Speed, what else is shown, and how long it will take."""
        rate, left = self.pace.steps_per_s, self.pace.left(max(self.steps - env_step, 0))
        before = [] if rate is None else [f"{rate:.0f} steps/s"]
        after = ["no updates yet"] if not self.pace.learning else [] if left is None else [f"{span(left)} left"]
        return [*before, *shown, *after]

    def print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def span(seconds: float) -> str:
    """Seconds as people say them."""
    unit, name = next((one for one in ((86_400, "days"), (3_600, "h"), (60, "min")) if seconds >= 2 * one[0]), (1, "s"))
    return f"{seconds / unit:.1f} {name}" if unit > 60 else f"{seconds / unit:.0f} {name}"


def read_records(run: Path) -> list[dict[str, float | list[float]]]:
    """The records of a run directory, none where none was made; a last line that a kill cut short is left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
