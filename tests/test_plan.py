"""Model predictive control: plans through known dynamics, begun where the one before left off."""

import gymnasium
import numpy as np
import pytest
import torch
from rlamort.agents.plan import MPC
from test_cli import rlamort
from test_resume import assert_equal, everything, timeless

import rlamort as ra
from rlamort import parts
from rlamort.agent import Player
from rlamort.config import config_of
from rlamort.env.make import open_env
from rlamort.errors import Preempted, UserError
from rlamort.model import Model
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.run.rounds import Eager
from rlamort.run.track import read_records
from rlamort.score import score

SMALL = {"horizon": 6, "model": {"steps": 2, "update": {"samples": 16, "elites": 4}}, "device": "cpu"}


@pytest.fixture
def planner():
    env = open_env("Pendulum-v1", count=3)
    env.reset(0)
    return MPC(env.spec, horizon=5), env


def test_a_plan_begins_at_the_one_before_moved_on_by_one_action(planner):
    agent, env = planner
    asked = []

    class Told(Model):
        def iterates(self, x, oracle=None):
            asked.append(x[:, 3:])
            return torch.arange(5.0).expand(1, 3, -1) / 10

    agent.model = Told()
    player = Player(agent, 3)
    for _ in range(2):
        assert torch.equal(player(env.x, explore=True), torch.zeros(3, 1))
    assert torch.equal(asked[0], torch.zeros(3, 5))
    torch.testing.assert_close(asked[1], torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.4]]).expand(3, -1))
    player.begin(np.array([False, True, False]))
    player(env.x, explore=True)
    assert torch.equal(asked[2][1], torch.zeros(5))
    assert torch.equal(asked[2][[0, 2]], asked[1][[0, 2]])


def test_a_warm_start_is_worth_iterations(planner):
    """With one iteration a step, plans that go on from the one before are far better than those that begin at the middle."""
    env = open_env("Pendulum-v1", count=20)
    returns = {}
    for init in (parts.Previous(), parts.Middle()):
        agent = MPC(env.spec, model=parts.Unroll(init, parts.Cem(32, 4, 0.5), 1, keep_best=True), horizon=20)
        returns[init] = np.mean(score(agent, env).returns)
    assert returns[parts.Previous()] > -350
    assert returns[parts.Previous()] > returns[parts.Middle()] + 200


def test_a_plan_is_never_worse_than_the_one_before(planner):
    agent, env = planner
    before = 0.5 * torch.ones(3, 5)
    _, (moved,) = agent.play(env.x, (before,), True)
    plan = agent.model(torch.cat([env.x, before], -1), agent.f.oracle(env.x))
    assert (agent.f(plan, env.x) <= agent.f(before, env.x)).all()
    assert moved.shape == (3, 5)


@pytest.mark.parametrize("method", ["mpc", "pets"])
def test_a_planner_acts_after_an_update_for_which_no_batch_is_drawn(method):
    planner = learner_class(method)("Pendulum-v1", **SMALL)
    x = planner.source.env.x
    found = Eager(planner.agent, lambda: pytest.fail("a batch is drawn"))([True, False], x, planner.agent.start(1))
    assert found.metrics == {}
    assert found.y.shape == (1, 1)


def test_any_solver_may_plan(planner):
    _, env = planner
    agent = MPC(env.spec, model=parts.Unroll(parts.Previous(), parts.Gradient(0.1), 6, keep_best=True), horizon=16)
    assert np.mean(score(agent, env, episodes=3).returns) > -900  # untrained policies have -1,200


def test_the_row_balances_the_pendulum():
    """The row as it is: as good as SAC becomes, -147 to -152 from ten starts at 20,000 steps, without learning anything."""
    learner = ra.MPC("Pendulum-v1", seed=0, threads=1)
    returns = learner.score(20).returns
    assert np.mean(returns) > -220
    assert returns == learner.score(20).returns  # its draws are the evaluation's own


