"""MuJoCo environments as functions of their physics: what they observe, their rewards, and where they end.

x observation (B, d) · qpos positions (..., nq) · qvel velocities (..., nv) · action (..., n) in the environment's units
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlamort.env.known import replaced
from rlamort.env.physics import model_arrays, write_model
from rlamort.errors import UserError

States = tuple[np.ndarray, np.ndarray]  # qpos, qvel


class Stepped(NamedTuple):
    """Steps of an environment, in its physics. All arrays have the same leading axes.

    `sensors` holds MuJoCo's `sensordata`, as the environment finds it after the step.
    """

    before: np.ndarray  # (..., nq) qpos before the step
    qpos: np.ndarray  # (..., nq) after it
    qvel: np.ndarray  # (..., nv)
    sensors_before: np.ndarray  # (..., m)
    sensors: np.ndarray  # (..., m)
    action: np.ndarray  # (..., n)


class Task:
    """A MuJoCo environment whose results are functions of its physics.

    Args:
        env: the environment without wrappers.

    Attributes:
        model: MuJoCo's model, with the sensors that rewards are read from.
        continued: whether rollouts may go on from what it observes, so that a policy can act in them.
        late: whether sensors are read at the end of a step. MuJoCo evaluates them at the beginning of each of its own steps,
            and so it leaves bodies' positions after an Euler step; after one by Runge and Kutta's method they are those of its
            last stage, which is near the end.
        close: how near rewards of a replayed step are to the environment's, relative to 1 + |reward|.
    """

    continued = True
    late = False
    close = 1e-3

    def __init__(self, env: Any) -> None:
        self.env, self.model = env, env.model

    def states(self, x: np.ndarray) -> States:
        """x (B, d) -> qpos (B, nq), qvel (B, nv); positions that are not observed, and do not matter, are 0."""
        hidden = self.env.observation_structure.get("skipped_qpos", 0)
        known, nv = self.model.nq - hidden, self.model.nv
        return np.pad(x[:, :known], ((0, 0), (hidden, 0))), x[:, known : known + nv]

    def observed(self, step: Stepped) -> np.ndarray:
        """What it observes after a step, (..., d)."""
        return np.concatenate([step.qpos[..., self.env.observation_structure.get("skipped_qpos", 0) :], step.qvel], -1)

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        """The reward (...) of a step, and whether it ends the task, (...) bool."""
        raise NotImplementedError


class Runner(Task):
    """HalfCheetah-v5 and Swimmer-v5: forward velocity minus squared controls."""

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        reward = _forward(self.env, step.before[..., 0], step.qpos[..., 0], step.action)
        return reward, np.zeros(reward.shape, dtype=bool)


class Walker(Task):
    """Hopper-v5 and Walker2d-v5: as `Runner`, with a reward inside their healthy ranges, and termination outside them."""

    def observed(self, step: Stepped) -> np.ndarray:
        return super().observed(step._replace(qvel=step.qvel.clip(-10, 10)))

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        env = self.env
        healthy = _inside(step.qpos[..., 1], env._healthy_z_range) & _inside(step.qpos[..., 2], env._healthy_angle_range)
        if hasattr(env, "_healthy_state_range"):  # Walker2d has none
            state = np.concatenate([step.qpos[..., 2:], step.qvel], -1)
            healthy &= _inside(state, env._healthy_state_range).all(-1)
        reward = _forward(env, step.before[..., 0], step.qpos[..., 0], step.action) + env._healthy_reward * healthy
        return reward, ~healthy & bool(env._terminate_when_unhealthy)


class Ant(Task):
    """Ant-v5: forward velocity and a reward inside the healthy range, minus squared controls and contact forces.

    Forces are those at the end of a step, which with Runge and Kutta's method differ from the environment's where a contact
    begins or ends just then; at its usual weight that is a hundredth of the reward at most.
    """

    continued = False
    late = True
    close = 0.1

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        bodies = list(range(1, env.model.nbody))
        root, main = int(env.model.body_rootid[1]), int(env.data.body(env._main_body).id)
        self.model = _with_sensors(env, [("xpos", main), ("com", root), *(("contact", body) for body in bodies)])

    def observed(self, step: Stepped) -> np.ndarray:
        x = super().observed(step)
        forces = self._forces(step).reshape(*x.shape[:-1], -1)
        return np.concatenate([x, forces], -1) if self.env._include_cfrc_ext_in_observation else x

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        env, z = self.env, step.qpos[..., 2]
        low, high = env._healthy_z_range
        finite = np.isfinite(step.qpos).all(-1) & np.isfinite(step.qvel).all(-1)
        healthy = finite & (low <= z) & (z <= high)
        contact = env._contact_cost_weight * np.square(self._forces(step)).sum((-2, -1))
        reward = _forward(env, step.sensors_before[..., 0], step.sensors[..., 0], step.action) + env._healthy_reward * healthy
        return reward - contact, ~healthy & bool(env._terminate_when_unhealthy)

    def _forces(self, step: Stepped) -> np.ndarray:
        """What MuJoCo calls cfrc_ext, of every body but the world, clipped as the environment does: (..., bodies, 6)."""
        com, contacts = step.sensors[..., None, 3:6], step.sensors[..., 6:].reshape(*step.sensors.shape[:-1], -1, 9)
        force, torque, at = np.split(contacts, 3, -1)  # of what it touches, on it, its sign reversed
        forces = -np.concatenate([torque + np.cross(at - com, force), force], -1)
        return forces.clip(*self.env._contact_force_range)


class InvertedPendulum(Task):
    """InvertedPendulum-v5: one for every step until the pole leans by more than 0.2."""

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        x = self.observed(step)
        fallen = ~np.isfinite(x).all(-1) | (np.abs(x[..., 1]) > 0.2)
        return 1.0 - fallen, fallen


class InvertedDoublePendulum(Task):
    """InvertedDoublePendulum-v5: the tip's distance from its highest point, and squared angular velocities.

    Velocities are observed up to 10; the force of its constraints, which no plan reads, is 0 in what it observes.
    """

    continued = False
    late = True

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.model = _with_sensors(env, [("site", 0)])

    def states(self, x: np.ndarray) -> States:
        return np.concatenate([x[:, :1], np.arctan2(x[:, 1:3], x[:, 3:5])], -1), x[:, 5:8]

    def observed(self, step: Stepped) -> np.ndarray:
        angles = step.qpos[..., 1:]
        force = np.zeros_like(angles[..., :1])
        return np.concatenate([step.qpos[..., :1], np.sin(angles), np.cos(angles), step.qvel.clip(-10, 10), force], -1)

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        x, y, fast = step.sensors[..., 0], step.sensors[..., 2], step.qvel[..., 1:3]
        fallen = ~(y > 1)
        cost = 0.01 * x**2 + (y - 2) ** 2 + 1e-3 * fast[..., 0] ** 2 + 5e-3 * fast[..., 1] ** 2
        return self.env._healthy_reward * ~fallen - cost, fallen


class Reacher(Task):
    """Reacher-v5: minus the fingertip's distance to the target, and squared controls. The target stands still."""

    continued = False
    late = True

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.model = _with_sensors(env, [("xpos", env.data.body(name).id) for name in ("fingertip", "target")])

    def states(self, x: np.ndarray) -> States:
        angles = np.arctan2(x[:, 2:4], x[:, :2])
        return np.concatenate([angles, x[:, 4:6]], -1), np.pad(x[:, 6:8], ((0, 0), (0, 2)))

    def observed(self, step: Stepped) -> np.ndarray:
        angles, apart = step.qpos[..., :2], self._apart(step)[..., :2]
        return np.concatenate([np.cos(angles), np.sin(angles), step.qpos[..., 2:], step.qvel[..., :2], apart], -1)

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        env, distance = self.env, np.linalg.norm(self._apart(step), axis=-1)
        cost: np.ndarray = distance * env._reward_dist_weight + np.square(step.action).sum(-1) * env._reward_control_weight
        return -cost, np.zeros(cost.shape, dtype=bool)

    @staticmethod
    def _apart(step: Stepped) -> np.ndarray:
        tip, target = np.split(step.sensors, 2, -1)
        apart: np.ndarray = tip - target
        return apart


