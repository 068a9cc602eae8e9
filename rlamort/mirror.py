"""A run followed in Weights & Biases or TensorBoard, by a process beside the training one.

It copies `metrics.jsonl`, up to the byte that the newest checkpoint vouches for: what comes after is written again when a run
is killed and resumed, so it is not final. How far it has come stands in `RUN/mirror/BACKEND.json`, with the identity of the run
over there, so that a resumed run goes on in the same place with no row lost or repeated. Whatever happens to it, training goes
on.

    python -m rlamort.mirror RUN BACKEND     reads byte positions from its input, a line each
"""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TextIO

import yaml

from rlamort.errors import UserError

NEEDS = {"wandb": "wandb", "tensorboard": "tensorboard"}
GRACE = 60.0  # seconds that a finished run waits for its mirrors


class Backend(Protocol):
    """Where rows go."""

    def send(self, env_step: int, values: dict[str, Any]) -> None:
        """One record."""

    def file(self, path: Path) -> None:
        """One file of the run, such as a video."""

    def checkpoint(self, path: Path) -> None:
        """The agent in the folder of a checkpoint."""

    def preempted(self) -> None:
        """The run will be resumed."""

    def close(self) -> None:
        """All has been sent."""


class Wandb:
    """A Weights & Biases run; the official client does the talking.

    Args:
        run: the run directory.
        config: its resolved configuration.
        identity: the run's id over there.
        watched: the process whose system metrics are logged.
    """

    def __init__(self, run: Path, config: dict[str, Any], identity: str, watched: int) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_stats_pid=watched, init_timeout=3600)
        self.run = wandb.init(
            project=config["wandb_project"], entity=config["wandb_entity"], group=config["wandb_group"],
            tags=list(config["wandb_tags"]), notes=config["wandb_notes"], mode=config["wandb_mode"],
            name=run.name, id=identity, resume="allow", dir=str(run), settings=settings,
            config=config | {"versions": json.loads((run / "versions.json").read_text())},
        )  # fmt: skip
        self.run.define_metric("env_step")
        self.run.define_metric("*", step_metric="env_step")  # never the client's own step: rows out of order would be dropped

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

    def __init__(self, run: Path, config: dict[str, Any], identity: str, watched: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

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


BACKENDS: dict[str, Callable[[Path, dict[str, Any], str, int], Backend]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def require(backend: str) -> None:
    """Raises UserError where its package is missing."""
    if importlib.util.find_spec(NEEDS[backend]) is None:
        raise UserError(f"track={backend}: {NEEDS[backend]} is not installed; pip install {NEEDS[backend]}")


class Mirror:
    """The training process's end of it.

    Args:
        run: the run directory.
        backend: one of `BACKENDS`.
    """

    def __init__(self, run: Path, backend: str) -> None:
        (run / "mirror").mkdir(exist_ok=True)
        self.run, self.backend, self.given_up = run, backend, False
        with (run / "mirror" / f"{backend}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlamort.mirror", str(run.resolve()), backend],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def advance(self, position: int) -> None:
        """All records before that byte are final. Never waits, never raises."""
        self._tell(str(position))

    def preempted(self) -> None:
        """The run is asked to stop, and will be resumed."""
        self._tell("preempted")

    def close(self, position: int) -> None:
        """All records are final and none will follow; waits for `GRACE` seconds at most."""
        self._tell(str(position))
        self._tell("end")
        try:
            assert self.process.stdin is not None
            self.process.stdin.close()
            done = self.process.wait(GRACE) == 0
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
            done = False
        if not done:
            self._give_up()

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
                f"track={self.backend}: it has not taken all records (see {log}); nothing is lost, they are in "
                f"metrics.jsonl, and `rlamort push {self.run}` sends them",
                stacklevel=3,
            )


def copy(run: Path, backend: str, positions: TextIO, watched: int, changes: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Send every record up to the latest position read, until the input ends; and the videos, if it said "end".

    Args:
        run: the run directory.
        backend: one of `BACKENDS`.
        positions: byte positions, a line each, of which only the latest counts, and perhaps "preempted" and "end".
        watched: the process whose system metrics are logged.
        changes: values that replace those of the run's configuration.
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
        config = yaml.safe_load((run / "config.yaml").read_text()) | dict(changes)
        there = BACKENDS[backend](run, config, state["id"], watched)
        with (run / "metrics.jsonl").open("rb") as records:
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
    """The newest position of a stream that is read in a thread, so that a slow backend never makes its writer wait."""

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
        """Waits for a position after `sent`; None when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.position > sent or self.over)
            return self.position if self.position > sent else None


def _write(mark: Path, state: dict[str, Any]) -> None:
    fresh = mark.with_suffix(".new")
    fresh.write_text(json.dumps(state))
    os.replace(fresh, mark)


if __name__ == "__main__":
    os.nice(10)  # training goes first
    copy(Path(sys.argv[1]), sys.argv[2], sys.stdin, os.getppid())
