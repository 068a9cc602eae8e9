"""Slices of a long study: what is measured until a time, and trainings that the end of a slice stops and the next continues."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from rlamort.config import config_of, locate, read_row
from rlamort.errors import Fault, Preempted, UserError
from rlamort.host.machine import device_name, device_of, processor
from rlamort.run.directory import remove, require_free
from rlamort.run.session import Interrupts
from rlamort.run.track import read_records

TICK = 0.2  # seconds between looks at a training
STOPPED = (Preempted.exit_code, -15)  # with a checkpoint, or before there was anything to save


class Slice(NamedTuple):
    """Where results go, and until when there is time."""

    results: Path
    ends: float = math.inf  # time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    @property
    def continues(self) -> bool:
        """Whether it goes on with what others left, so that nothing which has been measured is measured again."""
        return self.ends < math.inf


BUSY = 0.1  # cores that others may use beside a timed training

Launch = Callable[[Sequence[str], float], bool]  # a command after `rlamort`, and when it must end: whether it finished
Also = Callable[[Path], dict[str, Any]]  # measures the directory of a finished run


def nothing(directory: Path) -> dict[str, Any]:
    """No further measurement."""
    return {}


def resumable(row: str) -> bool:
    """Whether the trainings of a method go on from a checkpoint."""
    return bool(locate(read_row(row)["source"]).resumable)


def launch(command: Sequence[str], ends: float) -> bool:
    """Run `rlamort command` in a process of its own; at time `ends`, SIGTERM asks it to save and stop.

    Returns:
        Whether it finished.

    Raises:
        Fault: it failed.
        Preempted: this process was asked to stop; so was the training.
    """
    with Interrupts() as interrupts:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlamort", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # so that an interrupt of the terminal comes once, from here
        )  # fmt: skip
        asked = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, said = child.communicate(timeout=TICK)
                break
            if not asked and (interrupts.should_stop() or time.monotonic() >= ends):
                child.terminate()
                asked = True
        if interrupts.should_stop():
            raise Preempted(f"rlamort {' '.join(command)}: stopped")
    if child.returncode and not (asked and child.returncode in STOPPED):
        raise Fault(f"rlamort {' '.join(command)}: it exited with {child.returncode}: {said.strip()[-500:]}")
    return child.returncode == 0


class Others:
    """What the machine does beside this process and its children, from now on."""

    def __init__(self) -> None:
        self.begun = self._counted()

    def require_idle(self, what: str) -> None:
        """Raises Fault if since then, or for a second, more than `BUSY` cores worked on something else, on average.

        Of this process's children, those count as its own that have ended.
        """
        time.sleep(max(0.0, self.begun[0] + 1 - time.monotonic()))
        elapsed, spent = (now - then for now, then in zip(self._counted(), self.begun, strict=True))
        if spent > BUSY * elapsed:
            raise Fault(f"{what}: {spent / elapsed:.2f} cores are busy with other work; its time is taken on an idle machine")

    @staticmethod
    def _counted() -> tuple[float, float]:
        """Seconds by the clock, and of cores for others."""
        all, own = psutil.cpu_times(), os.times()
        ours = own.user + own.system + own.children_user + own.children_system
        return time.monotonic(), all.user + all.nice + all.system - ours  # guests are in user


def evaluations(records: Sequence[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Those among the records of a finished run.

    Raises:
        Fault: an environment failed in one, which is then not over the episodes that the others are over.
    """
    if lost := next((one for one in records if "eval/failed" in one), None):
        raise Fault(
            f"{directory}: its evaluation at step {lost['env_step']:,} lost {lost['eval/failed']} episodes to failures of the "
            "environment; whole ones are needed here"
        )
    return [one for one in records if "eval/return" in one]


def train(
    command: Sequence[str], directory: Path, ends: float, whole: bool, run: Launch = launch, also: Also = nothing
) -> dict[str, Any] | None:
    """Train in `directory`, from its newest checkpoint if there is one, and remove what that wrote when it is done.

    Args:
        command: after `rlamort`, without `dir`.
        directory: of the unfinished run.
        ends: when it is stopped, in time.monotonic().
        whole: whether only a run that nothing interrupted counts; it begins anew.
        run: executes a command.
        also: measures the finished run.

    Returns:
        Its evaluations, each with the training seconds where these were recorded at its step, and versions, processor, device,
        threads, boot time, load average when it began, and whether it was continued from a checkpoint; what `also` found. None
        if it was stopped.

    Raises:
        Fault: it failed, or another process has it.
    """
    before = not whole and (directory / "config.yaml").is_file()
    try:
        (require_free if before else remove)(directory)
    except UserError as error:
        raise Fault(str(error)) from error
    load = os.getloadavg()[0]
    if not run([*command, f"dir={directory}", "resume=auto", "video=false"], ends):
        return None
    records = read_records(directory)
    taken = {one["env_step"]: {"time/seconds": one["time/seconds"]} for one in records if "time/seconds" in one}
    kept = ("env_step", "eval/return", "eval/low", "eval/high", "eval/length")
    found = {
        "versions": json.loads((directory / "versions.json").read_text()),
        "processor": processor(),
        "device": device_name(device_of(config_of(directory)["device"])),
        "threads": config_of(directory)["threads"],
        "booted": psutil.boot_time(),
        "load": load,
        "continued": before,
        "seconds": max(one["time/seconds"] for one in taken.values()),
        "evaluations": [
            {key: one[key] for key in kept if key in one} | taken.get(one["env_step"], {})
            for one in evaluations(records, directory)
        ],
        **also(directory),
    }
    with contextlib.suppress(UserError):  # another process looks at it, too
        remove(directory)
    return found
