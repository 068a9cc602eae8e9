"""Environments that misbehave, one way each."""

import threading

import gymnasium
import numpy as np

BOX = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
UNIT = gymnasium.spaces.Box(-1, 1, (1,), np.float32)


class Good(gymnasium.Env):
    observation_space, action_space = BOX, UNIT
    length = 20

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), self.reward(), self.t == self.length, False, {}

    def observe(self):
        return np.full(2, self.t, np.float32)

    def reward(self):
        return 1.0


class NaNObservation(Good):
    def observe(self):
        return np.array([0, np.nan], np.float32)


class LateNaN(Good):
    """Only after training has begun."""

    steps = 0

    def observe(self):
        LateNaN.steps += 1
        return np.full(2, np.nan if LateNaN.steps > 300 else 0.0, np.float32)


class NaNReward(Good):
    def reward(self):
        return float("nan")


class WrongShape(Good):
    def observe(self):
        return np.zeros(3, np.float32)


class WrongDtype(Good):
    def observe(self):
        return np.array(["a", "b"])


class AList(Good):
    def observe(self):
        return [0.0, 0.0]


class Raises(Good):
    def reward(self):
        raise RuntimeError("the robot fell apart")


class LateRaises(Good):
    def reward(self):
        if self.np_random.random() < 0.01:
            raise RuntimeError("the robot fell apart")
        return 1.0


class Endless(Good):
    length = -1


class FourTuple(Good):
    def step(self, action):
        return super().step(action)[:4]


class Reuses(Good):
    """One array for all observations."""

    def __init__(self):
        self.array = np.zeros(2, np.float32)

    def observe(self):
        self.array[:] = self.t
        return self.array


class Locked(Good):
    """It holds something that cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()


class Discrete(Good):
    action_space = gymnasium.spaces.Discrete(3)


class Unbounded(Good):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class DictObservation(Good):
    observation_space = gymnasium.spaces.Dict({"a": BOX})


class NotAnEnv:
    pass


class Needs(Good):
    def __init__(self, size):
        pass


class Flaky(Good):
    """It raises now and then, and is as new afterwards."""

    def step(self, action):
        if self.np_random.random() < 0.02:
            raise RuntimeError("the robot fell apart")
        return super().step(action)


class FlakyNumbers(Good):
    """NaN now and then, in the observation or the reward."""

    def observe(self):
        return np.full(2, np.nan if self.t and self.np_random.random() < 0.01 else self.t, np.float32)

    def reward(self):
        return float("nan") if self.np_random.random() < 0.01 else 1.0


class Fragile(Good):
    """Each step costs 1, and about half of its seeds break at their fifth."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.breaks = self.np_random.random() < 0.5
        return result

    def reward(self):
        if self.breaks and self.t == 5:
            raise RuntimeError("the robot fell apart")
        return -1.0


class Dies(Good):
    """Its process ends, or hangs, once: the file says that it has happened."""

    def __init__(self, once, how):
        self.once, self.how = once, how

    def step(self, action):
        import os
        import signal
        import time

        if self.t == 10 and self.dies() and not os.path.exists(self.once):
            with open(self.once, "w"):
                pass
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return super().step(action)

    def dies(self):
        return self.np_random.random() < 0.5


class SecondDies(Dies):
    """Of several, the one with the seed 1."""

    def reset(self, *, seed=None, options=None):
        self.second = seed == 1
        return super().reset(seed=seed)

    def dies(self):
        return self.second


class ResetsThrice(Good):
    resets = 0

    def reset(self, *, seed=None, options=None):
        if self.resets == 3:
            raise RuntimeError("three episodes are enough")
        self.resets += 1
        return super().reset(seed=seed)


class Drawing(Good):
    """It draws from its process's generator."""

    def observe(self):
        return np.random.random(2).astype(np.float32)


class Holds(Good):
    """It takes memory: `size` MiB."""

    def __init__(self, size):
        self.array = np.ones(size * 2**20, np.uint8)


class BreaksTheAgent(Good):
    """Rewards that no network survives, after a while."""

    def reward(self):
        return 1e38 if self.np_random.random() < 0.3 else 1.0