class Pusher(Task):
    """Pusher-v5: distances from the tip to the object and from there to the goal, and squared controls.

    The object's velocity is not observed: at the beginning of a plan it stands still.
    """

    continued = False
    late = True

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        names = ("tips_arm", "object", "goal")
        self.bodies = [env.data.body(name).id for name in names]
        self.model = _with_sensors(env, [("xpos", body) for body in self.bodies])

    def states(self, x: np.ndarray) -> States:
        model, slides = self.model, []
        for body, at in zip(self.bodies[1:], (x[:, 17:20], x[:, 20:23]), strict=True):
            first = int(model.body_jntadr[body])
            axes = model.jnt_axis[first : first + 2]  # of two slides
            slides.append((at - model.body_pos[body]) @ axes.T)
        return np.concatenate([x[:, :7], *slides], -1), np.pad(x[:, 7:14], ((0, 0), (0, 4)))

    def observed(self, step: Stepped) -> np.ndarray:
        return np.concatenate([step.qpos[..., :7], step.qvel[..., :7], step.sensors], -1)

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        tip, thing, goal = np.split(step.sensors, 3, -1)
        env, near, far = self.env, np.linalg.norm(thing - tip, axis=-1), np.linalg.norm(thing - goal, axis=-1)
        cost = near * env._reward_near_weight + far * env._reward_dist_weight
        cost = cost + np.square(step.action).sum(-1) * env._reward_control_weight
        return -cost, np.zeros(cost.shape, dtype=bool)


