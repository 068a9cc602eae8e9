"""Dynamics against the environments that they are of, and plans through them as solutions of an objective."""

import types

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from rlamort.envs.cartpole import CartPole

from rlamort.domain import Box
from rlamort.dynamics import Dynamics, Known, Moved, Trajectory
from rlamort.env.known import equations_of
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.objective import Oracle


def pendulum(dtype=torch.float32, **constants):
    """The dynamics of Pendulum-v1, and the environment."""
    env = gymnasium.make("Pendulum-v1", **constants)
    return Known(equations_of(env), Box([-2.0], [2.0]), "pendulum").to(dtype), env


@pytest.mark.parametrize("constants", [{}, {"g": 3.7}])
def test_the_pendulum_moves_and_is_rewarded_as_gymnasiums(constants):
    known, env = pendulum(**constants)
    made = np.random.default_rng(0)
    for seed in range(20):
        x, _ = env.reset(seed=seed)
        for _ in range(50):
            y = made.uniform(-1, 1, 1).astype(np.float32)
            x_next, reward, continues = known(torch.tensor(x)[None], torch.tensor(y)[None])
            x, expected, terminated, _, _ = env.step(2 * y)
            assert np.allclose(x_next[0].numpy(), x, atol=1e-5)
            assert reward.item() == pytest.approx(expected, abs=1e-5)
            assert (continues.item() == 0) == terminated


@pytest.mark.parametrize("horizon", [1, 7, 30])
def test_a_trajectory_is_stepping_the_environment(horizon):
    known, env = pendulum()
    f, made = Trajectory(known, horizon, 0.9), torch.Generator().manual_seed(0)
    y = 2 * torch.rand(8, horizon, generator=made) - 1
    starts, returns = [], []
    for seed, plan in enumerate(y):
        x, _ = env.reset(seed=seed)
        starts.append(torch.tensor(x))
        returns.append(sum(0.9**t * env.step(2 * u[None].numpy())[1] for t, u in enumerate(plan)))
    torch.testing.assert_close(f(y, torch.stack(starts)), -torch.tensor(returns).float(), rtol=1e-5, atol=1e-4)


def test_its_gradient_is_a_finite_difference():
    known, _ = pendulum(torch.float64)
    f, made = Trajectory(known, 12, 0.99, tail=lambda x: x[:, 0] - x[:, 2].square()), torch.Generator().manual_seed(1)
    y = (torch.rand(4, 12, generator=made, dtype=torch.float64) - 0.5) / 2
    theta = torch.rand(4, generator=made, dtype=torch.float64)
    x = torch.stack([theta.cos(), theta.sin(), 0.1 * theta], -1)
    gradient = Oracle(f, x).grad(y)
    for t in range(12):
        step = torch.zeros_like(y)
        step[:, t] = 1e-6
        torch.testing.assert_close(gradient[:, t], (f(y + step, x) - f(y - step, x)) / 2e-6, rtol=1e-5, atol=1e-7)


class Ending(Dynamics):
    """x counts down, and the task ends at 0; what follows is NaN. Each step pays y."""

    def forward(self, x, y):
        x_next = torch.where(x > 0, x - 1, torch.nan)
        return Moved(x_next, torch.where(x[:, 0] > 0, y.sum(-1), torch.nan), (x_next[:, 0] != 0).to(x))


def test_nothing_counts_after_an_end():
    x, y = torch.tensor([[1.0], [2.0], [9.0]]), torch.ones(3, 4)
    assert Trajectory(Ending(), 4)(y, x).tolist() == [-1, -2, -4]
    assert Trajectory(Ending(), 4, 0.5, tail=lambda x: x[:, 0])(y, x).tolist() == [-1, -1.5, -1.875 - 5 / 16]


def test_plans_of_several_actions_are_flat_and_no_item_depends_on_another():
    class Sum(Dynamics):
        def forward(self, x, y):
            return Moved(x + y, (x * y).sum(-1), torch.ones(len(x)))

    f = Trajectory(Sum(), 3)
    x, y = torch.randn(5, 2), torch.randn(5, 6)
    expected = sum((x + y[:, : 2 * t].reshape(5, -1, 2).sum(1)) * y[:, 2 * t : 2 * t + 2] for t in range(3)).sum(-1)
    torch.testing.assert_close(f(y, x), -expected)
    assert torch.equal(f(y, x)[2:3], f(y[2:3], x[2:3]))


