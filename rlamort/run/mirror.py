"""Logging to Weights & Biases or TensorBoard, from a separate process.

It uploads `metrics.jsonl` up to the byte position of the newest checkpoint: later records are written again when a run
is killed and resumed, so they are not final. Its position is in `RUN/mirror/BACKEND.json`, with the id of the run
there, so that a resumed run continues there with each record exactly once. Its failures do not affect training.

    python -m rlamort.run.mirror RUN BACKEND     reads byte positions from its input, a line each
"""

import contextlib
import fcntl
import importlib.util
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import psutil

from rlamort.config import Run, config_of, locate
from rlamort.errors import UserError
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.track import Records, recorded_step

NEEDS = {"wandb": "wandb", "tensorboard": "tensorboard"}
SOON = 1.0  # seconds of waiting after which a message is printed
PATIENCE = 3600.0  # seconds to wait for a backend during training


class Backend(Protocol):
    """A tracking backend."""

    def arrived(self) -> int | None:
        """The number of records that it has, if it can tell."""

    def send(self, env_step: int, values: dict[str, Any]) -> None:
        """Upload one record."""

    def file(self, path: Path) -> None:
        """Upload one file of the run, such as a video."""

    def checkpoint(self, path: Path) -> None:
        """Upload the agent in the folder of a checkpoint."""

    def preempted(self) -> None:
        """Mark the run as preempted."""

    def close(self) -> None:
        """Finish after the last record."""


