"""A run of the command line: started or resumed, with terminal output, signal handling, and one retry after a NaN."""

import contextlib
import json
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from rlamort.config import read_row, resolve, short_name
from rlamort.errors import Diverged, Preempted, UserError
from rlamort.host.publish import published_file
from rlamort.host.saved import Damaged, read_json
from rlamort.run.directory import ASKED, claimed, continues
from rlamort.run.durable import Durable
from rlamort.run.learner import Learner, learner_class
from rlamort.run.restore import EXCEPT_EPISODE, another_run, over, resume
from rlamort.run.stored import run_facts
from rlamort.run.track import Terminal


class Session:
    """Runs training to its end, and prints the run directory last.

    Args:
        finish: called with a finished learner and its directory, to write plots and videos.
    """

    def __init__(self, finish: Callable[[Learner, Path], None]) -> None:
        self.finish = finish

    def start(self, method: str, overrides: dict[str, Any]) -> Path:
        """Train in a new directory, or with resume=auto continue the run in it; returns the directory.

        A run that is continued changes in what this command asks for and none before it did. So it keeps what was chosen in
        its course, such as the smaller step size of a retry.

        Args:
            method: a name, or the path of a user's YAML file.
            overrides: the values that the user gave.

        Raises:
            UserError: a key is missing or has an invalid value.
        """
        config = resolve(method, overrides)
        if config.run.env is None:
            raise UserError("env: it is missing; a Gymnasium id such as env=HalfCheetah-v5, or env=module:Class, is needed")
        if config.run.resume == "auto":
            if config.run.dir is None:
                raise UserError("resume=auto: it needs dir=..., the run directory to look for")
            if continues(config.run):
                return self._repeat(Path(config.run.dir), overrides, method)
        with contextlib.nullcontext(Path(config.run.dir)) if config.run.dir else claimed(config) as path:
            learner = learner_class(method)(**{**config.values, "dir": str(path)})
            _note(path, overrides)
        return self._run(learner, f"{short_name(method)} on {config.run.env}, seed {config.run.seed}, {learner.device}: {path}")

    def resume(self, path: Path, changes: dict[str, Any], method: str | None = None) -> Path:
        """Continue a run; arguments as of `rlamort.run.restore.resume`."""
        return self._continue(path, *resume(path, changes, method))

    def _repeat(self, path: Path, overrides: dict[str, Any], method: str) -> Path:
        """Continue a run that this command may have started, unless it has finished and keeps nothing to go on from.

        Raises:
            UserError: it is a run of another method.
        """
        ran = run_facts(path)
        if method != ran["method"] and read_row(method) != ran["row"]:  # a file may have moved
            raise another_run("method", path, ran["method"], method)
        before = _noted(path)
        changes = {name: value for name, value in overrides.items() if name not in before or before[name] != value}
        if not changes and over(path, ran):
            print(f"{path}: it has finished", path, sep="\n")
            return path
        resumed = resume(path, changes, method)
        _note(path, before | overrides)
        return self._continue(path, *resumed)

    def _continue(self, path: Path, learner: Learner, exactness: str) -> Path:
        blame = f"; {learner.source.env.unsaved[0]}" if exactness == EXCEPT_EPISODE else ""
        return self._run(learner, f"{path}: resumed at step {learner.clock.env_step:,} ({exactness}){blame}")

    def _run(self, learner: Learner, headline: str) -> Path:
        assert learner.durable is not None
        path = learner.durable.directory.path
        with Interrupts() as interrupts:  # to the very end: a finished run is not worth killing
            try:
                with Terminal(learner.config.run.steps) as terminal:
                    terminal.print(headline)
                    changes = self._learn(learner, learner.durable, terminal, interrupts)
                if changes is not None:
                    return self.resume(path, changes, learner.method)
                self.finish(learner, path)
            finally:
                interrupts.ending()
                if not learner.closed:
                    learner.close()
        print(path)
        return path

    def _learn(self, learner: Learner, durable: Durable, terminal: Terminal, interrupts: "Interrupts") -> dict[str, Any] | None:
        """Learn to the end; on divergence with a retry, close the learner and return the changed settings."""
        run, path = learner.config.run, durable.directory.path
        try:
            learner.learn(
                run.steps - learner.clock.env_step, reset_num_timesteps=False, trackers=[terminal], stop=interrupts.should_stop
            )
        except Preempted as end:
            terminal.print(f"{end}; `rlamort resume {path}` {durable.outlook}")
            raise
        except Diverged as error:
            terminal.print(f"{error}; diagnostics are in {durable.report_nan(error)}")
            if run.on_nan == "stop" or durable.directory.checkpoints.newest() is None:
                raise
            learner.close()
            slower = {"learning_rate": learner.config.values["learning_rate"] / 2, "on_nan": "stop"}
            terminal.print(f"retrying from the newest checkpoint, with learning_rate={slower['learning_rate']:g}")
            return slower
        finally:
            with contextlib.suppress(Diverged):  # the agent of the newest checkpoint is what is left then
                if not learner.closed and learner.clock.env_step:  # else nothing is learned that could be lost
                    learner.check_finite()
                    learner.save(path / "agent")
        return None


def _note(path: Path, overrides: dict[str, Any]) -> None:
    """Keep what was asked of the run in a folder."""
    with published_file(path / ASKED) as file:
        file.write_text(json.dumps(overrides, indent=1) + "\n")


def _noted(path: Path) -> dict[str, Any]:
    """What was asked of the run in a folder; nothing if that is not known, as of older runs, and all is asked anew."""
    try:
        return dict(read_json(path / ASKED))
    except Damaged:
        return {}


class Interrupts:
    """SIGINT and SIGTERM as a request to stop after the current round; a second one stops immediately."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:
        self.count = 0
        self.before = [signal.signal(number, self._take) for number in self.SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        return self.count > 0

    def ending(self) -> None:
        """After everything is saved, let the first signal end the waiting for uploads."""
        self.count = max(self.count, 1)

    def _take(self, number: int, frame: types.FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
