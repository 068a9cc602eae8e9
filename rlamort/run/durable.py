"""What makes a run outlive its process: checkpoints, copies of its records elsewhere, a report of what diverged."""

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


class Kept(Protocol):
    """What a learner is to those who keep it."""

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
    """Keeps a learner in a run directory.

    Args:
        learner: what is kept; held weakly, since it holds this.
        directory: where.

    Attributes:
        kept: environment steps at the newest checkpoint.
        mirrors: processes that copy the records elsewhere.
    """

    def __init__(self, learner: Kept, directory: Directory) -> None:
        self.learner: Kept = weakref.proxy(learner)
        self.directory = directory
        self.kept = 0
        self.mirrors: list[Mirror] = []
        self._frames: np.ndarray | None = None  # of the replay, up to which the newest checkpoint holds them
        self._final = 0  # bytes of records that no resume will write again
        self._proved = False

    def records(self) -> Records:
        """Where records go, from now on followed by the mirrors."""
        if not self.mirrors:
            timeout = self.learner.config.run.track_timeout
            self.mirrors = [Mirror(self.directory.path, backend, timeout) for backend in self.learner.tracked]
        return self.directory.records

    def prove(self) -> None:
        """Find out, once, whether checkpoints can hold all of the environment's state: see `rlamort.env.Env.prove`."""
        if not self._proved:
            self.learner.source.env.prove()
            self._proved = True

    def keep(self, stopping: bool) -> bool:
        """Called after every round: saves when it is time to, or when the run is `stopping`; whether it did."""
        due = crosses(self.kept, self.learner.clock.env_step, self.learner.config.run.checkpoint_every)
        saved = (stopping or due) and self.save()
        for mirror in self.mirrors if stopping else ():
            mirror.preempted()
        return saved

    def save(self) -> bool:
        """Write everything that `restore` needs into the run directory; whether there is a new checkpoint.

        Storage that fails costs a warning, not the run.

        Raises:
            Diverged: something in the agent is no longer finite.
        """
        learner, records = self.learner, self.directory.records
        step, source = learner.clock.env_step, learner.source
        if not source.resumable:
            self._release()
            return False
        learner.check_finite()
        if self._frames is not None and (self.kept, self._final) == (step, records.size()):
            return False  # it is the newest already
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
        first, self.kept, self._frames = not self.kept, step, frames["high"]
        self._release()
        if first:  # once more, since much may have come about since the beginning
            source.env.prove()
        return True

    def restore(self, loaded: Loaded) -> bool:
        """Everything as it was in a checkpoint; False where only new episodes could be begun.

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
        self.kept, self._frames = learner.clock.env_step, learner.source.written.copy()
        return exact

    def report_nan(self, error: Diverged) -> Path:
        """Write what is known of a divergence beside the run: losses, and the state of every tensor; the file."""
        clock = self.learner.clock
        tensors = {
            name: {"finite": bool(t.isfinite().all()), "largest": float(t.abs().max()) if t.numel() else 0.0}
            for name, t in self.learner.agent.state_dict().items()
        }
        file = self.directory.path / "nan_report" / f"step_{clock.env_step:012d}.json"
        file.parent.mkdir(exist_ok=True)
        losses = {name: float(value) for name, value in clock.metrics.items()}
        file.write_text(json.dumps({"error": str(error), "updates": clock.updates, "losses": losses, "tensors": tensors}))
        return file

    def close(self) -> None:
        """Let the mirrors finish, and give the directory back."""
        for mirror in self.mirrors:
            mirror.close(self._final)
        self.directory.close()

    def _release(self) -> None:
        """Records so far are final: those who follow the run may have them."""
        self._final = self.directory.records.size()
        for mirror in self.mirrors:
            mirror.advance(self._final)