class Wandb:
    """A Weights & Biases run, through the official client.

    Args:
        run: the run directory.
        config: its resolved configuration.
        identity: the run's id there.
        watched: the process whose system metrics are logged.
        patience: timeout of the connection, in seconds.

    Raises:
        UserError: there is no connection in that time, or no login.
    """

    def __init__(self, run: Path, config: dict[str, Any], identity: str, watched: int, patience: float) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")  # also what it says before it has read the settings
        # Another program's client names its service here, which ends with that program.
        os.environ.pop("WANDB_SERVICE", None)
        settings = wandb.Settings(console="off", silent=True, x_stats_pid=watched, init_timeout=patience)
        try:
            self.run = wandb.init(
                project=config["wandb_project"], entity=config["wandb_entity"], group=config["wandb_group"],
                tags=list(config["wandb_tags"]), notes=config["wandb_notes"], mode=config["wandb_mode"],
                name=run.name, id=identity, resume="allow", dir=str(run), settings=settings,
                config=config | {"versions": json.loads((run / "versions.json").read_text())},
            )  # fmt: skip
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            if isinstance(error, wandb.errors.UsageError | wandb.errors.AuthenticationError):
                raise UserError(f"wandb: {reason}; or give wandb_mode=offline, which needs no account") from error
            raise UserError(f"wandb: no answer within {patience:g} s, track_timeout waits longer ({reason})") from error
        self.run.define_metric("env_step")
        self.run.define_metric("*", step_metric="env_step")  # never the client's own step: rows out of order would be dropped

    def arrived(self) -> int | None:
        return None if self.run.offline else self.run.starting_step  # its steps are records, since no other rows are logged

    def send(self, env_step: int, values: dict[str, Any]) -> None:
        self.run.log({"env_step": env_step, **{name: v for name, v in values.items() if not isinstance(v, list)}})

    def file(self, path: Path) -> None:
        self.run.save(str(path), base_path=str(path.parent.parent), policy="now")

    def checkpoint(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"agent-{self.run.id}", type="model", metadata={"checkpoint": path.name})
        for file in path.glob("agent.*"):
            artifact.add_file(str(file))
        self.run.log_artifact(artifact)

    def preempted(self) -> None:
        self.run.mark_preempting()

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in `RUN/tensorboard`; arguments as for `Wandb`."""

    def __init__(self, run: Path, config: dict[str, Any], identity: str, watched: int, patience: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def arrived(self) -> int | None:
        return None

    def send(self, env_step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if not isinstance(value, list):
                self.writer.add_scalar(name, value, env_step)
        self.writer.flush()

    def file(self, path: Path) -> None:
        pass

    def checkpoint(self, path: Path) -> None:
        pass

    def preempted(self) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


BACKENDS: dict[str, Callable[[Path, dict[str, Any], str, int, float], Backend]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def require(backend: str) -> None:
    """Raises UserError if its package is not installed."""
    if importlib.util.find_spec(NEEDS[backend]) is None:
        raise UserError(f"track={backend}: {NEEDS[backend]} is not installed; pip install {NEEDS[backend]}")


class Mirror:
    """The side of the training process.

    Args:
        run: the run directory.
        backend: one of `BACKENDS`.
        timeout: seconds that `close` waits.
    """

    def __init__(self, run: Path, backend: str, timeout: float) -> None:
        (run / "mirror").mkdir(exist_ok=True)
        self.run, self.backend, self.timeout, self.given_up = run, backend, timeout, False
        with (run / "mirror" / f"{backend}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlamort.run.mirror", str(run.resolve()), backend],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def advance(self, position: int) -> None:
        """Tell the process that all records before that byte are final, without blocking or raising."""
        self._tell(str(position))

    def preempted(self) -> None:
        """Tell the process that the run is preempted and will be resumed."""
        self._tell("preempted")

    def close(self, position: int) -> None:
        """Finish: wait for the upload of all records, for `timeout` seconds or until Ctrl-C."""
        self._tell(str(position))
        self._tell("end")
        try:
            assert self.process.stdin is not None
            self.process.stdin.close()
            done = self._wait() == 0
        except (OSError, subprocess.TimeoutExpired, KeyboardInterrupt):
            self._end()
            done = False
        if not done:
            self._give_up()

    def _wait(self) -> int:
        try:
            return self.process.wait(min(SOON, self.timeout))
        except subprocess.TimeoutExpired:
            if self.timeout > SOON:
                print(
                    f"waiting up to {self.timeout:g} s for {self.backend} to upload the last records; Ctrl-C skips that "
                    f"(`{self._later}` sends them later)",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            return self.process.wait(max(self.timeout - SOON, 0))

    @property
    def _later(self) -> str:
        """The command that sends what is not uploaded."""
        return f"rlamort push {self.run}" if self.backend == "wandb" else f"rlamort resume {self.run}"

    def _end(self) -> None:
        """Kill the process and those of its client."""
        family = [self.process.pid]
        with contextlib.suppress(psutil.Error):
            family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _tell(self, line: str) -> None:
        if not self.given_up:
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(f"{line}\n".encode())
                self.process.stdin.flush()
            except OSError:
                self._give_up()

    def _give_up(self) -> None:
        if not self.given_up:
            self.given_up = True
            log = self.run / "mirror" / f"{self.backend}.log"
            warnings.warn(
                f"track={self.backend}: not all records are uploaded (see {log}); nothing is lost, they are in "
                f"metrics.jsonl, and `{self._later}` sends them",
                stacklevel=3,
            )


def catch_up(run: Path, changes: Mapping[str, Any], anew: bool) -> str:
    """Upload the missing records of a run that are final to Weights & Biases; returns a message.

    Args:
        run: the run directory.
        changes: values that replace those of the run's configuration.
        anew: whether to upload everything as a new run.

    Raises:
        UserError: it is not a run directory, or nothing can be sent.
    """
    config = {"track_timeout": Run.track_timeout, **config_of(run), **changes}  # older runs have none
    require("wandb")
    if config["wandb_mode"] == "disabled":
        raise UserError("wandb_mode=disabled: nothing would be sent; online or offline is needed")
    if anew:
        (run / "mirror" / "wandb.json").unlink(missing_ok=True)
    size = Records(run / "metrics.jsonl").size()
    if not size:
        raise UserError(f"{run}: it has recorded nothing yet")
    position = min(size, _final(run, config, size))
    if not position:
        raise UserError(f"{run}: it has no checkpoint yet, so `rlamort resume {run}` writes its records again; none is final")
    copy(run, config, "wandb", io.StringIO(f"{position}\nend\n"), os.getpid(), config["track_timeout"])
    which = "all records" if position == size else "all records up to its newest checkpoint"
    more = "" if position == size else f"; `rlamort resume {run}` writes the later ones again"
    if config["wandb_mode"] == "offline":
        return f"{run}: {which} are on this machine; `wandb sync {run}/wandb/offline-run-*` sends them{more}"
    return f"{run}: {which} are sent{more}"


def _final(run: Path, config: Mapping[str, Any], size: int) -> int:
    """The bytes of a run's records that no resume writes again, of `size` in all."""
    over = recorded_step(run) >= config["steps"]
    try:
        newest = Checkpoints(run / "ckpt").newest()
    except UserError:  # all are damaged: no resume goes on from them
        if not over:
            raise
        return size
    if newest is not None:
        return int(newest.state["records"])
    # else its checkpoints were removed
    return size if over or not locate(config["row"]["source"]).resumable else 0


