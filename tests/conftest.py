"""Shared pieces: a device, an agent's spec, and small environments with known answers."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every process: tests share the cores

import gymnasium
import numpy as np
import pytest
import torch
from fake_cuda import CUDA, fake_cuda

from rlamort.env import Spec

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fake-cuda", action="store_true", help="run what names a device on fake CUDA tensors, not on the CPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))])
def device(request):
    if request.param == "cpu" and request.config.getoption("--fake-cuda"):
        with pytest.MonkeyPatch.context() as monkeypatch, fake_cuda(monkeypatch):
            yield CUDA
    else:
        yield torch.device(request.param)


@pytest.fixture
def spec() -> Spec:
    return Spec(3, [-2.0, 0.0], [2.0, 1.0])


class Count(gymnasium.Env):
    """Observations that count steps and name their episode, so that every transition can be told from every other.

    An episode of `length` steps terminates, truncates, or does both on its last one, by turns.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, lengths=(3, 1, 4), offset=0):
        self.lengths, self.episode, self.offset = lengths, -1, offset

    def _observe(self):
        return np.array([self.offset + self.episode, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        over = self.t >= self.lengths[self.episode % len(self.lengths)]
        kind = self.episode % 3
        reward = 100.0 * self.episode + self.t
        return self._observe(), reward, over and kind != 1, over and kind != 0, {}


class Identity(gymnasium.Env):
    """Reward is -(action - observation)^2 in the action's own units, in episodes of ten steps: the best return is 0."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(np.array([-3.0], np.float32), np.array([5.0], np.float32))

    def _observe(self):
        self.x = self.np_random.uniform(-1, 1, (1,)).astype(np.float32)
        return self.x

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action):
        reward = -float((action[0] - 1 - 2 * self.x[0]) ** 2)
        self.t += 1
        return self._observe(), reward, False, self.t == 10, {}
