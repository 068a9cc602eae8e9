"""What wrappers learn in training is what evaluations, videos, saved and resumed agents go by, as it is."""

import counting
import gymnasium
import numpy as np
import pytest
from counting import SMALL, Noisy, Running
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

import rlamort as ra
from rlamort.errors import Preempted
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume

vector = gymnasium.wrappers.vector


def normalised():
    return NormalizeObservation(Noisy())


def running():
    return Running(Noisy())


GIVEN = {
    "function": lambda: normalised,
    "instance": normalised,
    "a wrapper of one's own": lambda: running,
    "two at once": lambda: lambda: NormalizeReward(NormalizeObservation(Noisy())),
    "vector of wrapped": lambda: SyncVectorEnv([normalised] * 2),
    "wrapped vector": lambda: vector.NormalizeObservation(SyncVectorEnv([Noisy] * 2)),
    "twice wrapped vector": lambda: vector.NormalizeReward(vector.NormalizeObservation(SyncVectorEnv([Noisy] * 2))),
}
FIELDS = {**SMALL, "eval_episodes": 1, "checkpoint_every": 1000, "log_every": 100}


def seen(agent):
    """Observations of an evaluation: around zero, where the statistics of training are used."""
    env = agent.environments.evaluation(20)
    env.reset(5)
    return env.step(env.domain.uniform(env.count)).x_next


@pytest.mark.parametrize("how", GIVEN)
def test_training_statistics_are_used_frozen_in_evaluation_and_after_loading(how, tmp_path):
    agent = ra.TD3(GIVEN[how](), **FIELDS).learn(600)
    trained = agent.environments.statistics()
    first = agent.score(20).returns
    assert np.allclose(first, agent.score(20).returns)
    assert np.allclose(first[:3], agent.score(3).returns, atol=1e-4)
    assert seen(agent).mean().abs() < 1
    assert str(agent.environments.statistics()) == str(trained)  # untouched
    agent.save(tmp_path / "kept")
    again = ra.load(tmp_path / "kept", env=GIVEN[how]())
    assert np.allclose(first, again.score(20).returns, atol=1e-4)
    again.learn(30)
    assert seen(again).mean().abs() < 1  # and gone on with


@pytest.mark.parametrize(
    "rows", [{}, {"num_envs": 2}, {"num_envs": 2, "vectorization": "async"}], ids=["one", "two", "workers"]
)
@pytest.mark.parametrize("make", [normalised, running], ids=["Gymnasium's", "one's own"])
def test_statistics_survive_a_resume(make, rows, tmp_path):
    with pytest.warns(UserWarning, match="no command can make it again"):
        agent = ra.TD3(make, dir=str(tmp_path / "run"), **FIELDS, **rows)
    with pytest.raises(Preempted):
        agent.learn(600, stop=lambda: agent.clock.env_step >= 300)
    before = agent.environments.statistics()
    agent.close()
    again, exactness = resume(tmp_path / "run", env=make)
    assert exactness == "exact"
    assert str(again.environments.statistics()) == str(before)
    again.close()


class Opaque(Noisy):
    """Its own state cannot be read, that of wrappers around it can."""

    def __init__(self):
        super().__init__()
        self.thing = iter(range(3))


def opaque():
    return NormalizeObservation(Opaque())


def test_statistics_survive_where_the_episode_does_not(tmp_path):
    with pytest.warns(UserWarning, match="no command can make it again"):
        agent = ra.TD3(opaque, dir=str(tmp_path / "run"), **FIELDS)
    with pytest.raises(Preempted):
        agent.learn(600, stop=lambda: agent.clock.env_step >= 300)
    count = agent.source.env.vector.envs[0].env.obs_rms.count
    agent.close()
    again, exactness = resume(tmp_path / "run", env=opaque)
    assert exactness == "exact but for the episode"
    assert count <= again.source.env.vector.envs[0].env.obs_rms.count <= count + 2
    again.close()


class Flaky(Noisy):
    def step(self, action):
        if self.np_random.random() < 0.02:
            raise RuntimeError("the robot fell apart")
        return super().step(action)


def test_statistics_survive_a_forgiven_fault():
    with pytest.warns(UserWarning, match="the robot fell apart"):
        agent = ra.TD3(lambda: NormalizeObservation(Flaky()), max_env_faults=1000, **FIELDS).learn(500)
    assert agent.source.env.faults > 2
    assert agent.source.env.vector.envs[0].env.obs_rms.count > 480


class Dies(Noisy):
    """Its process ends at its fiftieth step."""

    steps = 0

    def step(self, action):
        import os
        import signal

        self.steps += 1
        if self.steps == 50 and not os.path.exists(self.once):
            open(self.once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def test_statistics_survive_a_lost_worker(tmp_path):
    def make():
        env = Dies()
        env.once = str(tmp_path / "once")
        return NormalizeObservation(env)

    with pytest.warns(UserWarning, match="a worker process died"):
        agent = ra.TD3(make, num_envs=2, vectorization="async", **FIELDS).learn(160)
    rows = agent.environments.statistics()["rows"]
    counts = [row["layers"][kind][0]["attributes"]["obs_rms"]["attributes"]["count"] for row in rows for kind in row["layers"]]
    agent.close()
    assert min(counts) > 75  # all but the episode that was going on


def test_what_cannot_be_carried_is_said_with_the_remedy():
    with pytest.warns(UserWarning, match="wrappers in its worker processes are not visible to .*normalise=true"):
        agent = ra.TD3(AsyncVectorEnv([normalised] * 2), **FIELDS)
    agent.close()
    with pytest.raises(ra.UserError, match="it has 0 wrappers NormalizeObservation, and the one that was trained in 1"):
        ra.TD3(normalised, eval_env=unlike, **FIELDS).score(1)


def unlike():
    """Noisy's numbers in the spaces of a normalised one."""
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    return gymnasium.wrappers.TransformObservation(Noisy(), lambda observation: observation, box)


def test_an_evaluation_environment_of_ones_own_has_them_too():
    agent = ra.TD3(normalised, eval_env=normalised(), **FIELDS).learn(500)
    assert seen(agent).abs().max() < 6
    assert counting.Noisy().observation_space == Noisy.observation_space


@pytest.mark.parametrize("rows", [{}, {"num_envs": 2}])
def test_stable_baselines3_trains_in_what_is_given_and_is_evaluated_by_what_it_learned(rows, tmp_path):
    env = normalised()
    agent = learner_class("sb3/td3")(env, batch_size=16, warmup_steps=20, buffer_size=500, device="cpu", threads=1, **rows)
    agent.learn(200)
    assert env.obs_rms.count > 200 / rows.get("num_envs", 1)
    assert seen(agent).mean().abs() < 1
    first = agent.score(5).returns
    agent.save(tmp_path / "kept")
    assert np.allclose(ra.load(tmp_path / "kept", env=normalised).score(5).returns, first, atol=1e-4)
