"""Vector environments that rlamort makes: stepped in this process, or in worker processes."""

import functools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.vector_env import VectorWrapper

from rlamort.env.local import LocalVectorEnv
from rlamort.env.snapshot import Snapshot, layers
from rlamort.env.workers import WorkerVectorEnv

Factory = Callable[[], gymnasium.Env[Any, Any]]
Spaces = tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]  # of observations and of actions


def vector_of(
    make: Factory,
    spaces: Spaces,
    count: int = 1,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    first: gymnasium.Env[Any, Any] | None = None,
    timeout: float = 60.0,
) -> LocalVectorEnv | WorkerVectorEnv:
    """A vector environment of `Snapshot`s, without autoreset.

    Args:
        make: makes one environment.
        spaces: of one environment.
        count: number of environments.
        workers: number of processes that step them; 0 for this one.
        options: of every reset.
        first: an existing instance that is the first environment; worker processes use copies.
        timeout: time limit of a step in a worker process, in seconds.

    Raises:
        UserError: worker processes cannot be given the environment.
    """
    makers = [functools.partial(Snapshot, make, row, options) for row in range(count)]
    if workers:
        # from the run's stream, for what is drawn while they are made; as many whatever the number of workers
        seeds = np.random.randint(2**31, size=count).tolist()
        return WorkerVectorEnv(makers, spaces, workers, timeout, seeds)
    if first is not None:
        makers[0] = functools.partial(makers[0], first)
    return LocalVectorEnv(makers)


def parts(vector: VectorEnv[Any, Any, Any]) -> list[list[Any]]:
    """The layers of a vector environment, and those of each of its environments in this process."""
    around: list[Any] = [vector]
    while isinstance(around[-1], VectorWrapper):
        around.append(around[-1].env)
    rows = getattr(around[-1], "envs", ())
    return [around, *(layers(row) for row in rows if isinstance(row, gymnasium.Env))]
