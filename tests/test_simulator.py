"""MuJoCo itself as dynamics: plans are scored as the environment would score them, bit for bit."""

import copy
import types

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.inverted_double_pendulum_v5 import InvertedDoublePendulumEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv
from rlamort.agents.plan import MPC

import rlamort as ra
from rlamort import parts
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
    return Simulator(lambda: gymnasium.make(**named)), torch.tensor(np.stack(contexts)), torch.tensor(y)


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


CHANGED = {
    "HalfCheetah-v5": {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.5, "frame_skip": 3},
    "Hopper-v5": {"healthy_angle_range": (-0.03, 0.03), "healthy_state_range": (-2.0, 2.0), "healthy_reward": 3.0},
    "Walker2d-v5": {
        "healthy_z_range": (1.2, 1.3), "terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False,
    },
    "Ant-v5": {
        "main_body": "aux_1", "contact_cost_weight": 1e-3, "contact_force_range": (-0.5, 2.0), "healthy_z_range": (0.3, 0.8),
    },
    "Swimmer-v5": {"ctrl_cost_weight": 1.0, "exclude_current_positions_from_observation": False},
    "InvertedPendulum-v5": {"frame_skip": 3},
    "InvertedDoublePendulum-v5": {"healthy_reward": 2.0},
    "Reacher-v5": {"reward_dist_weight": 2.0, "reward_control_weight": 0.1},
    "Pusher-v5": {"reward_near_weight": 2.0, "reward_dist_weight": 0.5, "reward_control_weight": 1.0},
}  # fmt: skip
# third-order terms of the integrator in positions of bodies, and contacts one of MuJoCo's steps later
ROUGH = {"Ant-v5": 0.1, "InvertedDoublePendulum-v5": 1e-3, "Reacher-v5": 1e-4}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", CHANGED)
def test_each_of_gymnasiums_tasks_is_stepped_as_the_environment_steps_it(name, changed):
    named = {"id": name, **(CHANGED[name] if changed else {})}
    env, simulator, drawn = gymnasium.make(**named), Simulator(lambda: gymnasium.make(**named)), np.random.default_rng(0)
    x, _ = env.reset(seed=3)
    y = drawn.uniform(-0.6, 0.6, (25, 1, env.action_space.shape[0])).astype(np.float32)
    path, ends = simulator.follow(torch.tensor(x)[None].double(), torch.tensor(y).unbind()), []
    for moved, action in zip(path, simulator.physics.units.decode(y[:, 0]), strict=True):
        x, reward, terminated, _, _ = env.step(action)
        assert moved.reward.item() == pytest.approx(reward, abs=ROUGH.get(name, 1e-9))
        assert (moved.continues.item() == 0) == terminated
        ends.append(terminated)
        np.testing.assert_allclose(moved.x_next[0, :27], x[:27], atol=ROUGH.get(name, 1e-9))  # Ant's forces come after these
        if terminated:
            break
    assert any(ends) == ("Pendulum" in name or (changed and name in ("Ant-v5", "Hopper-v5")))


def euler():
    env = gymnasium.make("Ant-v5", contact_cost_weight=0.1, contact_force_range=(-0.5, 2.0), main_body="aux_1")
    env.unwrapped.model.opt.integrator = 0
    env.unwrapped.model.body_mass[1:] *= 1.5
    return env


def test_forces_of_contacts_are_exact_where_they_are_of_the_same_moment():
    """As positions of bodies are, and a changed model stays changed where sensors are added to it."""
    env, simulator = euler(), Simulator(euler)
    x, _ = env.reset(seed=3)
    y, forces = np.random.default_rng(0).uniform(-0.6, 0.6, (25, 1, 8)).astype(np.float32), 0
    path = simulator.follow(torch.tensor(x)[None].double(), torch.tensor(y).unbind())
    for moved, action in zip(path, y[:, 0], strict=True):
        x, reward, *_, info = env.step(action)
        forces += info["reward_contact"] < -0.1
        assert moved.reward.item() == pytest.approx(reward, abs=1e-6)
        np.testing.assert_allclose(moved.x_next[0], x, atol=1e-6)
    assert forces > 2


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


