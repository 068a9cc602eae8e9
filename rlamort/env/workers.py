"""Environments in worker processes, several in each; numbers are exchanged through shared memory.

n environments in all, k of them in a worker
"""

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlamort.env.local import LocalVectorEnv
from rlamort.env.snapshot import FAULT, Snapshot, seed_globals
from rlamort.errors import UserError

PATIENCE = 5.0  # seconds for a worker to close its environments


class WorkerError(Exception):
    """What an environment raised in a worker process, or that a worker was lost, as text."""


class WorkerVectorEnv(VectorEnv[Any, Any, Any]):
    """Environments in worker processes, in contiguous groups of (almost) the same size.

    A worker that dies, or takes too long for a step, is killed. A step of its environments has the reward NaN and the reason in
    info, as that of one that raised; their next reset starts another worker. The environments of other workers play on.

    Args:
        makers: functions that make one environment each.
        spaces: of the observations and actions of one environment.
        workers: number of processes, at most as many as environments.
        timeout: time limit of a step of all environments of a worker, in seconds.
        seeds: by environment, of the global generators; the first one of a worker counts.

    Raises:
        UserError: the environments cannot be sent to a process, or made there.

    Attributes:
        first: the first environment of each worker, which keeps the process's global generators.
        statistics: by environment, the running statistics of wrappers that a new worker begins with; None if there are none.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(
        self,
        makers: Sequence[Callable[[], Snapshot]],
        spaces: tuple[gymnasium.spaces.Box, gymnasium.spaces.Box],
        workers: int,
        timeout: float,
        seeds: Sequence[int],
    ) -> None:
        self.makers, self.num_envs, self.timeout = makers, len(makers), timeout
        self.single_observation_space, self.single_action_space = spaces
        self.observation_space, self.action_space = (batch_space(space, self.num_envs) for space in spaces)
        self.statistics: Sequence[Any] | None = None
        self._seed = 0  # of the latest reset of all
        context = multiprocessing.get_context("forkserver")  # not fork: this process already runs torch's threads
        context.set_forkserver_preload([__name__, "mujoco"])  # so that workers need not import them, one by one
        row = np.dtype(
            [
                ("action", spaces[1].dtype, spaces[1].shape),
                ("observation", spaces[0].dtype, spaces[0].shape),
                ("reward", np.float64),
                ("terminated", bool),
                ("truncated", bool),
            ],
            align=True,
        )
        memory = context.RawArray("b", self.num_envs * row.itemsize)
        self.table = np.frombuffer(memory, row)  # (n,)
        groups = np.array_split(np.arange(self.num_envs), workers)
        self.first = [int(rows[0]) for rows in groups]
        self.workers: list[Worker] = []
        try:
            for rows in groups:
                mine = slice(int(rows[0]), int(rows[-1]) + 1)
                self.workers.append(Worker(context, makers[mine], seeds[mine.start], memory, row, mine, timeout))
            self._collect()
        except (Exception, SystemExit) as error:
            self.close()
            raise UserError(
                f"vectorization=async: worker processes cannot be given this environment: {_text(error)}; "
                f"vectorization=sync steps it in this process"
            ) from error

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all environments, environment i with seed + i, or those of `options["reset_mask"]` (n,)."""
        mask = np.ones(self.num_envs, dtype=bool) if options is None else options["reset_mask"]
        self._seed = self._seed if seed is None else seed
        for worker in self.workers:
            start, some = seed, mask[worker.rows]
            if worker.lost:
                self._replace(worker)
                start = self._seed + 1_000_003 * worker.losses if seed is None else seed
            if some.any():
                worker.send("reset", some, None if start is None else start + worker.rows.start)
        self._collect()
        return self.table["observation"], {}

    def _replace(self, worker: "Worker") -> None:
        """Start a worker again."""
        worker.start()
        worker.collect()
        if self.statistics is not None:
            worker.send("call", "take", [(one, False) for one in self.statistics[worker.rows]])
            worker.collect()

    def step_async(self, actions: np.ndarray) -> None:
        """Begin a step with actions (n, *shape)."""
        self.table["action"] = actions
        self._deadline = time.monotonic() + self.timeout
        for worker in self.workers:
            worker.send("step")

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The results of the step that was begun."""
        table, faults = self.table, {}
        for worker in self.workers:
            for row, fault in (worker.collect(self._deadline) or {}).items():
                faults[worker.rows.start + row] = fault
            if worker.lost:
                table["reward"][worker.rows], table["observation"][worker.rows] = np.nan, 0
                table["terminated"][worker.rows], table["truncated"][worker.rows] = False, True
                faults |= dict.fromkeys(range(self.num_envs)[worker.rows], f"a worker process {worker.lost}")
        return table["observation"], table["reward"], table["terminated"], table["truncated"], {FAULT: faults}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.step_async(actions)
        return self.step_wait()

    def call(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every environment, each with its own arguments."""
        for worker in self.workers:
            worker.send("call", name, arguments[worker.rows])
        return [one for answers in self._collect() for one in answers]

    def _collect(self) -> list[Any]:
        """The answers of all workers. Raises WorkerError or UserError if something was raised, or a worker is lost."""
        answers: list[Any] = []
        errors: list[Exception] = []
        for worker in self.workers:  # all of them, so that none is left waiting
            try:
                answers.append(worker.collect())
                if worker.lost:  # now, or before
                    errors.append(WorkerError(f"a worker process {worker.lost}"))
            except (WorkerError, UserError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def close_extras(self, **kwargs: Any) -> None:
        for worker in self.workers:
            worker.send("close")
        deadline = time.monotonic() + PATIENCE
        for worker in self.workers:
            with contextlib.suppress(WorkerError, UserError):
                worker.collect(deadline)
            worker.lose("ended")


class Worker:
    """A worker process and the way to talk to it.

    Args:
        context: of processes.
        makers: functions that make its environments.
        seed: of its global generators while they are made.
        memory: of the table of all environments.
        row: the table's dtype.
        rows: of its environments in the table.
        timeout: time limit of a step, for messages, in seconds.

    Attributes:
        lost: what happened to it; "" while it lives.
        losses: how often that happened.
    """

    def __init__(
        self,
        context: Any,
        makers: Sequence[Callable[[], Snapshot]],
        seed: int,
        memory: Any,
        row: np.dtype[Any],
        rows: slice,
        timeout: float,
    ) -> None:
        self.context, self.rows, self.timeout, self.losses = context, rows, timeout, 0
        self.arguments = (cloudpickle.dumps(list(makers)), seed, memory, row, rows)
        self.start()

    def start(self) -> None:
        """Start the process."""
        self.lost, self._asked = "", True
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=work, args=(theirs, *self.arguments), daemon=True)
        with main_left_out():
            self.process.start()
        theirs.close()

    def send(self, command: str, *payload: Any) -> None:
        """Send a command, unless the process is lost."""
        if not self.lost:
            self._asked = True
            try:
                self.pipe.send((command, payload))
            except ConnectionError:
                self.lose("died")

    def collect(self, deadline: float | None = None) -> Any:
        """The answer to the command; None if there was none, or the process is lost.

        Args:
            deadline: when it is killed, on the monotonic clock; None waits for ever.

        Raises:
            WorkerError, UserError: what was raised there.
        """
        if self.lost or not self._asked:
            return None
        self._asked = False
        try:
            if deadline is not None and not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                return self.lose(f"took more than {self.timeout:g} s")
            kind, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            return self.lose("died")
        if kind is not None:
            raise kind(answer)
        return answer

    def lose(self, reason: str) -> None:
        """Kill the process."""
        if not self.lost:
            self.lost, self.losses = reason, self.losses + 1
            self.process.kill()
            self.process.join()
            self.pipe.close()


