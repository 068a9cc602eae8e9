"""`rlamort bench gpu`: what training and solving on a GPU does in a second, in under four minutes."""

import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlamort.host.machine import cores, device_of, versions
from rlamort.host.publish import published_file
from rlamort.measure.gpu_worker import LINES, READY, Figures
from rlamort.measure.report import Report, table

ALL = 235.0  # seconds of everything
PREPARED, TIMED = 150.0, 20.0  # seconds in which a line must be ready to be timed, and then done
LEAST = 5.0  # in which no line is done


class Aim(NamedTuple):
    """What a figure was on an H200 with torch 2.11 before its issue, and what it is to be on an H100 or H200."""

    before: str
    wanted: str


AIMS = {
    "sac captured, steps/s": Aim("745", ">= 2,000"),
    "sac captured, updates/s": Aim("1,251-1,306", ""),
    "sac captured, kernels an update": Aim("299", "<= 100"),
    "sac captured, replay.add ms": Aim("0.38", "<= 0.06"),
    "sac captured, environment ms": Aim("0.27", ""),
    "sac captured, overlap, float32, steps/s": Aim("", ">= 2,000"),
    "sac eager, steps/s": Aim("134", ""),
    "sac eager, updates/s": Aim("128", ""),
    "td3 captured, steps/s": Aim("942", ">= 2,500"),
    "td3 captured, updates/s": Aim("1,902", ""),
    "td3 captured, overlap, float32, steps/s": Aim("", ">= 2,500"),
    "td3 eager, steps/s": Aim("192", ""),
    "td3 eager, updates/s": Aim("218", ""),
    "sb3 sac, steps/s": Aim("85", "<= 1/20 of sac captured"),
    "sb3 td3, steps/s": Aim("158", "<= 1/20 of td3 captured"),
    "sac, 16 environments, utd=1, steps/s": Aim("1,142", ""),
    "sac, 64 environments, utd=1/16, steps/s": Aim("", ">= 15,000"),
    "amortize captured, updates/s": Aim("661", ">= 15,000"),
    "amortize eager, updates/s": Aim("487", ""),
    "1,000,000 contexts predicted, ms": Aim("", "<= 5"),
    "10,000 answers certified to 1e-3, s": Aim("", "<= 1"),
}


def gpu(device: str = "cuda", keep: Path | None = None, lines: Sequence[str] = tuple(LINES)) -> Report:
    """Every line, each in its own process and within its own limits of time.

    Processes begin together, as many as the machine has cores for, since most of their time goes into compiling. When all are
    ready, they measure one after another.

    Args:
        device: cuda or cuda:N; cpu runs the same lines with tiny sizes, which measures nothing.
        keep: a JSON file that holds what is known after every line.
        lines: names of LINES.

    Raises:
        UserError: there is no such device.
    """
    place = device_of(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    figures: Figures = {}
    seconds: dict[str, float] = {}
    data = {"machine": f"{name}, {os.cpu_count()} cores", "versions": versions(), "figures": figures, "seconds": seconds}
    started = time.perf_counter()

    def note(line: str, found: Figures, taken: float) -> None:
        figures.update(found)
        seconds[line] = taken
        print(*(f"{key}: {_shown(value)}" for key, value in found.items()), sep="\n", file=sys.stderr, flush=True)
        if keep is not None:
            with published_file(keep) as fresh:
                fresh.write_text(json.dumps(data, indent=1) + "\n")

    def left() -> float:
        return ALL - (time.perf_counter() - started)

    side_by_side = 2 * cores()
    for part in (lines[begin : begin + side_by_side] for begin in range(0, len(lines), side_by_side)):
        if left() < LEAST:
            for line in part:
                note(line, {f"{line}, skipped": f"{ALL:.0f} s are over"}, 0.0)
            continue
        workers = [Worker(line, str(place)) for line in part]
        for worker in workers:
            worker.prepare(min(PREPARED - worker.age, left()))
        for worker in workers:
            note(worker.line, worker.result(min(TIMED, left())), worker.age)
    rows = [[key, _shown(value), *AIMS.get(key, ("", ""))] for key, value in figures.items()]
    head = f"{data['machine']}, torch {torch.__version__}; {time.perf_counter() - started:.0f} s"
    return Report([head, "", *table(["", "here", "before", "to reach"], rows)], data)


class Worker:
    """The process of one line.

    Args:
        line: of LINES.
        device: where it measures.
    """

    def __init__(self, line: str, device: str) -> None:
        self.line, self.started = line, time.perf_counter()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `result` closes it
        command = [sys.executable, "-P", "-m", "rlamort.measure.gpu_worker", line, device]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True,
            env={"TORCHINDUCTOR_COMPILE_THREADS": "2", **os.environ},  # each process would start one per core
        )  # fmt: skip
        self.said: str | None = None  # its latest line; empty where it has ended without one

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.started

    def prepare(self, seconds: float) -> None:
        """Wait until it is ready, or done, for so many seconds."""
        self.said = self._line(seconds)

    def result(self, seconds: float) -> Figures:
        """Its figures, or why there are none; it is ended after so many seconds, with all processes of its own."""
        assert self.process.stdin is not None
        if self.said is not None and self.said.strip() == READY:
            print(file=self.process.stdin, flush=True)
            self.said = self._line(seconds)
        with self.errors, self.process:
            if self.said is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                return {f"{self.line}, failed": f"it took more than {self.age:.0f} s"}
            if self.process.wait():
                self.errors.seek(0)
                reason = self.errors.read().strip().splitlines()[-1:] or [f"exit code {self.process.returncode}"]
                return {f"{self.line}, failed": reason[0]}
            return dict(json.loads(self.said))

    def _line(self, seconds: float) -> str | None:
        """What it says next; None if that takes longer."""
        assert self.process.stdout is not None
        heard, _, _ = select.select([self.process.stdout], [], [], max(0.0, seconds))
        return self.process.stdout.readline() if heard else None


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
