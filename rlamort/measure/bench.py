"""Measurements of rlamort itself: `rlamort bench NAME`."""

import functools
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from rlamort.host.machine import versions
from rlamort.measure.gpu import gpu
from rlamort.measure.report import Report
from rlamort.measure.speed import profile, scaling, speed
from rlamort.run.learner import Learner, learner_class
from rlamort.run.rounds import Eager
from rlamort.source import Replay

EVERY = 10_000  # environment steps between checkpoints
FRAMES = 1_000_000


def checkpoint() -> Report:
    """Time and size of a checkpoint late in a long run: SAC on HalfCheetah-v5 with a full buffer of 10^6 frames."""
    with tempfile.TemporaryDirectory() as folder:
        learner = learner_class("sac")("HalfCheetah-v5", dir=str(Path(folder) / "run"), buffer_size=FRAMES, warmup_steps=1)
        _fill(learner.source)
        assert learner.directory is not None
        ckpt = learner.directory.path / "ckpt"
        first = _timed(learner)
        times, sizes = [], []
        for _ in range(3):
            for _ in range(EVERY):
                learner.source.collect(lambda: learner.source.env.domain.uniform(1))
            learner.clock.env_step += EVERY
            times.append(_timed(learner))
            newest = max(ckpt.glob("step_*"))
            added = [f for f in (ckpt / "frames").iterdir() if f.name.startswith(newest.name.removeprefix("step_"))]
            sizes.append(_size(newest) + sum(f.stat().st_size for f in added))
        start, steps = time.perf_counter(), 600
        updates = Eager(learner.agent, lambda: learner.source.sample(256))
        for _ in range(steps):
            learner.source.collect(functools.partial(learner.agent.act, learner.source.waiting, explore=True))
            updates([True], None)
        rate = steps / (time.perf_counter() - start)
        learner.close()
    lines = [
        f"first checkpoint, with all {FRAMES:,} frames: {first:.2f} s",
        f"each later one, {EVERY:,} steps on: {median(times):.3f} s, {median(sizes) / 2**20:.1f} MiB written",
        f"training: {rate:.0f} steps/s eager, {torch.get_num_threads()} threads",
        f"share of training time: {100 * median(times) * rate / EVERY:.2f} %",
    ]
    return Report(lines, {"versions": versions(), "seconds": times, "bytes": sizes, "first_s": first, "steps_per_s": rate})


def _fill(ring: Replay) -> None:
    """Fill the replay as by one endless episode."""
    ring.x.normal_()
    ring.y.uniform_(-1, 1)
    ring.reward.normal_()
    ring.terminated.zero_()
    ring.stop.zero_()
    ring.written[:] = ring.slots
    ring.size[:] = ring.slots - 1
    ring.first[:] = 0
    ring.begins[:] = True
    ring.begins[:, 0] = False
    ring.starts.copy_(torch.from_numpy(np.tile(np.roll(np.arange(ring.slots, dtype=np.int32), -1), ring.rows)))


def _timed(learner: Learner) -> float:
    start = time.perf_counter()
    assert learner.durable is not None
    learner.durable.save()
    return time.perf_counter() - start


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tracking() -> Report:
    """Overhead of tracking with a W&B server that accepts connections and never responds, interleaved with no tracking."""
    steps, rounds = 4_000, 3
    seconds: dict[str, list[float]] = {"none": [], "wandb": []}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WANDB_API_KEY": "x" * 40}
        for turn in range(rounds):
            for track in seconds:
                learner = learner_class("sac")(
                    "HalfCheetah-v5", dir=f"{folder}/{track}-{turn}", track=track, warmup_steps=500, eval_every=10**6,
                    log_every=100, checkpoint_every=500, buffer_size=10_000, track_timeout=0.1,
                )  # fmt: skip
                learner.learn(600)
                start = time.perf_counter()
                learner.learn(steps, reset_num_timesteps=False)
                seconds[track].append(time.perf_counter() - start)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that records are not uploaded, as intended
                    learner.close()
    ratios = [with_it / without for with_it, without in zip(seconds["wandb"], seconds["none"], strict=True)]
    lines = [
        f"{steps:,} steps of SAC on HalfCheetah-v5, {rounds} interleaved rounds, {torch.get_num_threads()} threads",
        f"without tracking: {median(seconds['none']):.2f} s; with a server that hangs: {median(seconds['wandb']):.2f} s",
        f"median ratio: {median(ratios):.3f}",
    ]
    return Report(lines, {"versions": versions(), "seconds": seconds, "ratios": ratios})


BENCHES: dict[str, Callable[..., Report]] = {
    "speed": speed, "profile": profile, "scaling": scaling, "checkpoint": checkpoint, "tracking": tracking,
    "gpu": gpu,
}  # fmt: skip