class Own(Task):
    """A user's environment with a method `rewards(step)`, as of `Task`.

    Where it observes other numbers than its positions and velocities, a method `states(x)`, as of `Task`, tells these.
    """

    continued = False

    def states(self, x: np.ndarray) -> States:
        if _tells_states(self.env):
            qpos, qvel = self.env.states(x)
            return qpos, qvel
        return x[:, : self.model.nq], x[:, self.model.nq :]

    def observed(self, step: Stepped) -> np.ndarray:
        x = np.concatenate([step.qpos, step.qvel], -1)
        if not _tells_states(self.env):
            return x
        return np.full((*x.shape[:-1], self.env.observation_space.shape[0]), np.nan)  # how it observes them is not known

    def rewards(self, step: Stepped) -> tuple[np.ndarray, np.ndarray]:
        reward, terminated = self.env.rewards(step)
        return np.asarray(reward, dtype=np.float64), np.asarray(terminated, dtype=bool)


# by the module of Gymnasium's that has the class
TASKS: dict[str, type[Task]] = {
    "half_cheetah_v5": Runner, "swimmer_v5": Runner, "hopper_v5": Walker, "walker2d_v5": Walker, "ant_v5": Ant,
    "inverted_pendulum_v5": InvertedPendulum, "inverted_double_pendulum_v5": InvertedDoublePendulum, "reacher_v5": Reacher,
    "pusher_v5": Pusher,
}  # fmt: skip
KNOWN = (
    "HalfCheetah-v5, Swimmer-v5, Hopper-v5, Walker2d-v5, Ant-v5, InvertedPendulum-v5, InvertedDoublePendulum-v5, Reacher-v5 "
    "and Pusher-v5"
)
LEARNED = "its dynamics can be learned, as by `rlamort train pets`"


