"""Whether so many environments fit into memory and processes, computed before they are made."""

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import psutil

from rlamort.env.snapshot import preserved
from rlamort.errors import UserError
from rlamort.host.machine import cores, free_memory

WORKER = 200 * 2**20  # bytes of a worker process before its environments: torch and Gymnasium, 150 MiB where it was measured
DESCRIPTORS, SPARE = 3, 64  # of files: of a worker, in this process; for everything else
FEW, MANY = 5, 300  # environments that are made to measure one, at least and at most
SEEN, LARGE = 2**20, 64 * 2**20  # bytes that tell what one takes, and after which fewer than FEW are enough


def workers_of(vectorization: str, count: int, workers: int | None) -> int:
    """The number of worker processes; 0 for none.

    Args:
        vectorization: sync or async.
        count: number of environments.
        workers: None takes one for each core, at most one for each environment.

    Raises:
        UserError: they are more than environments or than the system's limits allow, or there can be none.
    """
    if vectorization == "sync":
        if workers is not None:
            raise UserError(f"num_workers={workers}: vectorization=sync has no worker processes; vectorization=async is needed")
        return 0
    if workers is not None and workers > count:
        raise UserError(f"num_workers={workers}: at most one for each of num_envs={count} environments is needed")
    chosen = min(count, cores()) if workers is None else workers
    for what, most in (("files (ulimit -n)", _descriptors() // DESCRIPTORS), ("processes (ulimit -u)", _processes())):
        if chosen > most:
            raise UserError(
                f"num_envs={count}: they would have {chosen} worker processes, and the limit of {what} leaves {max(0, most)}; "
                f"set num_workers to that at most, and each holds several environments"
            )
    return chosen


def require_memory(make: Callable[[], gymnasium.Env[Any, Any]], count: int, workers: int, most: float) -> None:
    """Compute the memory of `count` environments before they are made.

    Args:
        make: makes one; called a few times where `most` is too much for all.
        count: number of environments.
        workers: number of processes that they are in; 0 for this one.
        most: bytes that one takes at most.

    Raises:
        UserError: they, or the processes alone, take more than is free.
    """
    whole = free_memory()
    free = whole - workers * WORKER
    if workers and free <= 0:
        raise UserError(
            f"num_workers={workers}: the processes alone take {workers * WORKER / 2**30:.1f} GiB; {whole / 2**30:.1f} GiB of "
            f"memory are free, so at most {(whole - 1) // WORKER} fit, each with several environments"
        )
    if count == 1 or count * most <= free:
        return
    each = _bytes_of(make)
    if count * each > free:
        processes = f", and {workers} worker processes {workers * WORKER / 2**30:.1f} GiB" if workers else ""
        raise UserError(
            f"num_envs={count}: they take {count * each / 2**30:.1f} GiB{processes}; {whole / 2**30:.1f} GiB of memory "
            f"are free, so at most {max(0, free // each)} environments fit"
        )


def resident() -> int:
    """Bytes of memory that this process takes."""
    return int(psutil.Process().memory_info().rss)


def _bytes_of(make: Callable[[], gymnasium.Env[Any, Any]]) -> int:
    """Bytes of an environment that has made a step, without what the first one brings for all."""
    sizes: list[int] = []
    with preserved(), contextlib.ExitStack() as made:
        envs = []
        while len(sizes) < 2 or (grown := sizes[-1] - sizes[0]) < (LARGE if len(sizes) < FEW else SEEN):
            if len(sizes) == MANY:
                break
            env = make()
            made.callback(env.close)
            env.reset(seed=0)
            env.action_space.seed(0)
            env.step(env.action_space.sample())
            envs.append(env)
            sizes.append(resident())
    return max(SEEN, grown) // (len(sizes) - 1)  # memory comes in pages, so less than SEEN says only that it is no more


def _descriptors() -> float:
    """Files that this process may still open, but for some that are spared."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if most == resource.RLIM_INFINITY else most - psutil.Process().num_fds() - SPARE


def _processes() -> float:
    """Processes that may still be started: by the user's limit, which root does not have, and by the container's."""
    left, most = float("inf"), resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most != resource.RLIM_INFINITY and os.getuid() != 0:
        left = most - sum(process.info["uids"] and process.info["uids"].real == os.getuid() for process in
                          psutil.process_iter(["uids"]))  # fmt: skip
    group = Path("/sys/fs/cgroup/pids.max")
    if group.is_file() and group.read_text().strip() != "max":
        left = min(left, int(group.read_text()) - int(group.with_name("pids.current").read_text()))
    return left
