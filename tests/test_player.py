"""Acting with a memory: it begins anew with each episode, wherever an agent plays, and outlives a kill."""

import numpy as np
import pytest
import torch
from conftest import Count
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from remembering import ROW, Remembering
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from test_resume import assert_equal, everything, timeless

from rlamort.agent import Agent, Player
from rlamort.env.make import open_env
from rlamort.errors import Preempted, UserError
from rlamort.run.capture import Captured
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.run.rounds import Eager
from rlamort.score import score
from rlamort.source import Replay
from rlamort.train import Clock, Journal, Schedule, train


@pytest.fixture
def row(tmp_path):
    file = tmp_path / "remembering.yaml"
    file.write_text(ROW)
    return str(file)


def test_a_reset_in_one_environment_leaves_the_carry_of_the_others_bit_for_bit(spec):
    player = Player(Remembering(spec), 4)
    for _ in range(3):
        player(torch.randn(4, 3), explore=True)
    before = player.h
    player.begin(np.array([False, True, False, False]))
    for old, new in zip(before, player.h, strict=True):
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])
        assert torch.equal(new[1], torch.zeros_like(new[1]))
        assert old[1].any()  # what was remembered is untouched where somebody else holds it
    kept = player.h
    player.begin(np.zeros(4, dtype=bool))
    assert all(one is other for one, other in zip(kept, player.h, strict=True))


def test_an_agent_without_a_memory_defines_act_alone_and_one_with_it_acts_from_the_start(spec):
    class Plain(Agent):
        def act(self, x, explore):
            return x[:, :2]

    x = torch.randn(5, 3)
    plain, remembering = Plain(spec, normalise=False), Remembering(spec)
    y, h = plain.play(x, plain.start(5), explore=True)
    assert torch.equal(y, x[:, :2])
    assert h == ()
    assert torch.equal(remembering.act(x, False), remembering.play(x, remembering.start(5), False)[0])
    with pytest.raises(NotImplementedError, match="neither act nor play"):
        Agent(spec, normalise=False).act(x, False)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("update_after", [0, 10**6])
def test_the_loop_begins_anew_with_every_episode(mode, update_after):
    """What is stored says so: steps of the episode by the environment's count, against those that the agent remembered."""
    if mode == AutoresetMode.DISABLED:
        pytest.skip("nothing resets it")
    env = open_env(SyncVectorEnv([lambda: Count((3, 1, 4)), lambda: Count((2, 5))], autoreset_mode=mode))
    env.reset(0)
    source, agent = Replay(env, buffer_size=1_000), Remembering(env.spec)
    schedule = Schedule(60, 0, update_after, 1, 8, 10**6, 10**6)
    train(agent, source, schedule, Clock(), Eager(agent, lambda: source.sample(8)), Journal())
    batch = source.sample(500)
    assert len(batch.x[:, 1].unique()) == 5
    torch.testing.assert_close(batch.y[:, 0], batch.x[:, 1].sin())


def test_a_round_of_warm_up_and_a_fault_begin_anew_too():
    class Faulty(Count):
        def step(self, action):
            if self.t == 2 and self.episode % 2:
                raise RuntimeError("once in a while")
            return super().step(action)

    env = open_env(lambda: Faulty((4,)), count=2, max_faults=1_000)
    env.reset(0)
    source, agent = Replay(env, buffer_size=1_000), Remembering(env.spec)
    with pytest.warns(UserWarning, match="once in a while"):
        train(agent, source, Schedule(80, 0, 0, 1, 8, 10**6, 10**6), Clock(), Eager(agent, lambda: source.sample(8)), Journal())
    batch = source.sample(500)
    torch.testing.assert_close(batch.y[:, 0], batch.x[:, 1].sin())


class Recorded(Count):
    """It pays what an agent plays that remembers the number of steps, and nothing for anything else."""

    def step(self, action):
        right = np.allclose(action, np.sin(self.t))
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(right), terminated, truncated, info