def forget(run: Path) -> None:
    """Of a run that begins anew: what it has sent is another run's there."""
    for mark in (run / "mirror").glob("*.json"):
        if json.loads(mark.read_text())["sent"]:
            mark.unlink()


def copy(run: Path, config: dict[str, Any], backend: str, positions: TextIO, watched: int, patience: float) -> None:
    """Upload every record up to the latest position in the input, until it ends; and the videos, after "end".

    Args:
        run: the run directory.
        config: its configuration.
        backend: one of `BACKENDS`.
        positions: byte positions, a line each, of which the latest counts, and possibly "preempted" and "end".
        watched: the process whose system metrics are logged.
        patience: timeout of the connection, in seconds.

    Raises:
        UserError: there is no connection in that time.
    """
    folder = run / "mirror"
    folder.mkdir(exist_ok=True)
    with (folder / f"{backend}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the mirror of a killed run may still be at work
        mark = folder / f"{backend}.json"
        state: dict[str, Any] = (
            json.loads(mark.read_text())
            if mark.exists()
            else {"id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12], "sent": 0, "artifacts": 0}
        )
        _write(mark, state)
        latest = _Latest(positions)
        there = BACKENDS[backend](run, config, state["id"], watched, patience)
        (run / "metrics.jsonl").touch()  # the first record may be long in coming
        with (run / "metrics.jsonl").open("rb") as records:
            if (arrived := there.arrived()) is not None:  # what was handed over need not have come through
                state["sent"] = sum(len(line) for line in itertools.islice(records, arrived))
            while (position := latest.beyond(state["sent"])) is not None:
                records.seek(state["sent"])
                while state["sent"] < position and (line := records.readline()).endswith(b"\n"):
                    values = json.loads(line)
                    there.send(values.pop("env_step"), values)
                    state["sent"] += len(line)
                    _write(mark, state)
                if state["sent"] < position:
                    raise RuntimeError(f"metrics.jsonl ends at byte {state['sent']}, before {position}")
                steps = sorted((run / "ckpt").glob("step_*"))
                if steps and state["artifacts"] < config["wandb_artifacts"]:
                    there.checkpoint(steps[-1])
                    state["artifacts"] += 1
                    _write(mark, state)
        if latest.preempted:
            there.preempted()
        if latest.ended:
            for video in sorted((run / "videos").glob("*.mp4")):
                there.file(video)
        there.close()


class _Latest:
    """The latest position of a stream, read in a thread, so that a slow backend never blocks its writer."""

    def __init__(self, positions: TextIO) -> None:
        self.position, self.over, self.ended, self.preempted = 0, False, False, False
        self.changed = threading.Condition()
        threading.Thread(target=self._read, args=(positions,), daemon=True).start()

    def _read(self, positions: TextIO) -> None:
        for line in positions:
            with self.changed:
                if line.strip() == "end":
                    self.ended = True
                elif line.strip() == "preempted":
                    self.preempted = True
                else:
                    self.position = int(line)
                self.changed.notify()
        with self.changed:
            self.over = True
            self.changed.notify()

    def beyond(self, sent: int) -> int | None:
        """Wait for a position after `sent`; None at the end of the stream."""
        with self.changed:
            self.changed.wait_for(lambda: self.position > sent or self.over)
            return self.position if self.position > sent else None


def _write(mark: Path, state: dict[str, Any]) -> None:
    fresh = mark.with_suffix(".new")
    fresh.write_text(json.dumps(state))
    os.replace(fresh, mark)


if __name__ == "__main__":
    os.nice(10)  # training goes first
    copy(Path(sys.argv[1]), config_of(Path(sys.argv[1])), sys.argv[2], sys.stdin, os.getppid(), PATIENCE)