class Paying(gymnasium.wrappers.TimeLimit):
    """A user's time limit that pays for every step."""

    def __init__(self, env):
        super().__init__(env, 50)

    def step(self, action):
        x, reward, *rest = super().step(action)
        return x, reward + 5, *rest


@pytest.mark.parametrize(
    "around",
    [
        Paying,
        lambda env: gymnasium.wrappers.NormalizeObservation(env),
        lambda env: gymnasium.wrappers.TransformReward(env, lambda r: 0.1 * r),
        lambda env: gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)),
    ],
)
def test_equations_are_not_those_of_what_a_wrapper_changes(around):
    assert open_env("Pendulum-v1").spec.equations is not None
    assert open_env(lambda: around(gymnasium.make("Pendulum-v1"))).spec.equations is None
    assert open_env(around(gymnasium.make("Pendulum-v1"))).spec.equations is None
    assert open_env("InvertedPendulum-v5").spec.equations is None


class Doubling(CartPole):
    """A user's reward in `step`, which its equations do not know of."""

    def step(self, action):
        x, reward, *rest = super().step(action)
        return x, 2 * reward, *rest


class Described(CartPole):
    """It says that its equations are the same."""

    dynamics = CartPole.dynamics

    def step(self, action):
        *found, _ = super().step(action)
        return *found, {"power": 1.0}


class Equal:
    def dynamics(self, x, u):
        return x, x[:, 0], torch.ones(len(x))


class Still(Equal, gymnasium.Env):
    """Its equations come from a base that has no step."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, **keywords):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


def stepping():
    env = gymnasium.make("Pendulum-v1")
    env.unwrapped.step = types.MethodType(lambda self, u: (type(self).step(self, u)[0], 1.0, False, False, {}), env.unwrapped)
    return env


def beginning():
    env = gymnasium.make("Pendulum-v1")
    env.unwrapped.render = lambda: None
    return env


@pytest.mark.parametrize(
    ("env", "known"), [(Doubling, False), (Described, True), (Still, True), (stepping, False), (beginning, True)]
)
def test_nor_of_what_another_step_changes(env, known):
    for one in (env, env()):
        assert (open_env(one).spec.equations is not None) == known


def test_equations_are_those_of_all_environments_side_by_side():
    class Doubled(SyncVectorEnv):
        def step(self, actions):
            x, reward, *rest = super().step(actions)
            return x, 2 * reward, *rest

    def pendulum(g):
        return lambda: gymnasium.make("Pendulum-v1", g=g)

    assert open_env(SyncVectorEnv([pendulum(3.0), pendulum(3.0)])).spec.equations is not None
    assert open_env(SyncVectorEnv([pendulum(3.0), pendulum(9.0)])).spec.equations is None
    assert open_env(Doubled([pendulum(3.0)])).spec.equations is None


def test_equations_have_the_constants_of_the_moment():
    env = gymnasium.make("Pendulum-v1")
    step = open_env(env).spec.equations
    env.unwrapped.g, env.unwrapped.m, env.unwrapped.dt = 4.0, 2.0, 0.1
    x, _ = env.reset(seed=0)
    after, reward, *_ = env.step(np.float32([0.5]))
    ours = step(torch.tensor(x)[None], torch.tensor([[0.5]]))
    np.testing.assert_allclose(ours[0][0], after, atol=1e-6)
    assert ours[1].item() == pytest.approx(reward, abs=1e-5)


def test_a_step_of_other_shapes_is_said():
    for step in (lambda x, u: (x[:, :2], x[:, 0], x[:, 0]), lambda x, u: x[:, 9], lambda x, u: (x, u, x[:, 0])):
        with pytest.raises(UserError, match=r"dynamics=mine: for x of shape \(2, 3\) and u of shape \(2, 1\) it gives"):
            Known(step, Box([-1.0], [1.0]), "mine").require(3)