def test_evaluations_have_a_player_of_their_own():
    env = open_env(Recorded, count=3)
    agent = Remembering(env.spec)
    found = score(agent, env, episodes=7)
    assert found.returns == [float(length) for length in found.lengths]
    assert found == score(agent, env, episodes=7)


def test_predict_takes_and_gives_state_as_gymnasium_and_sb3_do(spec):
    agent = Remembering(spec)
    x = np.zeros((4, 3), np.float32)
    _, state = agent.predict(x)
    assert [part.shape for part in state] == [(4,), (4, 2)]
    y, state = agent.predict(x, state, episode_start=np.array([False, True, False, False]))
    assert state[0].tolist() == [2, 1, 2, 2]
    assert np.allclose(y[1], agent.predict(x)[0][1])
    assert not np.allclose(y[0], y[1])
    one, state = agent.predict(np.zeros(3))
    assert one.shape == (2,)
    assert agent.predict(np.zeros(3), state)[1][0].tolist() == [2]
    assert agent.predict(np.zeros(3), state, episode_start=True)[1][0].tolist() == [1]
    with pytest.raises(ValueError, match=r"state: the agent remembers .* \(4,\), \(4, 2\); \(1,\), \(1, 2\) given"):
        agent.predict(x, state)


def test_evaluate_policy_of_sb3_passes_the_state_on(row):
    """A reward for each step that was counted right: all of them, in three environments whose episodes end by turns."""
    learner = learner_class(row)(Recorded, buffer_size=1_000, warmup_steps=1)
    env = make_vec_env(Recorded, n_envs=3)
    returns, lengths = evaluate_policy(learner, env, n_eval_episodes=12, return_episode_rewards=True, warn=False)
    assert returns == [float(length) for length in lengths]
    assert max(lengths) == 4


def test_captured_rounds_remember_as_eager_ones_do(device):
    env = open_env("Pendulum-v1", count=2, device=device)
    env.reset(0)
    source = Replay(env, buffer_size=100)
    source.collect(lambda: env.domain.uniform(2))
    agent = Remembering(env.spec, weight=0.1).to(device)
    found = []
    for kind in (Eager, Captured):
        torch.manual_seed(0)
        rounds, h = kind(agent, lambda: source.sample(4)), tuple(part.to(device) for part in agent.start(2))
        for _ in range(3):
            _, y, h = rounds([True], env.x, h)
        found.append([y, *h])
    assert not isinstance(rounds.rounds, Eager)
    assert found[0][1].tolist() == [3, 3]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


SMALL = {"warmup_steps": 20, "batch_size": 8, "buffer_size": 300, "eval_every": 100, "eval_episodes": 2, "log_every": 50,
         "checkpoint_every": 70, "weight": 0.1, "device": "cpu"}  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("at", [10, 75, 233])
def test_what_is_remembered_travels_in_checkpoints(count, at, row, tmp_path):
    fields = {**SMALL, "num_envs": count, "update_after": 40}
    whole = learner_class(row)("Hopper-v5", dir=str(tmp_path / "whole"), **fields).learn(300)
    broken = learner_class(row)("Hopper-v5", dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(300, stop=lambda: broken.clock.env_step >= at)
    broken.close()
    again, exactness = resume(tmp_path / "broken", method=row)
    assert exactness == "exact"
    again.learn(300 - again.clock.env_step, reset_num_timesteps=False)
    assert again.clock.h[0].shape == (count,)
    assert_equal(everything(whole), everything(again))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


def test_a_carry_of_another_shape_is_said_on_resume(row, tmp_path):
    run = learner_class(row)("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(50)
    run.close()
    with (
        pytest.warns(UserWarning, match="trace: 3 from here on, 2 until now"),
        pytest.raises(UserError, match=r"trace: what the run.*remembers .* \(1,\), \(1, 3\); \(1,\), \(1, 2\) given"),
    ):
        resume(tmp_path / "run", {"trace": 3}, method=row)
