"""The machine: threads that it gives, none taken from the update by worker processes; and who multiplies its matrices."""

import json

import gymnasium
import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort.env.make import open_env
from rlamort.host import machine


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
    real = machine.Path
    monkeypatch.setattr(machine, "Path", lambda name: quota if name == "/sys/fs/cgroup/cpu.max" else real(name))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.cores() == 8  # no such file
    quota.write_text("max 100000\n")
    assert machine.cores() == 8
    quota.write_text("250000 100000\n")
    assert machine.cores() == 2
    quota.write_text("50000 100000\n")
    assert machine.cores() == 1


def test_threads_that_are_asked_for_are_taken_and_more_than_there_are_is_not_a_default():
    """While it learns; what surrounds it keeps its own."""

    def learning(**fields):
        seen = []
        agent = ra.SAC("Pendulum-v1", log_every=5, **fields)
        agent.learn(10, callback=lambda learner: seen.append(torch.get_num_threads()))
        return seen

    before = torch.get_num_threads()
    try:
        assert set(learning(threads=2)) == {2}
        assert torch.get_num_threads() == before
        torch.set_num_threads(machine.cores() + 3)
        assert set(learning()) == {machine.cores()}
        assert torch.get_num_threads() == machine.cores() + 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def unset():
    """torch's setting as it is before anybody touches it, and back again."""
    before = machine.MATMUL.fp32_precision
    machine.MATMUL.fp32_precision = "none"
    machine._favours_onednn.cache_clear()
    yield
    machine.MATMUL.fp32_precision = before
    machine._favours_onednn.cache_clear()


def test_products_stay_float32_whoever_computes_them(unset):
    torch.manual_seed(0)
    with machine.fast_products():
        assert machine.products() in ("BLAS", "oneDNN")
        for shape in ((256, 23, 256), (23, 256, 256), (256, 256, 12), (1, 17, 256), (1024, 400, 784)):
            m, k, n = shape
            for copies in ((), (2,)):
                a, b = torch.randn(*copies, m, k), torch.randn(*copies, n, k)
                exact = a.double() @ b.double().mT
                assert (a @ b.mT - exact).abs().max() < 2e-6 * exact.abs().max()


def test_a_processor_that_would_round_is_left_alone(unset, monkeypatch):
    def rounding(a, b):
        return torch.matmul(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else torch.matmul(a, b)

    monkeypatch.setattr(machine, "_vendor_is_amd", lambda: True)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    with machine.fast_products():
        assert machine.MATMUL.fp32_precision == "none"
    assert machine.products() == "BLAS"


@pytest.mark.parametrize("given", ["none", "ieee"])
def test_what_is_set_outside_is_there_again_and_what_a_user_has_set_stays(unset, given):
    machine.MATMUL.fp32_precision = given
    within = []
    learner = ra.SAC("Pendulum-v1", warmup_steps=1, compile=False)
    learner.learn(2, stop=lambda: within.append(machine.MATMUL.fp32_precision))
    assert machine.MATMUL.fp32_precision == given
    assert set(within) == {"bf16" if given == "none" and machine.products() == "oneDNN" else given}
    assert torch.get_float32_matmul_precision() == "highest"  # which it refuses to say where old and new settings differ


def test_a_run_says_who_computes_its_products(unset, tmp_path):
    ra.SAC("Pendulum-v1", dir=str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["float32 products"] == machine.products()
