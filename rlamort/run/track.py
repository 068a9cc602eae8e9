"""Records of metrics: the file, and the terminal."""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rlamort.env import Episode
from rlamort.host.command import unread
from rlamort.train import Clock, Enough, Pace, Values

# prints a line about slow work in progress; does nothing without a terminal
say: ContextVar[Callable[[str], None]] = ContextVar("say", default=lambda line: None)


@contextlib.contextmanager
def until_enough(clock: Clock) -> Iterator[None]:
    """A context that `Enough` ends; its reason, if it has one, is printed."""
    try:
        yield
    except Enough as reason:
        if str(reason):
            say.get()(f"step {clock.env_step:,}: {reason}")


class Evaluation(NamedTuple):
    """The result of an evaluation: a mean return, or a problem's mean cost, with a 95 % interval whose bounds may be NaN."""

    name: str
    digits: str
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Values) -> Self | None:
        """The evaluation in a record, if there is one."""
        if "eval/return" not in values:
            return None
        mean, low, high = (float(values.get(f"eval/{key}", math.nan)) for key in ("return", "low", "high"))  # type: ignore[arg-type]
        return cls("mean cost", ".4g", -mean, -high, -low) if "eval/cost" in values else cls("return", ".1f", mean, low, high)

    def __str__(self) -> str:
        shown = f"{self.name} {self.mean:{self.digits}}"
        return shown if math.isnan(self.low) else f"{shown} [{self.low:{self.digits}}, {self.high:{self.digits}}]"


class Records:
    """`metrics.jsonl`: one JSON object per line, each with its `env_step`, written immediately."""

    def __init__(self, path: Path) -> None:
        self.path, self.missed = path, 0

    def record(self, env_step: int, values: Values) -> None:
        """Append a record; if that fails, warn, count it in the next record, and continue training."""
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
                warnings.warn(f"{self.path}: {error.strerror}; training continues without its records", stacklevel=2)
            self.missed += 1

    def size(self) -> int:
        """Size in bytes, which a checkpoint stores."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Truncate the file to `size` bytes, since a resumed run writes later records again.

        If it is shorter than that, complete records are kept, with a warning.
        """
        length = self.size()
        if length < size:
            whole = self.path.read_bytes().rfind(b"\n") + 1 if length else 0
            warnings.warn(f"{self.path}: {size - whole} of its {size} bytes are lost; its first records are kept", stacklevel=2)
            size = whole
        if length > size:
            os.truncate(self.path, size)

    def sync(self) -> None:
        """Sync the file to disk before a checkpoint refers to it."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def progress(self, env_step: int, pace: Pace, episode: Episode | None) -> None:
        pass


class Unread(Console):
    """A console that nobody need read to the end: where its reader has gone, as after `| head`, a run goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        unread()


class Terminal:
    """A progress bar if the output is a terminal, else plain lines.

    Args:
        steps: total environment steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.console = Unread(file=sys.stdout)
        self.bar: Progress | None = None
        self.last_draw = 0.0
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
        failed: Any = values.get("eval/failed", 0)
        returns: Any = values.get("eval/returns", [])
        lost = f"; {failed} of {failed + len(returns)} failed" if failed else ""
        if (found := Evaluation.of(values)) is not None:
            before, after = ("evaluation ", "") if found.name == "return" else ("", ", lower is better")
            self.print(f"step {env_step:,}: {before}{found}{after}{lost}")
        elif lost:
            self.print(f"step {env_step:,}: evaluation undefined{lost}")
        elif self.bar is None and "time/seconds" in values:
            shown = [f"training return {values['train/return']:.1f}"] if "train/return" in values else []
            self.print(f"step {env_step:,} of {self.steps:,}: {', '.join(self._pace(env_step, shown))}")

    def progress(self, env_step: int, pace: Pace, episode: Episode | None) -> None:
        self.pace = pace
        now = time.monotonic()
        if self.bar is not None and now - self.last_draw > 0.1:
            self.last_draw = now
            shown = [f"return {episode.total:.1f}"] if episode else []
            self.bar.update(self.task, completed=env_step, status=" · ".join(self._pace(env_step, shown)))

    def _pace(self, env_step: int, shown: list[str]) -> list[str]:
        """Speed, other metrics, and remaining time."""
        rate, left = self.pace.steps_per_s, self.pace.left(max(self.steps - env_step, 0))
        before = [] if rate is None else [f"{rate:.0f} steps/s"]
        after = ["no updates yet"] if not self.pace.learning else [] if left is None else [f"{span(left)} left"]
        return [*before, *shown, *after]

    def print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def span(seconds: float) -> str:
    """A duration in a readable unit."""
    unit, name = next((one for one in ((86_400, "days"), (3_600, "h"), (60, "min")) if seconds >= 2 * one[0]), (1, "s"))
    return f"{seconds / unit:.1f} {name}" if unit > 60 else f"{seconds / unit:.0f} {name}"


def read_records(run: Path) -> list[dict[str, float | list[float]]]:
    """The records of a run directory, without an incomplete last line."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def recorded_step(run: Path) -> int:
    """The environment step of a run's last record; 0 without one."""
    step: Any = next((record["env_step"] for record in reversed(read_records(run))), 0)
    return int(step)


def last_evaluation(run: Path) -> Evaluation | None:
    """The last evaluation of a run; None if there was none, or if all of its episodes failed."""
    evaluations = [record for record in read_records(run) if "eval/return" in record or "eval/failed" in record]
    return Evaluation.of(evaluations[-1]) if evaluations else None
