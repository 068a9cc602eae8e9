"""A run's folder: its files, its lock, its name."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlamort.config import Config, Run, short_name
from rlamort.errors import UserError
from rlamort.host.machine import versions
from rlamort.host.publish import published_file
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.track import Records

LOCK, OURS = ".lock", b"process "  # the lock file, and how its text begins
ASKED = "asked.json"  # what commands have asked of a run: the same command, repeated, asks for no change
LEFT = re.compile(r"\.tmp-[0-9a-f]{32}(\.\w+)?")  # temporary files of a killed process
PARTS = r"(agent\.json|[a-z]+\.safetensors|manifest\.json)"  # of an agent, and of a checkpoint
WRITTEN = re.compile(
    rf"(config\.yaml|asked\.json|versions\.json|metrics\.jsonl|\.lock|agent/{PARTS}|ckpt/LATEST|ckpt/step_\d{{12}}/{PARTS}"
    r"|ckpt/frames/\d{12}-[0-9a-f]{8}\.safetensors|plots/return\.png)"
)  # all that a run without videos leaves


class Directory:
    """A run's files: config.yaml, versions.json, metrics.jsonl, ckpt/, agent/, plots/, videos/. Locked by one process.

    Args:
        path: the folder.
        facts: as of `describe`; they are written at once if it is fresh.
        fresh: whether an existing run is refused.

    Raises:
        UserError: it exists already, is in use, or is not writable.
    """

    def __init__(self, path: Path, facts: dict[str, Any], fresh: bool = True) -> None:
        self.path = path
        try:
            if fresh:
                require_unused(path)
            path.mkdir(parents=True, exist_ok=True)
            self.close = weakref.finalize(self, unlock, locked(path), os.getpid())
            if fresh:
                require_unused(path)  # by whoever had it until now
            for file in path.iterdir():
                if LEFT.fullmatch(file.name) and file.is_file():
                    file.unlink()
            if fresh:
                self.describe(facts)
        except OSError as error:
            raise UserError(f"dir={path}: it cannot be written: {error.strerror}") from error
        self.records = Records(path / "metrics.jsonl")
        self.checkpoints = Checkpoints(path / "ckpt", facts["values"]["keep_checkpoints"])

    def describe(self, facts: dict[str, Any]) -> None:
        """Write config.yaml and versions.json.

        Args:
            facts: the run's configuration as JSON values: `method`, `row`, `unnamed`, and `values` by name.

        Raises:
            UserError: they cannot be written; those that were there are unchanged.
        """
        flat = {name: value for name, value in facts.items() if name != "values"} | facts["values"]
        try:
            with published_file(self.path / "config.yaml") as file:
                file.write_text(yaml.safe_dump(json.loads(json.dumps(flat)), sort_keys=False))
            with published_file(self.path / "versions.json") as file:
                file.write_text(json.dumps(versions(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"dir={self.path}: it cannot be written: {error.strerror}") from error


def continues(run: Run) -> bool:
    """Whether a command goes on with the run that is in its folder."""
    return run.resume == "auto" and run.dir is not None and (Path(run.dir) / "config.yaml").is_file()


def require_unused(path: Path) -> None:
    """Raises UserError if a new run cannot have the folder `path`, since it is a file, or holds some."""
    if path.exists() and not path.is_dir():
        raise UserError(f"dir={path}: it is a file; a folder is needed")
    if path.is_dir() and any(file.name != LOCK and not LEFT.fullmatch(file.name) for file in path.iterdir()):
        raise UserError(
            f"dir={path}: it exists already; choose a new one, leave dir out for a new one under runs/, "
            f"or continue it with `rlamort resume {path}`"
        )


def unlock(lock: int, holder: int) -> None:
    """Release what `locked` gave to the process `holder`, for its forks, too: the worker processes of a user's environments."""
    if os.getpid() == holder:
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def locked(path: Path) -> int:
    """The descriptor of a run's lock, which `unlock` releases, or the kernel when this process ends.

    Raises:
        UserError: another process has it, or the file is not ours.
    """
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 1000).decode()
            raise UserError(f"dir={path}: another process has this run ({holder})") from None
        if (content := os.read(lock, 8)) and content != OURS:
            raise UserError(f"dir={path}: it holds a file {LOCK} that rlamort did not write; choose a new folder")
        os.ftruncate(lock, 0)
        os.lseek(lock, 0, os.SEEK_SET)
        os.write(lock, OURS + f"{os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def require_free(path: Path) -> None:
    """Raises UserError if another process has the run."""
    if (path / LOCK).exists():
        os.close(locked(path))


def remove(path: Path) -> None:
    """Remove what a run wrote to its folder, and folders that are empty then; anything else in it stays.

    Raises:
        UserError: a process has the run, which writes there still.
    """
    require_free(path)
    for file in sorted(path.rglob("*"), reverse=True):  # what is in a folder comes before it
        if file.is_dir() and not file.is_symlink():
            with contextlib.suppress(OSError):  # something is in it
                file.rmdir()
        elif WRITTEN.fullmatch(file.relative_to(path).as_posix()):
            file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[Path]:
    """A new folder under runs/, named by method, environment, seed and time; it is removed if the block fails.

    It is created atomically, so that concurrent runs get different ones.
    """
    env = "".join(c if c.isalnum() or c in "-." else "_" for c in str(config.values["env"]))
    method = short_name(config.method).replace("/", "-")
    name = f"{method}-{env}-s{config.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent, first = Path("runs"), not Path("runs").exists()
    for path in (parent / one for one in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))):
        try:
            path.mkdir(parents=True)
            break
        except (FileExistsError, NotADirectoryError):
            if not parent.is_dir():
                raise UserError(f"{parent}: it is a file, where the folder of runs should be; set dir=...") from None
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            path.rmdir()
            if first:
                parent.rmdir()
        raise
