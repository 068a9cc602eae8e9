"""Checkpoints of a run, mirrors of its records, and a report on divergence."""

import json
import shutil
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlamort.agent import Agent
from rlamort.config import Config
from rlamort.errors import Diverged, UserError
from rlamort.host.saved import Damaged
from rlamort.run.checkpoint import Loaded
from rlamort.run.directory import Directory
from rlamort.run.mirror import Mirror
from rlamort.run.track import Records
from rlamort.train import Clock, crosses


class Checkpointable(Protocol):
    """What a checkpoint needs of a learner."""

    config: Config
    agent: Agent
    clock: Clock
    tracked: Sequence[str]

    @property
    def source(self) -> Any: ...
    def check_finite(self) -> None: ...
    def facts(self) -> dict[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any], frames: Iterator[dict[str, Any]]) -> bool: ...


class Durable:
    """Saves a learner to a run directory and restores it from there.

    Args:
        learner: what is saved; referenced weakly, since it references this.
        directory: the run directory.

    Attributes:
        newest_step: environment steps at the newest checkpoint; 0 if there is none.
        tried_step: environment steps when one was last begun, whether or not it could be written.
        mirrors: processes that copy the records elsewhere.
    """

    def __init__(self, learner: Checkpointable, directory: Directory) -> None:
        self.learner: Checkpointable = weakref.proxy(learner)
        self.directory = directory
        self.newest_step = self.tried_step = 0
        self.mirrors: list[Mirror] = []
        self._frames: np.ndarray | None = None  # of the replay, up to which the newest checkpoint holds them
        self._final = 0  # bytes of records that no resume will write again
        self._proved = False

    def records(self) -> Records:
        """The records' file; from the first call on, the mirrors copy it."""
        if not self.mirrors:
            timeout = self.learner.config.run.track_timeout
            self.mirrors = [Mirror(self.directory.path, backend, timeout) for backend in self.learner.tracked]
        return self.directory.records

    def prove(self) -> None:
        """Test, once, whether checkpoints can hold all of the environment's state: see `rlamort.env.Env.prove`."""
        if not self._proved:
            self.learner.source.env.prove()
            self._proved = True

    def keep(self, stopping: bool) -> bool:
        """Called after every round: saves if a checkpoint is due or the run is `stopping`; returns whether it did."""
        due = crosses(self.tried_step, self.learner.clock.env_step, self.learner.config.run.checkpoint_every)
        saved = (stopping or due) and self.save()
        for mirror in self.mirrors if stopping else ():
            mirror.preempted()
        return saved

    def save(self) -> bool:
        """Write everything that `restore` needs to the run directory; returns whether there is a new checkpoint.

        An error of the storage is a warning, and training continues.

        Raises:
            Diverged: something in the agent is no longer finite.
        """
        learner, records = self.learner, self.directory.records
        step, source = learner.clock.env_step, learner.source
        if not source.resumable:
            self._release()
            return False
        learner.check_finite()
        if self._frames is not None and (self.newest_step, self._final) == (step, records.size()):
            return False  # it is the newest already
        self.tried_step = step
        frames = source.frames_since(np.zeros_like(source.written) if self._frames is None else self._frames)
        try:
            records.sync()
            state = {**learner.state(), "records": records.size()}
            self.directory.checkpoints.write(step, learner.agent.state_dict(), learner.facts(), state, frames)
        except (OSError, UserError) as error:
            free = shutil.disk_usage(self.directory.path).free
            reason = error.strerror if isinstance(error, OSError) else str(error)
            warnings.warn(
                f"checkpoint at step {step:,}: {reason} ({free / 2**20:.0f} MiB are free there); "
                f"training goes on, and the one before is untouched",
                stacklevel=2,
            )
            return False
        first, self.newest_step, self._frames = not self.newest_step, step, frames["high"]
        self._release()
        if first:  # once more, since the state may have grown since the beginning
            source.env.prove()
        return True

    @property
    def outlook(self) -> str:
        """What a resume of the run will do, as a predicate."""
        if not self.learner.source.resumable:
            return f"begins anew, since {self.learner.config.method} keeps no checkpoints"
        if self.newest_step == self.learner.clock.env_step:
            return "continues from there"
        # else the last one could not be written
        return f"continues from step {self.newest_step:,}" if self.newest_step else "has no checkpoint to go on from"

    def restore(self, loaded: Loaded) -> bool:
        """Restore everything from a checkpoint; returns False if episodes had to begin anew.

        Raises:
            UserError: it is of another run.
        """
        learner = self.learner
        try:
            loaded.saved.fill(learner.agent)
            exact = learner.restore(loaded.state, loaded.frames())
            self.directory.records.cut(loaded.state["records"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, Damaged) as error:
            raise UserError(f"{loaded.saved.path}: it does not fit this run: {error}") from error
        self.newest_step = self.tried_step = learner.clock.env_step
        self._frames = learner.source.written.copy()
        return exact

    def report_nan(self, error: Diverged) -> Path:
        """Write losses and the range of every tensor to a file in the run directory, and return its path."""
        clock = self.learner.clock
        tensors = {
            name: {"finite": bool(t.isfinite().all()), "largest": float(t.double().abs().max()) if t.numel() else 0.0}
            for name, t in self.learner.agent.state_dict().items()
        }
        file = self.directory.path / "nan_report" / f"step_{clock.env_step:012d}.json"
        file.parent.mkdir(exist_ok=True)
        losses = {name: float(value) for name, value in clock.metrics.items()}
        file.write_text(json.dumps({"error": str(error), "updates": clock.updates, "losses": losses, "tensors": tensors}))
        return file

    def close(self) -> None:
        """Wait for the mirrors, and unlock the directory."""
        for mirror in self.mirrors:
            mirror.close(self._final)
        self.directory.close()

    def _release(self) -> None:
        """Let the mirrors copy the records so far, which no resume will write again."""
        self._final = self.directory.records.size()
        for mirror in self.mirrors:
            mirror.advance(self._final)
