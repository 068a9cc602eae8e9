"""Vector environments: stepped in this process, or each in a worker process."""

import contextlib
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.vector.vector_env import VectorWrapper

from rlamort.env.snapshot import FAULT, Snapshot, layers, seed_globals
from rlamort.errors import UserError

Factory = Callable[[], gymnasium.Env[Any, Any]]
LOST = (EOFError, ConnectionError, multiprocessing.TimeoutError)  # a worker process that died, or does not answer


class LocalVectorEnv(VectorEnv[Any, Any, Any]):
    """Environments stepped in sequence in this process, with less overhead than `gymnasium.vector.SyncVectorEnv`.

    Args:
        makers: functions that make one environment each.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, makers: Sequence[Callable[[], Snapshot]]) -> None:
        self.envs = [make() for make in makers]
        self.num_envs = len(self.envs)
        self.single_observation_space, self.single_action_space = self.envs[0].observation_space, self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._observations: list[Any] = [None] * self.num_envs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        for row in range(self.num_envs) if options is None else np.flatnonzero(options["reset_mask"]):
            self._observations[row], _ = self.envs[row].reset(seed=None if seed is None else seed + int(row))
        return self._observations, {}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        outcomes = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        self._observations, rewards, terminated, truncated, infos = map(list, zip(*outcomes, strict=True))
        faults = [info.get(FAULT) for info in infos]
        info = {FAULT: faults, f"_{FAULT}": [fault is not None for fault in faults]} if any(faults) else {}
        return self._observations, rewards, terminated, truncated, info

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Call a method of every environment, as `AsyncVectorEnv.call`."""
        return [getattr(env, name)(*arguments) for env in self.envs]

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()


class VectorFactory:
    """Makes vector environments of `Snapshot`s, without autoreset, again after worker processes are lost.

    Args:
        make: makes one environment.
        count: number of environments.
        vectorization: sync steps them in this process, async each in a worker process.
        options: of every reset.
        first: an existing instance that is the first environment; worker processes use copies.
    """

    def __init__(
        self,
        make: Factory,
        count: int = 1,
        vectorization: str = "sync",
        options: dict[str, Any] | None = None,
        first: gymnasium.Env[Any, Any] | None = None,
    ) -> None:
        self.make, self.count, self.vectorization, self.options, self.first = make, count, vectorization, options, first

    def __call__(self) -> VectorEnv[Any, Any, Any]:
        makers = [functools.partial(Snapshot, self.make, row, self.options) for row in range(self.count)]
        if self.vectorization == "async":
            seeds = np.random.randint(
                2**31, size=self.count
            ).tolist()  # from the run's stream, for what is drawn while it is made
            return self._workers(
                [functools.partial(_in_worker, maker, seed) for maker, seed in zip(makers, seeds, strict=True)]
            )
        if self.first is not None:
            makers[0] = functools.partial(makers[0], self.first)
            self.first = None
        return LocalVectorEnv(makers)

    def _workers(self, makers: Sequence[Callable[[], Snapshot]]) -> AsyncVectorEnv:
        threads = torch.get_num_threads()
        try:
            with _main_left_out():
                # not fork: the parent already runs torch's threads
                return AsyncVectorEnv(makers, context="forkserver", autoreset_mode=AutoresetMode.DISABLED)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"vectorization=async: worker processes cannot be given this environment: {type(error).__name__}: {error}; "
                f"vectorization=sync steps it in this process"
            ) from error
        finally:
            torch.set_num_threads(threads)  # it makes one environment here as well, to read its spaces


@contextlib.contextmanager
def _main_left_out() -> Iterator[None]:
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


def _in_worker(make: Callable[[], Snapshot], seed: int) -> Snapshot:
    """Make the environment of a worker process, with one thread and seeded global generators."""
    torch.set_num_threads(1)
    if multiprocessing.parent_process() is None:
        return make()
    seed_globals(seed)
    row = make()
    row.alone = True
    return row


def abandon(vector: VectorEnv[Any, Any, Any]) -> None:
    """Kill its worker processes, since one does not respond."""
    assert isinstance(vector, AsyncVectorEnv)
    for process in vector.processes:
        process.kill()
    for pipe in vector.parent_pipes:
        if pipe is not None:
            pipe.close()
    for process in vector.processes:
        process.join()
    vector.closed = True


def parts(vector: VectorEnv[Any, Any, Any]) -> list[list[Any]]:
    """The layers of a vector environment, and those of each of its environments in this process."""
    around: list[Any] = [vector]
    while isinstance(around[-1], VectorWrapper):
        around.append(around[-1].env)
    rows = getattr(around[-1], "envs", ())
    return [around, *(layers(row) for row in rows if isinstance(row, gymnasium.Env))]