def test_from_the_command_line_it_plays_scores_and_records(tmp_path):
    done = rlamort(
        "train", "mpc", "env=Pendulum-v1", "steps=250", "eval_every=200", "eval_episodes=2", "log_every=100", "dir=run",
        "horizon=10", "planner=icem", "samples=32", "planner.elites=6", "model.steps=2", "video=false", cwd=tmp_path,
    )  # fmt: skip
    update = config_of(tmp_path / "run")["model"]["update"]
    assert (update["kind"], update["samples"], update["elites"]) == ("Icem", 32, 6)
    assert "evaluation return" in done.stdout
    records = read_records(tmp_path / "run")
    assert [r["env_step"] for r in records if "eval/return" in r] == [200, 250]
    assert any("train/return" in r for r in records)
    assert "mpc on Pendulum-v1" in rlamort("eval", "run", "--episodes", "2", cwd=tmp_path).stdout


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("at", [13, 90])
def test_stopped_and_resumed_is_uninterrupted(count, at, tmp_path):
    planner = {"kind": "icem" if count == 4 else "cem", "samples": 16, "elites": 4}  # icem has elites in its state
    small = {**SMALL, "model": {"steps": 2, "update": planner}}
    fields = {**small, "num_envs": count, "buffer_size": 2_000, "checkpoint_every": 35, "eval_every": 50, "eval_episodes": 2}
    fields |= {"max_episode_steps": 40}
    steps = 110 * count
    whole = ra.MPC("Pendulum-v1", dir=str(tmp_path / "whole"), **fields).learn(steps)
    broken = ra.MPC("Pendulum-v1", dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(steps, stop=lambda: broken.clock.env_step >= at * count)
    broken.close()
    torch.rand(3)
    again, exactness = resume(tmp_path / "broken")
    assert exactness == "exact"
    again.learn(steps - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


def test_a_saved_planner_finds_its_equations_again(tmp_path):
    planner = ra.MPC("Pendulum-v1", **SMALL)
    planner.save(tmp_path / "kept")
    again = ra.load(tmp_path / "kept")
    x = np.array([1.0, 0.0, 0.5], np.float32)
    for one in (planner, again):
        one.randomness = type(one.randomness)(3, one.device)
    assert np.array_equal(planner.predict(x, deterministic=True)[0], again.predict(x, deterministic=True)[0])


class Own(gymnasium.Env):
    """A point on a line that is pushed, of a user's own, with its equations."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(2, 4, 1).astype(np.float32), 0
        return self.x, {}

    def step(self, action):
        self.x, reward, _ = (part.numpy()[0] for part in self.dynamics(torch.tensor(self.x)[None], torch.tensor(action)[None]))
        self.t += 1
        return self.x.astype(np.float32), float(reward), False, self.t >= 10, {}

    def dynamics(self, x, u):
        x = x + u
        return x, -x.square().sum(-1), torch.ones(len(x))


def equations(x, u):
    return x + u, -(x + u).square().sum(-1), torch.ones(len(x))


def test_equations_of_a_users_own():
    for more in ({}, {"dynamics": {"kind": "Known", "step": "test_plan:equations"}}):
        returns = ra.MPC(Own, horizon=4, **more).score(5).returns
        assert min(returns) > -2.5  # two pushes of 3 at most reach 0 from 4, which costs 1 at most


@pytest.mark.parametrize(
    ("env", "fields", "message"),
    [
        (
            "HalfCheetah-v5",
            {},
            "dynamics=own: the equations of this environment are not known.*dynamics.step=module:func",
        ),
        (
            "HalfCheetah-v5",
            {"dynamics": {"kind": "Known", "step": "test_plan:equations"}},
            r"test_plan:equations: for x of shape",
        ),
        (
            "Pendulum-v1",
            {"dynamics": {"kind": "Known", "step": "test_plan:none"}},
            "there is no such function; module:function",
        ),
        ("Pendulum-v1", {"dynamics": "Known"}, "there is no such function; module:function is needed"),
        ("Pendulum-v1", {"model": "previous_one"}, "Did you mean previous"),
        ("Pendulum-v1", {"model": {"kind": "InChart", "inner": {"init": "previous"}}}, "only planners in Y itself have"),
        ("Pendulum-v1", {"compile": True}, "no choice there"),
        ("Pendulum-v1", {"horizon": 201}, "horizon=201: an episode has 200 steps at most"),
        ("rlamort.envs.cartpole:CartPole", {"horizon": 101}, "horizon=101: an episode has 100 steps at most"),
        ("rlamort.envs.lqr:Lqr", {"horizon": 8, "env_kwargs": {"length": 7}}, "horizon=8: an episode has 7 steps at most"),
        ("CartPole-v1", {}, r"its action space is Discrete\(2\); a Box of bounded floats is needed"),
        ("Pendulum-v1", {"model": {"update": {"elites": 64}}}, "update.elites: 64 given; .* fewer than the 64 samples"),
        ("Pendulum-v1", {"planner": "icam"}, "model.update=icam: there is none of that name.*Did you mean icem"),
        ("Pendulum-v1", {"dynamics": "simulator"}, "env=Pendulum-v1: its state cannot be set"),
        ("Pendulum-v1", {"max_episode_steps": 9, "horizon": 10}, "horizon=10: an episode has 9 steps at most"),
        ("Pendulum-v1", {"model": {"update": {"kind": "Icem", "keep": 11}}}, "update.keep: 11 given; .* the 10 elites"),
        ("Pendulum-v1", {"model": {"kind": "InChart", "inner": {"init": "middle", "update": "ilqr"}}}, "Ilqr: solutions"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(env, fields, message):
    with pytest.raises(UserError, match=message):
        ra.MPC(env, **fields)


@pytest.mark.parametrize("planner", ["cem", "mppi", "ilqr", "shooting"])
def test_a_planner_is_named_by_a_short_key(planner):
    learner = ra.MPC("rlamort.envs.cartpole:CartPole", planner=planner, num_envs=3, horizon=5, device="cpu", seed=0)
    assert learner.config.plain()["model"]["update"] == parts.Update.named(planner, "planner").tree()
    assert learner.config.plain()["model"]["steps"] == 5
    learner.learn(6)
    assert learner.clock.h[0].shape == (3, 5)


def test_agents_that_remember_no_plan_cannot_begin_there():
    with pytest.raises(UserError, match="only planners"):
        ra.SAC("Pendulum-v1", model={"kind": "Unroll", "init": "previous"})
