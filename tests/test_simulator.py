"""MuJoCo itself as dynamics: plans are scored as the environment would score them, bit for bit."""

import copy

import gymnasium
import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort import parts
from rlamort.agents.plan import MPC
from rlamort.dynamics import Trajectory
from rlamort.env.make import open_env
from rlamort.env.simulate import Simulator
from rlamort.errors import UserError
from rlamort.objective import Oracle

CHEETAH = {"id": "HalfCheetah-v5", "exclude_current_positions_from_observation": False}
PENDULUM = {"id": "InvertedPendulum-v5"}


def problem(named, horizon, count=6, scale=1.0):
    """A simulator, contexts met in play, as planners see them, and plans."""
    env, drawn = gymnasium.make(**named), np.random.default_rng(0)
    contexts = []
    for seed in range(count):
        x, _ = env.reset(seed=seed)
        for _ in range(5 * seed):
            x, *_ = env.step(0.3 * env.action_space.high * drawn.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        contexts.append(x.astype(np.float32))
    y = scale * drawn.uniform(-1, 1, (count, horizon * env.action_space.shape[0])).astype(np.float32)
    return Simulator(env), torch.tensor(np.stack(contexts)), torch.tensor(y)


def stepped(named, x, plan, discount):
    """Minus the return of a plan, stepped in an environment of its own that is put into the state, and what it saw last."""
    env = gymnasium.make(**named)
    env.reset(seed=0)
    nq, n = env.unwrapped.model.nq, env.action_space.shape[0]
    env.unwrapped.set_state(x[:nq].double().numpy(), x[nq:].double().numpy())
    env.unwrapped.data.qacc_warmstart[:] = 0
    value, weight, seen = torch.zeros(()), 1.0, []
    for action in plan.view(-1, n).numpy():
        observed, reward, terminated, _, _ = env.step(env.action_space.high * action)
        value, seen = value + weight * torch.tensor(reward, dtype=torch.float32), [*seen, observed]
        if terminated:
            break
        weight = weight * torch.tensor(discount)
    return -value, seen


@pytest.mark.parametrize(("named", "horizon"), [(CHEETAH, 1), (CHEETAH, 40), (PENDULUM, 30)])
def test_a_trajectory_is_stepping_mujoco_bit_for_bit(named, horizon):
    simulator, x, y = problem(named, horizon)
    value = Trajectory(simulator, horizon, 0.97)(y, x)
    expected = torch.stack([stepped(named, one, plan, 0.97)[0] for one, plan in zip(x, y, strict=True)])
    assert torch.equal(value, expected)
    assert len(set(value.tolist())) > 1 or horizon == 1


@pytest.mark.parametrize("named", [CHEETAH, PENDULUM])
def test_so_are_its_states(named):
    simulator, x, y = problem(named, 25, scale=0.2)
    path = simulator.follow(x, y.view(len(y), 25, -1).unbind(1))
    for item, (one, plan) in enumerate(zip(x, y, strict=True)):
        _, seen = stepped(named, one, plan, 1.0)
        for t, observed in enumerate(seen):
            assert np.array_equal(path[t].x_next[item].numpy(), observed.astype(np.float32))


def test_no_item_depends_on_another_and_copies_give_the_same():
    simulator, x, y = problem(CHEETAH, 12)
    f = Trajectory(simulator, 12)
    assert torch.equal(f(y, x)[2:3], f(y[2:3], x[2:3]))
    values = Oracle(f, x).values(torch.stack([y, -y, y]))
    assert torch.equal(values[0], values[2])
    assert torch.equal(Trajectory(copy.deepcopy(simulator), 12)(y, x), values[0])


def test_what_follows_an_end_does_not_count():
    simulator, x, _ = problem(PENDULUM, 1)
    push = torch.ones(len(x), 60)
    value = Trajectory(simulator, 60)(push, x)
    assert (value > -40).all()  # one for each step until it has fallen
    assert torch.equal(value, torch.stack([stepped(PENDULUM, one, plan, 1.0)[0] for one, plan in zip(x, push, strict=True)]))


def test_it_has_values_alone():
    simulator, x, y = problem(PENDULUM, 4)
    with pytest.raises(UserError, match="dynamics=simulator: MuJoCo gives values without gradients"):
        Oracle(Trajectory(simulator, 4), x).grad(y)
    with pytest.raises(UserError, match=r"a model that queries values alone is needed, as with model.update=Cem"):
        ra.MPC("InvertedPendulum-v5", dynamics="simulator", model={"update": {"kind": "Gradient"}})


def wrapped():
    return gymnasium.wrappers.TransformReward(gymnasium.make("InvertedPendulum-v5"), lambda reward: 2 * reward)


@pytest.mark.parametrize(
    ("env", "fields", "message"),
    [
        ("HalfCheetah-v5", {}, "env=HalfCheetah-v5: .* 9 positions and 9 velocities, which its observation of 17 numbers does"),
        ("Hopper-v5", {"env_kwargs": {"exclude_current_positions_from_observation": False}}, "env=Hopper-v5: .*determine"),
        ("Walker2d-v5", {}, "env=Walker2d-v5: mujoco.rollout is known to give the rewards of HalfCheetah-v5"),
        ("Pendulum-v1", {}, "env=Pendulum-v1: mujoco.rollout is known"),
        (wrapped, {}, "wrapped: a wrapper may change what it observes"),
    ],
)
def test_what_does_not_determine_the_physics_is_an_error_before_anything_starts(env, fields, message):
    with pytest.raises(UserError, match=message):
        ra.MPC(env, dynamics="simulator", **fields)


def test_an_observation_with_every_position_does():
    keywords = {"exclude_current_positions_from_observation": False}
    cheap = parts.Unroll(parts.Previous(), parts.Cem(8, 2, 0.5), 1, keep_best=True)
    agent = MPC(open_env("HalfCheetah-v5", env_kwargs=keywords).spec, dynamics=parts.Simulator(), model=cheap, horizon=3)
    assert agent.act(torch.zeros(2, 18), explore=True).shape == (2, 6)


def test_the_row_balances_the_pole():
    """Of 30 steps none is lost, from where it falls within half of them if nobody acts."""
    env = gymnasium.make("InvertedPendulum-v5", reset_noise_scale=0.08)
    planner = ra.MPC("InvertedPendulum-v5", dynamics="simulator", seed=0, threads=1, device="cpu")
    for plays, least, most in ((True, 30, 30), (False, 0, 15)):
        (x, _), h, alive = env.reset(seed=3), None, 0
        for _ in range(30):
            u, h = planner.predict(x.astype(np.float32), h, deterministic=True)
            x, _, fallen, _, _ = env.step(u if plays else 0 * u)
            if fallen:
                break
            alive += 1
        assert least <= alive <= most
