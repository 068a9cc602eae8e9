"""Five promises about any environment that is accepted, and one about those that are not (Hypothesis draws them).

Played as passed; actions lie in the space; transitions are true; evaluations are apart; a resume is what it is said to be.
"""

import shutil
import tempfile
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from counting import Factor, Running
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics, TimeLimit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resume import assert_equal, everything

import rlamort as ra
from rlamort.errors import Preempted
from rlamort.run.restore import resume

FIELDS = {
    "hidden": [8], "batch_size": 8, "warmup_steps": 10, "buffer_size": 400, "device": "cpu", "threads": 1, "eval_episodes": 2,
    "eval_every": 25, "log_every": 20, "checkpoint_every": 1000,
}  # fmt: skip
STEPS, STOP = 60, 33


class Drawn(gymnasium.Env):
    """An environment of any spaces: it counts its steps in every coordinate, pays `pay`, and asserts what it is given."""

    def __init__(self, observation, action, pay=1.0, length=7, terminates=False):
        (shape, dtype), (low, high, action_dtype) = observation, action
        self.observation_space = Box(-1000, 1000, shape, np.dtype(dtype).type)
        self.action_space = Box(np.array(low, action_dtype), np.array(high, action_dtype), dtype=np.dtype(action_dtype).type)
        self.pay, self.length, self.terminates, self.played = pay, length, terminates, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert isinstance(action, np.ndarray | np.generic)  # Gymnasium's own vector environments make numbers of single ones
        assert action.dtype == self.action_space.dtype
        assert self.action_space.contains(np.asarray(action)), (action, self.action_space)
        self.t, self.played = self.t + 1, self.played + 1
        over = self.t == self.length
        return self.observe(), self.pay, over and self.terminates, over and not self.terminates, {}

    def observe(self):
        return np.full(self.observation_space.shape, self.t, self.observation_space.dtype)


gymnasium.register("Drawn-v0", entry_point=Drawn)

DTYPES = st.sampled_from(["float32", "float64", "float16"])
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)])


@st.composite
def actions(draw):
    """Bounds of every kind, given as what can be written to a file."""
    dtype, shape = draw(DTYPES), draw(SHAPES)
    centre = draw(st.sampled_from([0.0, 0.3, -7.0, 1000.0]))
    width = draw(st.sampled_from([1.0, 0.1, 3e-3, 50.0])) * (1 + abs(centre) if dtype == "float16" else 1)
    low = np.full(shape, centre - width, dtype)
    return low.tolist(), np.full(shape, centre + width, dtype).tolist(), dtype


WRAPPERS = {
    "none": lambda env: env,
    "time limit": lambda env: TimeLimit(env, 5),
    "one's own": lambda env: Factor(env, 3.0),
    "two": lambda env: Factor(TimeLimit(env, 4), 2.0),
    "statistics of episodes": RecordEpisodeStatistics,
    "normalised": NormalizeObservation,
    "normalised by oneself": Running,
    "normalised rewards": NormalizeReward,
}
NORMALISES = {"normalised", "normalised by oneself", "normalised rewards"}
WAYS = ["id", "module:Class", "class", "function", "instance", *(f"vector, {mode.name}" for mode in AutoresetMode)]


@st.composite
def cases(draw):
    """Keywords of an environment, a wrapper, a way of passing it, and how many are stepped side by side."""
    way = draw(st.sampled_from(WAYS))
    named = way in ("id", "module:Class", "class")
    kwargs = {
        "observation": (draw(SHAPES), draw(st.sampled_from(["float32", "float64"]))), "action": draw(actions()),
        "pay": draw(st.sampled_from([1.0, -2.5, 100.0])), "length": draw(st.integers(1, 9)), "terminates": draw(st.booleans()),
    }  # fmt: skip
    return kwargs, "none" if named else draw(st.sampled_from(sorted(WRAPPERS))), way, draw(st.integers(1, 3))


def passed(kwargs, wrapper, way, rows):
    """What a user passes, and the fields beside it."""

    def make():
        return WRAPPERS[wrapper](Drawn(**kwargs))

    if way.startswith("vector"):
        return SyncVectorEnv([make] * rows, autoreset_mode=AutoresetMode[way.partition(", ")[2]]), {}
    env = {"id": "Drawn-v0", "module:Class": "test_promises:Drawn", "class": Drawn, "function": make}.get(way) or make()
    return env, {"num_envs": rows, **({"env_kwargs": kwargs} if way in ("id", "module:Class", "class") else {})}