def task_of(env: Any, name: str) -> Task:
    """The task of an environment without wrappers; `name` is for messages.

    Raises:
        UserError: its state cannot be set, its rewards as a function of its physics are not known, or what it observes does
            not tell its state.
    """
    import mujoco

    if not (isinstance(getattr(env, "model", None), mujoco.MjModel) and hasattr(env, "frame_skip")):
        raise UserError(
            f"env={name}: its state cannot be set, as rollouts by MuJoCo need: it is none of Gymnasium's MuJoCo environments; "
            f"{LEARNED}"
        )
    home, _, module = type(env).__module__.rpartition(".")
    changed = replaced(env)
    if home == "gymnasium.envs.mujoco" and module in TASKS and not changed:
        return TASKS[module](env)
    if not callable(getattr(env, "rewards", None)):
        why = f"this instance has another {changed[0]} than its class, and " if changed else ""
        raise UserError(
            f"env={name}: {why}its rewards as a function of its physics are not known, as those of {KNOWN} are; give it a "
            f"method rewards(step) -> (reward, terminated) in NumPy, as docs/planning.md shows, or {LEARNED}"
        )
    numbers, (nq, nv, na) = int(np.prod(env.observation_space.shape or ())), (env.model.nq, env.model.nv, env.model.na)
    if na or (not _tells_states(env) and numbers != nq + nv):
        raise UserError(
            f"env={name}: a plan by simulation begins at the state of the physics, {nq} positions, {nv} velocities and {na} "
            f"activations, which its observation of {numbers} numbers does not tell; without activations a method states(x) -> "
            f"(qpos, qvel) may, as docs/planning.md shows; or {LEARNED}"
        )
    return Own(env)


def _tells_states(env: Any) -> bool:
    """Whether a user's environment has a method `states`, and not something else of that name."""
    return callable(getattr(env, "states", None))


def _forward(env: Any, before: np.ndarray, after: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The reward of forward velocity minus that of controls, from positions before and after a step."""
    cost: np.ndarray = env._ctrl_cost_weight * np.square(action).sum(-1)
    reward: np.ndarray = env._forward_reward_weight * ((after - before) / env.dt) - cost
    return reward


def _inside(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Whether values are in an open interval; NaN is in none."""
    return (limits[0] < values) & (values < limits[1])


def _with_sensors(env: Any, wanted: Sequence[tuple[str, int]]) -> Any:
    """The environment's model with sensors: positions of bodies and sites, centres of mass of trees, contacts of bodies.

    Raises:
        UserError: this version of MuJoCo has no such sensor.
    """
    import mujoco

    sensor, obj = mujoco.mjtSensor, mujoco.mjtObj
    if not hasattr(sensor, "mjSENS_CONTACT"):
        raise UserError(f"dynamics=simulator: MuJoCo {mujoco.__version__} is installed; this environment needs 3.3.5 or later")
    force, torque, position = (
        1 << int(getattr(mujoco.mjtConDataField, f"mjCONDATA_{name}")) for name in ("FORCE", "TORQUE", "POS")
    )
    kinds = {
        "xpos": (sensor.mjSENS_FRAMEPOS, obj.mjOBJ_XBODY, []),
        "site": (sensor.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, []),
        "com": (sensor.mjSENS_SUBTREECOM, obj.mjOBJ_BODY, []),
        "contact": (sensor.mjSENS_CONTACT, obj.mjOBJ_BODY, [force | torque | position, 3, 1]),  # 3: the net force
    }
    spec = mujoco.MjSpec.from_file(env.fullpath)
    for number, (kind, index) in enumerate(wanted):
        element = (spec.sites if kind == "site" else spec.bodies)[index]
        element.name = element.name or f"rlamort {kind} {index}"
        which, what, data = kinds[kind]
        extra = {"intprm": data} if data else {}
        spec.add_sensor(name=f"rlamort sensor {number}", type=which, objtype=what, objname=element.name, **extra)
    model = spec.compile()
    own = {key: one for key, one in model_arrays(env.model) if not key.startswith(("sensor", "name"))}
    try:
        write_model(model, dict(model_arrays(model)) | own)
    except ValueError as error:
        raise UserError(f"dynamics=simulator: {error} in {env.fullpath}, which sensors would be added to; {LEARNED}") from error
    for name in dir(model.opt):
        if not name.startswith("_") and isinstance(getattr(model.opt, name), int):
            setattr(model.opt, name, getattr(env.model.opt, name))
    return model
