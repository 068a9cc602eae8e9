"""Threads: no more than the machine gives, and none taken from the update by worker processes."""

import gymnasium
import numpy as np
import torch
from rlamort.envs.make import open_env

import rlamort as ra
from rlamort import run


class SaysThreads(gymnasium.Env):
    """Observes how many threads torch has where it runs."""

    observation_space = gymnasium.spaces.Box(0, 1000, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def _observe(self):
        return np.array([torch.get_num_threads()], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        return self._observe(), 0.0, False, True, {}


def test_worker_processes_use_one_thread_each_and_take_none_from_here():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        env = open_env(SaysThreads, count=2, vectorization="async")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert env.reset(0).flatten().tolist() == [1, 1]
    env.close()


def test_a_quota_limits_threads(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    real = run.Path
    monkeypatch.setattr(run, "Path", lambda name: quota if name == "/sys/fs/cgroup/cpu.max" else real(name))
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(8)))
    assert run.cores() == 8  # no such file
    quota.write_text("max 100000\n")
    assert run.cores() == 8
    quota.write_text("250000 100000\n")
    assert run.cores() == 2
    quota.write_text("50000 100000\n")
    assert run.cores() == 1


def test_threads_that_are_asked_for_are_taken_and_more_than_there_are_is_not_a_default():
    before = torch.get_num_threads()
    try:
        ra.SAC("Pendulum-v1", threads=2)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(run.cores() + 3)
        ra.SAC("Pendulum-v1")
        assert torch.get_num_threads() == run.cores()
    finally:
        torch.set_num_threads(before)