def inner(agent):
    """The environments of this file that it trains in."""
    return [row.unwrapped for row in agent.source.env.vector.unwrapped.envs]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_environment_that_is_accepted(case):
    kwargs, wrapper, way, _ = case
    pay = kwargs["pay"] * {"one's own": 3.0, "two": 2.0}.get(wrapper, 1.0)
    length = min(kwargs["length"], {"time limit": 5, "two": 4}.get(wrapper, 99))
    folder = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no command can make it again.*")
            env, fields = passed(*case)
            whole = ra.TD3(env, dir=str(folder / "whole"), **FIELDS, **fields).learn(STEPS)
            # played as passed, evaluated as passed
            if wrapper not in NORMALISES:
                assert whole.source.sample(300).reward.unique().tolist() == [pay]
                assert np.allclose(whole.score(5).returns, [pay * length] * 5)
            # transitions are true
            batch = whole.source.sample(300)
            if wrapper != "normalised" and wrapper != "normalised by oneself":
                assert (batch.x_next - batch.x).unique().tolist() == [1.0]
                assert batch.x_next.max() <= length
                assert torch.equal(
                    batch.terminated, (batch.x_next[:, 0] == length) & (kwargs["terminates"] and length == kwargs["length"])
                )
            # evaluations are apart
            before = [row.played for row in inner(whole)]
            assert whole.score(4).returns == whole.score(4).returns
            assert [row.played for row in inner(whole)] == before
            whole.close()
            # a resume is what it is said to be
            broken = ra.TD3(passed(*case)[0], dir=str(folder / "broken"), **FIELDS, **fields)
            with pytest.raises(Preempted):
                broken.learn(STEPS, stop=lambda: broken.clock.env_step >= STOP)
            broken.close()
            again, exactness = resume(folder / "broken", env=passed(*case)[0] if broken.environments.unnamed else None)
            again.learn(STEPS - again.clock.env_step, reset_num_timesteps=False)
            assert exactness == ("exact but for the episode" if way.startswith("vector") else "exact")
            if exactness == "exact":
                ours, theirs = everything(whole), everything(again)
                if wrapper == "statistics of episodes":  # which hold times
                    del ours[4], theirs[4]
                assert_equal(ours, theirs)
            elif wrapper != "normalised" and wrapper != "normalised by oneself":
                after = again.source.sample(300)
                assert (after.x_next - after.x).unique().tolist() == [1.0]
            again.close()
    finally:
        shutil.rmtree(folder)


REFUSED = {
    "whole numbers": {"action_space": Box(0, 5, (2,), np.int16)},
    "bytes": {"action_space": Box(0, 255, (1,), np.uint8)},
    "discrete": {"action_space": gymnasium.spaces.Discrete(3)},
    "several discrete": {"action_space": gymnasium.spaces.MultiDiscrete([2, 3])},
    "a dict of actions": {"action_space": gymnasium.spaces.Dict({"a": Box(-1, 1)})},
    "no bound below": {"action_space": Box(-np.inf, 1, (2,), np.float32)},
    "no bound above": {"action_space": Box(np.array([-1, -1]), np.array([1, np.inf]), (2,), np.float64)},
    "bounds beyond float32": {"action_space": Box(-1e200, 1e200, (1,), np.float64)},
    "no room": {"action_space": Box(1, 1, (1,), np.float32)},
    "no numbers": {"action_space": Box(-1, 1, (0,), np.float32)},
    "a dict of observations": {"observation_space": gymnasium.spaces.Dict({"a": Box(-1, 1)})},
    "text": {"observation_space": gymnasium.spaces.Text(3)},
    "a discrete observation": {"observation_space": gymnasium.spaces.Discrete(5)},
    "nothing to see": {"observation_space": Box(-1, 1, (0,), np.float32)},
}
PLAIN = {"observation": ((1,), "float32"), "action": ([-1.0], [1.0], "float32")}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("way", ["class", "function", "instance", "vector", "eval_env"])
def test_every_environment_that_is_refused_is_so_by_one_message_before_any_work(what, way, tmp_path):
    def make():
        env = Drawn(**PLAIN)
        vars(env).update(REFUSED[what])
        return env

    kind = type("Odd", (Drawn,), {"__init__": lambda self: vars(self).update(vars(make()))})
    given = {"class": kind, "function": make, "instance": make(), "eval_env": "Drawn-v0"}.get(way)
    if way == "vector":
        given = SyncVectorEnv([make] * 2)
    fields = {"eval_env": make, "env_kwargs": PLAIN} if way == "eval_env" else {}
    with pytest.raises(ra.UserError) as refused:
        ra.TD3(given, dir=str(tmp_path / "run"), **FIELDS, **fields)
    assert len(str(refused.value).splitlines()) == 1
    assert "env" in str(refused.value)
    assert not list(tmp_path.iterdir())
