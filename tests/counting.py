"""Environments whose numbers tell what was played, for the tests of what is given, evaluated, saved and resumed."""

import random

import gymnasium
import numpy as np
import torch

BOX = gymnasium.spaces.Box(0, 100, (1,), np.float32)
UNIT = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
SMALL = {"hidden": [16], "batch_size": 16, "warmup_steps": 20, "buffer_size": 2000, "device": "cpu", "threads": 1}


class Pay(gymnasium.Env):
    """Its observation is the number of steps so far, its reward what it pays; an episode has seven steps."""

    observation_space, action_space = BOX, UNIT

    def __init__(self, pay=1.0):
        self.pay = pay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.options = 0, options
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), self.pay, False, self.t == 7, {}

    def observe(self):
        return np.array([self.t], np.float32)


gymnasium.register("Pay-v0", entry_point=Pay)


class Factor(gymnasium.Wrapper):
    """A wrapper of a user's own, which cannot say how it was made."""

    def __init__(self, env, factor=2.0):
        super().__init__(env)
        self.factor = factor

    def step(self, action):
        observation, reward, *more = self.env.step(action)
        return observation, reward * self.factor, *more


class Noisy(Pay):
    """Its observations are drawn around 20, and its reward asks the action to follow them."""

    observation_space = gymnasium.spaces.Box(-1000, 1000, (1,), np.float32)

    def observe(self):
        self.x = self.np_random.normal(20, 5)
        return np.array([self.x], np.float32)

    def step(self, action):
        missed = -abs(float(action[0]) - (self.x - 20) / 10)
        observation, _, *more = super().step(action)
        return observation, missed, *more


class Running(gymnasium.ObservationWrapper):
    """A normalising wrapper of a user's own."""

    def __init__(self, env):
        super().__init__(env)
        self.count, self.mean = 0, 0.0

    def observation(self, observation):
        self.count += 1
        self.mean += (observation - self.mean) / self.count
        return (observation - self.mean).astype(np.float32)


class Nested(gymnasium.Env):
    """Another environment in an attribute, to which all is passed on."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self):
        self.sim = gymnasium.make("Pendulum-v1")

    def reset(self, *, seed=None, options=None):
        return self.sim.reset(seed=seed)

    def step(self, action):
        return self.sim.step(action)


class Sampler(Pay):
    """It samples from its own action space, which its class shares."""

    def observe(self):
        return np.array([self.t + 0.01 * self.action_space.sample()[0]], np.float32)


class ClassAttribute(Pay):
    total = 0

    def observe(self):
        ClassAttribute.total += 1
        return np.array([ClassAttribute.total % 50], np.float32)


COUNTS = {"observed": 0}


class ModuleGlobal(Pay):
    def observe(self):
        COUNTS["observed"] += 1
        return np.array([COUNTS["observed"] % 50], np.float32)


number = 0


class Rebound(Pay):
    def observe(self):
        return np.array([_next() % 50], np.float32)


def _next():
    global number
    number += 1
    return number


class GlobalGenerators(Pay):
    """It draws from the generators that everything in a process shares."""

    def observe(self):
        return np.array([np.random.random() + random.random() + torch.rand(()).item()], np.float32)


class Tuples(Pay):
    def reset(self, *, seed=None, options=None):
        self.pair = (0, (1, 2))
        return super().reset(seed=seed)

    def step(self, action):
        assert isinstance(self.pair, tuple)
        assert isinstance(self.pair[1], tuple)
        self.pair = (self.pair[0] + 1, self.pair[1])
        return super().step(action)

    def observe(self):
        return np.array([self.pair[0]], np.float32)


class Part:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 0


class Parts(Pay):
    """Objects of classes of the user's own, one of them held twice, in containers of every kind."""

    def __init__(self):
        super().__init__()
        self.part = Part()
        self.held = {"again": self.part, ("a", 1): [Part(), {1, 2}, frozenset({3})], "made": None}

    def observe(self):
        self.part.value += 1
        if self.t == 4:
            self.held["made"] = Part()
        return np.array([self.held["again"].value % 50], np.float32)


class FunctionAttribute(Pay):
    def __init__(self):
        super().__init__()

        def count():
            count.calls += 1
            return count.calls

        count.calls = 0
        self.count = count

    def observe(self):
        return np.array([self.count() % 50], np.float32)


class Generators(Pay):
    """Every kind of generator, each its own."""

    def __init__(self):
        super().__init__()
        self.own = [np.random.default_rng(1), np.random.RandomState(2), random.Random(3), torch.Generator().manual_seed(4)]

    def observe(self):
        numpy, old, python, tensor = self.own
        drawn = numpy.random() + old.random_sample() + python.random() + torch.rand((), generator=tensor).item()
        return np.array([drawn], np.float32)


class Iterator(Pay):
    """It holds something whose state nobody can read."""

    def __init__(self):
        super().__init__()
        self.numbers = iter(range(10**9))

    def observe(self):
        return np.array([next(self.numbers) % 50], np.float32)


class Clock(Pay):
    """It looks at the time."""

    def observe(self):
        import time

        return np.array([time.perf_counter() % 50], np.float32)


class Heavier(gymnasium.Wrapper):
    """Another body mass in every episode."""

    def reset(self, **keywords):
        answer = self.env.reset(**keywords)
        self.unwrapped.model.body_mass[1] = 1 + self.np_random.random()
        return answer
