"""Where records go: the file that is the truth, and the terminal."""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlamort.env import Episode

Values = dict[str, float | list[float]]


class Tracker(Protocol):
    """What takes a run's records."""

    def record(self, env_step: int, values: Values) -> None:
        """Numbers worth keeping."""

    def progress(self, env_step: int, steps_per_s: float, episode: Episode | None) -> None:
        """Called after every step of the loop, with the latest finished episode; cheap."""


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
        """Take back every record after the first `size` bytes: a resumed run writes them again."""
        if self.size() > size:
            os.truncate(self.path, size)

    def progress(self, env_step: int, steps_per_s: float, episode: Episode | None) -> None:
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

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("steps", total=self.steps, status="")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def record(self, env_step: int, values: Values) -> None:
        if "eval/return" in values:
            line = f"step {env_step:,}: evaluation return {values['eval/return']:.1f}"
            if "eval/low" in values:
                line += f" [{values['eval/low']:.1f}, {values['eval/high']:.1f}]"
            self.print(line)
        elif self.bar is None and "time/steps_per_s" in values:
            rate = values["time/steps_per_s"]
            assert isinstance(rate, float)
            left = max(self.steps - env_step, 0) / rate
            shown = f", training return {values['train/return']:.1f}" if "train/return" in values else ""
            self.print(f"step {env_step:,} of {self.steps:,}: {rate:.0f} steps/s{shown}, {left:.0f} s left")

    def progress(self, env_step: int, steps_per_s: float, episode: Episode | None) -> None:
        now = time.monotonic()
        if self.bar is not None and now - self.drawn > 0.1:
            self.drawn = now
            status = f"{steps_per_s:.0f} steps/s" + (f" · return {episode.total:.1f}" if episode else "")
            self.bar.update(self.task, completed=env_step, status=status)

    def print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def read_records(run: Path) -> list[dict[str, float | list[float]]]:
    """The records of a run directory; a last line that a kill cut short is left out."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
