"""Measurement of one library in its own process; `rlamort.measure.speed` runs this file, also with other interpreters.

    python speed_worker.py rlamort|sb3|sbx sac|td3|ddpg ENV THREADS

Two hidden layers of 256, batches of 256, one update per environment step, 1,000 random steps first. Prints one JSON line.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

STARTED = time.perf_counter()
WARM, TIMED, UPDATES, ACTIONS = 1_500, 3_000, 1_000, 1_000


def build_rlamort(algorithm: str, env: str) -> Any:
    import rlamort

    return getattr(rlamort, algorithm.upper())(env, seed=0, warmup_steps=1000, batch_size=256, compile=True)


def build_other(library: str, algorithm: str, env: str) -> Any:
    import importlib

    kind = getattr(importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library]), algorithm.upper())
    narrow = {} if algorithm == "sac" else {"policy_kwargs": {"net_arch": [256, 256]}}
    return kind("MlpPolicy", env, seed=0, learning_starts=1000, batch_size=256, train_freq=1, gradient_steps=1, **narrow)


def updates_of(library: str, model: Any) -> Callable[[int], Any]:
    """Pure updates: sampling and learning without the environment; rlamort's include the next action, in one graph."""
    if library != "rlamort":
        return lambda count: model.train(gradient_steps=count, batch_size=256)

    def update(count: int) -> None:
        every = model.agent.improve_every
        with model.training():
            for number in range(1, count + 1):
                model.updates([number % every == 0], model.source.env.x, ())

    return update


def replay_bytes(library: str, model: Any) -> float:
    """Memory of the replay buffer per transition of its capacity."""
    if library == "rlamort":
        ring = model.source
        tensors = (ring.x, ring.y, ring.reward, ring.terminated, ring.stop, ring.starts)
        return float((sum(t.numel() * t.element_size() for t in tensors) + ring.begins.nbytes) / (ring.rows * ring.slots))
    arrays = [value for value in vars(model.replay_buffer).values() if type(value).__name__ == "ndarray"]
    return float(sum(array.nbytes for array in arrays) / model.replay_buffer.buffer_size)


def measure(library: str, algorithm: str, env: str, threads: int) -> dict[str, float]:
    """Rates per second, times in seconds, latency in milliseconds, memory in bytes and MiB."""
    if library != "sbx":
        import torch

        torch.set_num_threads(threads)
    model = build_rlamort(algorithm, env) if library == "rlamort" else build_other(library, algorithm, env)
    built = time.perf_counter()
    model.learn(WARM)
    warmed = time.perf_counter()
    model.learn(TIMED, reset_num_timesteps=False)
    learned = time.perf_counter()
    update = updates_of(library, model)
    update(10)
    before = time.perf_counter()
    update(UPDATES)
    updated = time.perf_counter()
    # `learn` has left an environment behind in each of them, whose latest observation is as good as any
    observation = model.source.env.x.numpy()[0] if library == "rlamort" else model._last_obs[0]
    latencies = []
    for _ in range(ACTIONS):
        start = time.perf_counter()
        model.predict(observation)
        latencies.append(time.perf_counter() - start)
    rate = TIMED / (learned - warmed)
    return {
        "steps_per_s": rate,
        "updates_per_s": UPDATES / (updated - before),
        "acting_ms": 1e3 * sorted(latencies)[ACTIONS // 2],
        "replay_bytes_per_transition": replay_bytes(library, model),
        "peak_memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "start_s": built - STARTED,
        "first_updates_s": warmed - built - (WARM - 1000) / rate,  # compiling, and a thousand steps without updates
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