class Cart(MujocoEnv):
    """A user's cart with a pole, which pays for height; what it is pushed by may grow, unseen, from step to step."""

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 25}  # noqa: RUF012

    def __init__(self, growing=0.0, paid=0.0, **keywords):
        self.growing, self.paid, self.steps = growing, paid, 0
        super().__init__("inverted_pendulum.xml", 2, Box(-np.inf, np.inf, (4,)), **keywords)

    def reset_model(self):
        self.steps = 0
        self.set_state(self.np_random.uniform(-0.1, 0.1, 2), self.np_random.uniform(-0.1, 0.1, 2))
        return self.state_vector()

    def step(self, action):
        self.steps += 1
        self.do_simulation(action * (1 + self.growing * self.steps), self.frame_skip)
        angle = self.data.qpos[1]
        return self.state_vector(), np.cos(angle) + self.paid * self.steps, bool(abs(angle) > 1), False, {}


class Rewarding(Cart):
    def rewards(self, step):
        angle = step.qpos[..., 1]
        return np.cos(angle), np.abs(angle) > 1


class Angles(Rewarding):
    """It observes sine and cosine."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(-np.inf, np.inf, (5,))

    def state_vector(self):
        (place, angle), speeds = self.data.qpos, self.data.qvel
        return np.array([place, np.sin(angle), np.cos(angle), *speeds])

    def states(self, x):
        return np.stack([x[:, 0], np.arctan2(x[:, 1], x[:, 2])], -1), x[:, 3:]


@pytest.mark.parametrize("kind", [Rewarding, Angles])
def test_a_users_own_task_gives_its_rewards(kind):
    agent, env = MPC(open_env(kind).spec, dynamics=parts.Simulator(), model=CHEAP, horizon=8), kind()
    x, _ = env.reset(seed=2)
    y, value = torch.linspace(-1, 1, 8)[None], 0.0
    for t, action in enumerate(y[0].numpy()):
        _, reward, terminated, *_ = env.step(3 * np.array([action]))
        value += 0.99**t * reward
        if terminated:
            break
    assert terminated
    assert -agent.f(y, torch.tensor(x)[None].float()).item() == pytest.approx(value, abs=1e-5)


class Moving(Cart):
    """It pays for the cart's speed, by positions that it does not observe."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(-np.inf, np.inf, (3,))

    def state_vector(self):
        return np.array([self.data.qpos[1], *self.data.qvel])

    def states(self, x):
        return np.pad(x[:, :1], ((0, 0), (1, 0))), x[:, 1:]

    def step(self, action):
        before = self.data.qpos[0]
        x, _, _, _, info = super().step(action)
        return x, self.data.qpos[0] - before, False, False, info

    def rewards(self, step):
        return step.qpos[..., 0] - step.before[..., 0], np.zeros(step.qpos.shape[:-1], bool)


def test_rewards_by_what_is_observed_are_those_that_are_met():
    simulator = open_env(Moving).spec.simulator()  # plans are right: they begin at any place
    message = (
        "dynamics.rewards=own: by what it observes, step 1 of an episode has 0, where it gives .*rewards=learned is needed"
    )
    with pytest.raises(UserError, match=message):
        simulator.rewards()
    assert callable(simulator.ends())
    assert callable(open_env(Rewarding).spec.simulator().rewards())


class Noting(Rewarding):
    def __init__(self):
        self.states = []  # of its own use
        super().__init__()


def test_something_else_called_states_is_no_method():
    assert open_env(Noting).spec.simulator()


def capped():
    """HalfCheetah whose rewards are cut where the first steps do not come."""
    env = gymnasium.make("HalfCheetah-v5")
    usual = HalfCheetahEnv._get_rew
    env.unwrapped._get_rew = types.MethodType(lambda self, *args: (min(usual(self, *args)[0], 0.3), {}), env.unwrapped)
    return env