class Group:
    """The environments of a worker process, inside it; its public methods are the commands."""

    def begin(self, makers: bytes, seed: int, memory: Any, row: np.dtype[Any], rows: slice) -> None:
        """Make them: see `Worker`."""
        seed_globals(seed)
        self.envs = LocalVectorEnv(cloudpickle.loads(makers))
        self.envs.envs[0].keeps_globals = True
        self.table = np.frombuffer(memory, row)[rows]  # (k,)

    def reset(self, mask: np.ndarray, seed: int | None) -> None:
        """Reset some of them, environment i with seed + i."""
        self._write(self.envs.reset(seed=seed, options={"reset_mask": mask})[0])

    def step(self) -> dict[int, str]:
        """Step them with the actions in the table; returns what went wrong, by environment."""
        table = self.table
        observations, table["reward"], table["terminated"], table["truncated"], info = self.envs.step(table["action"].copy())
        self._write(observations)
        faults: dict[int, str] = info[FAULT]
        return faults

    def call(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of each."""
        return self.envs.call(name, arguments)

    def close(self) -> None:
        """Release their resources."""
        self.envs.close()

    def _write(self, observations: Any) -> None:
        place = self.table["observation"]
        with np.errstate(over="ignore"):  # what the space's dtype cannot hold, the adapter says
            place[:] = np.asarray(observations, place.dtype).reshape(place.shape)


def work(pipe: Any, *arguments: Any) -> None:
    """A worker process: carries out commands until one is to close, or nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C means is decided by the run
    torch.set_num_threads(1)
    group, command, payload = Group(), "begin", arguments
    while True:
        try:
            answer: tuple[Any, Any] = None, getattr(group, command)(*payload)
        except UserError as error:
            answer = UserError, str(error)
        except Exception as error:
            answer = WorkerError, _text(error)
        try:
            pipe.send(answer)
            if command == "close":
                return
            command, payload = pipe.recv()
        except (EOFError, ConnectionError):
            return


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def main_left_out() -> Iterator[None]:
    """A context in which processes start without importing the user's script; its objects are sent by value."""
    main = sys.modules["__main__"]
    attributes = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        for name in attributes:
            setattr(main, name, None)
        yield
    finally:
        for name, value in attributes.items():
            setattr(main, name, value)