@pytest.mark.parametrize("env", [capped, capped()])
def test_a_known_task_whose_instance_has_another_function_is_refused(env):
    with pytest.raises(UserError, match=r"this instance has another _get_rew than its class, and its rewards .* are not known"):
        open_env(env).spec.simulator()


@pytest.mark.parametrize("kind", [ReacherEnv, InvertedDoublePendulumEnv])
def test_small_differences_of_rewards_are_found_where_there_should_be_none(kind, monkeypatch):
    usual = kind._get_rew
    monkeypatch.setattr(kind, "_get_rew", lambda self, *args: (0.95 * usual(self, *args)[0], {}))
    with pytest.raises(UserError, match="step 1 of an episode has the reward"):
        open_env(kind).spec.simulator()


def runge_kutta():
    env = gymnasium.make("Pusher-v5")
    env.unwrapped.model.opt.integrator = 1
    return env


def test_positions_of_bodies_are_those_at_the_end_of_a_step_by_any_integrator():
    env, simulator = runge_kutta(), Simulator(runge_kutta)
    x, _ = env.reset(seed=3)
    y = np.random.default_rng(0).uniform(-1, 1, (25, 1, 7)).astype(np.float32)
    for moved, action in zip(simulator.follow(torch.tensor(x)[None], torch.tensor(y).unbind()), y[:, 0], strict=True):
        _, reward, *_ = env.step(simulator.physics.units.decode(action[None])[0])
        assert moved.reward.item() == pytest.approx(reward, abs=1e-4)  # 2e-3 by those of the beginning


def rebuilt():
    """Ant with another model than that of its file."""
    env = gymnasium.make("Ant-v5")
    spec = mujoco.MjSpec.from_file(env.unwrapped.fullpath)
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[1, 1, 0.1], pos=[9, 0, 0])
    env.unwrapped.model = spec.compile()
    env.unwrapped.data = mujoco.MjData(env.unwrapped.model)
    return env


def test_side_by_side_all_have_to_be_alike():
    def weighing(weight):
        return lambda: gymnasium.make("HalfCheetah-v5", ctrl_cost_weight=weight)

    assert open_env(SyncVectorEnv([weighing(0.1), weighing(0.1)])).spec.simulator()
    with pytest.raises(UserError, match="its environments give the same actions other results"):
        open_env(SyncVectorEnv([weighing(0.1), weighing(0.5)])).spec.simulator()


def wrapped():
    return gymnasium.wrappers.TransformReward(gymnasium.make("InvertedPendulum-v5"), lambda reward: 2 * reward)


def unseen():
    env = Rewarding()
    env.observation_space = Box(-np.inf, np.inf, (2,))
    env.state_vector = lambda: env.data.qpos.copy()
    return env


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("Pendulum-v1", "env=Pendulum-v1: its state cannot be set, .*its dynamics can be learned, as by `rlamort train pets`"),
        ("Humanoid-v5", "env=Humanoid-v5: its rewards as a function of its physics are not known, as those of HalfCheetah-v5"),
        (Cart, r"Cart: its rewards .* give it a method rewards\(step\) -> \(reward, terminated\) in NumPy"),
        (
            unseen,
            r"2 positions, 2 velocities and 0 activations, which its observation of 2 numbers does not tell; .*states\(x\)",
        ),
        (
            lambda: Rewarding(paid=0.5),
            "step 1 of an episode has the reward 1.49.*, and replayed .* 0.99.*: it is no",
        ),
        (lambda: Rewarding(growing=0.3), "step 1 of an episode has the velocity 1 .*, and replayed .* function of the state"),
        (rebuilt, r"its MuJoCo model has .* in .*ant.xml, which sensors would be added to"),
        (wrapped, "wrapped: a wrapper may change what it observes"),
    ],
)
def test_what_cannot_be_simulated_is_an_error_before_anything_starts(env, message):
    with pytest.raises(UserError, match=message):
        open_env(env).spec.simulator()


CHEAP = parts.Unroll(parts.Previous(), parts.Cem(8, 2, 0.5), 1, keep_best=True)


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
