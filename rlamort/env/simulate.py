"""Simulators put into a state: action values by rollouts that continue with a policy, and MuJoCo as dynamics of plans.

x state (B, d) · y action (B, n) in [-1, 1]^n · S saved states · H horizon · gamma discount
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlamort.dynamics import Dynamics, Moved
from rlamort.env import Policy, Space, Units
from rlamort.env.copies import equal
from rlamort.env.gym import GymEnv
from rlamort.env.known import transparent
from rlamort.errors import UserError


class Saved(NamedTuple):
    """Saved states of an environment, which it can be restored to."""

    x: Tensor  # (S, d)
    rows: list[Any]  # (S,) from `Snapshot.snapshot`
    episode: np.ndarray  # (S,) index of the episode
    time: np.ndarray  # (S,) steps since its reset
    y: Tensor  # (S, n) the policy's action
    reward: np.ndarray  # (S,) its reward
    x_next: Tensor  # (S, d) its successor


@torch.no_grad()
def save(policy: Policy, env: GymEnv, seed: int, episode: np.ndarray, time: np.ndarray) -> Saved:
    """Roll out one episode in each environment, from seeds seed, seed + 1, ..., and save the states (episode[i], time[i]).

    Raises:
        UserError: part of the environment's state cannot be saved, or it is a user's vector environment.
    """
    records: dict[tuple[int, int], tuple[Tensor, Any, Tensor, float, Tensor]] = {}
    x = env.reset(seed).to(env.device)
    for now in range(int(time.max()) + 1):
        wanted = episode[time == now]
        rows = env.state()["rows"] if len(wanted) else []
        if rows is None:
            raise UserError(f"env={env.name}: rlamort did not make it, so it cannot be put back into a state")
        for e in wanted:
            if rows[e]["unsaved"]:
                raise UserError(f"env={env.name}: {rows[e]['unsaved'][0]}, so no other action can be tried there")
        y = policy(x)
        step = env.step(y)
        for e in wanted:
            x_next = step.x_next[e].to(env.device, copy=True)
            records[int(e), now] = (x[e].clone(), rows[e], y[e].clone(), float(step.reward[e]), x_next)
        x = env.x.to(env.device)
    env.episodes()
    states = [records[int(e), int(t)] for e, t in zip(episode, time, strict=True)]
    at, snapshots, played, rewards, after = zip(*states, strict=True)
    if any(not equal(_unnumbered(row["shared"]), _unnumbered(snapshots[0]["shared"])) for row in snapshots):
        raise UserError(f"env={env.name}: it changes what all of its class share, so its states cannot stand side by side")
    return Saved(torch.stack(at), list(snapshots), episode, time, torch.stack(played), np.array(rewards), torch.stack(after))


def _unnumbered(tree: Any) -> Any:
    """A tree of `rlamort.env.state` without object numbers, which depend on the rest of the environment."""
    if isinstance(tree, dict):
        return {key: _unnumbered(one) for key, one in tree.items() if key not in ("object", "again")}
    return [_unnumbered(one) for one in tree] if isinstance(tree, list) else tree


class EnvSimulator:
    """Rollouts in the environment itself, one environment per saved state: exact for every environment with restorable state.

    Args:
        env: S environments of the kind that the states were saved from.
        saved: the states.

    Raises:
        UserError: after restoring, the policy's step gives another result than before.
    """

    def __init__(self, env: GymEnv, saved: Saved) -> None:
        count = len(saved.rows)
        assert env.count == count, (env.count, count)
        self.env = env
        env.reset(0)
        self.state = env.state() | {
            "x": saved.x, "rows": saved.rows, "length": saved.time, "total": np.zeros(count), "ended": np.zeros(count, bool),
        }  # fmt: skip
        self._put_back()
        again = env.step(saved.y)
        reward, x, before = (t.numpy(force=True) for t in (again.reward, again.x_next, saved.x_next))
        close = np.isclose(reward, saved.reward, rtol=1e-3, atol=1e-4) & np.isclose(x, before, rtol=1e-3, atol=1e-4).all(-1)
        if not close.all():
            odd = int(np.argmin(close))
            raise UserError(
                f"env={env.name}: put back into a state, it gives the same step the reward {reward[odd]:g} where it was "
                f"{saved.reward[odd]:g}, so it holds something that was not saved, and no other action can be tried there"
            )

    def _put_back(self) -> None:
        if not self.env.restore(self.state):
            raise UserError(f"env={self.env.name}: it cannot be put back into a state: {self.env.unsaved[0]}")

    @torch.no_grad()
    def returns(self, y: Tensor, policy: Policy, horizon: int, discount: float) -> np.ndarray:
        """sum_{t < H} gamma^t r_t (S,) of rollouts that begin with y (S, n) and follow `policy`, within the episode."""
        env, total, running = self.env, np.zeros(len(y)), np.ones(len(y), dtype=bool)
        self._put_back()
        for t in range(horizon):
            step = env.step(y)
            total += np.where(running, discount**t * step.reward.numpy(force=True).astype(np.float64), 0.0)
            running = running & ~(step.terminated | step.truncated)
            if not running.any():
                break
            y = policy(env.x.to(env.device))
        env.episodes()
        return total


class Derived(NamedTuple):
    """An environment's results as a function of a step of its physics."""

    x: np.ndarray  # (B, d)
    reward: np.ndarray  # (B,)
    terminated: np.ndarray  # (B,) bool


Derivation = Callable[[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Derived]


class Physics:
    """An environment's physics from any states, by `mujoco.rollout`: all states in one call, in threads.

    Args:
        env: one of Gymnasium's MuJoCo environments, without wrappers.
        derive: its results as a function of its physics.
        units: of its actions.
        threads: at most; as many as there are cores by default.
    """

    def __init__(self, env: Any, derive: Derivation, units: Any, threads: int = 1_000) -> None:
        from mujoco import MjData, mj_stateSize, mjtState
        from mujoco.rollout import Rollout

        self.env, self.model, self.derive, self.units = env, env.model, derive, units
        self.size, nq, nv = mj_stateSize(self.model, int(mjtState.mjSTATE_FULLPHYSICS)), self.model.nq, self.model.nv
        self.position, self.velocity = slice(1, 1 + nq), slice(1 + nq, 1 + nq + nv)  # a state is time, qpos, qvel, ...
        threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, threads)
        self.data = [MjData(self.model) for _ in range(threads)]
        self.rollout = Rollout(nthread=threads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of an agent share it: between calls it holds nothing

    def states(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """States (count, s) and warm starts of the contact solver (count, nv), all zero."""
        return np.zeros((count, self.size)), np.zeros((count, self.model.nv))

    def follow(self, at: np.ndarray, warm: np.ndarray, y: np.ndarray) -> tuple[list[Derived], np.ndarray, np.ndarray]:
        """The results of H actions y (H, B, n), one after another, from states and warm starts (B, .); both after them."""
        (steps, count, _), skip = y.shape, self.env.frame_skip
        actions = self.units.decode(y.reshape(steps * count, -1)).reshape(steps, count, -1)
        control = np.repeat(actions.swapaxes(0, 1).astype(np.float64), skip, axis=1)
        path, _ = self.rollout.rollout(self.model, self.data, at, control, nstep=steps * skip, initial_warmstart=warm)
        path = np.concatenate([at[:, None], path], axis=1)  # (B, H skip + 1, s)
        warm = (path[:, -1, self.velocity] - path[:, -2, self.velocity]) / self.model.opt.timestep
        q, v = path[:, ::skip, self.position], path[:, ::skip, self.velocity]
        results = [self.derive(self.env, q[:, t], q[:, t + 1], v[:, t + 1], action) for t, action in enumerate(actions)]
        return results, path[:, -1].copy(), warm

    def close(self) -> None:
        """End its threads."""
        self.rollout.close()


class RolloutSimulator:
    """Rollouts by `mujoco.rollout`: the physics of all states in one threaded call, with batched rewards and observations.

    One step equals the environment's bit for bit; later steps agree to solver tolerance, since the contact solver is
    warm-started differently, and chaotic motion amplifies that over a hundred steps. A step takes about half of the time of the
    environment's own on one thread.

    Args:
        env: one environment of the kind that the states were saved from.
        saved: the states.

    Raises:
        UserError: the rewards of this environment as a function of its physics are not known, or differ.
    """

    def __init__(self, env: GymEnv, saved: Saved) -> None:
        from mujoco import mj_getState, mjtState

        single, count, self.env, self.device = _single(env), len(saved.rows), env, env.device
        base = cast(Any, single.unwrapped)
        limit = single.spec.max_episode_steps if single.spec else None
        self.left = np.full(count, np.inf) if limit is None else limit - saved.time  # steps until it is truncated
        self.physics = Physics(base, derivation(single, env.name), env.units, count)
        self.at, self.warm = self.physics.states(count)
        env.reset(0)
        fresh = env.state()
        for i, row in reversed(list(enumerate(saved.rows))):
            env.restore(fresh | {"rows": [row]})
            mj_getState(base.model, base.data, self.at[i], int(mjtState.mjSTATE_FULLPHYSICS))
            self.warm[i] = base.data.qacc_warmstart
        self._compare()

    def _compare(self) -> None:
        """Compare one step of both from the first saved state."""
        y = torch.linspace(-0.5, 0.5, self.env.domain.dim, device=self.env.device)[None]
        (ours,), _, _ = self.physics.follow(self.at[:1], self.warm[:1], y[None].numpy(force=True))
        theirs = self.env.step(y)
        x, reward = theirs.x_next.numpy(force=True), theirs.reward.numpy(force=True)
        if not (np.allclose(ours.x, x, atol=1e-5) and np.allclose(ours.reward, reward, atol=1e-5)):
            self.physics.close()
            raise UserError(
                f"env={self.env.name}: mujoco.rollout gives a step the reward {ours.reward[0]:g}, it itself {reward[0]:g}: "
                f"something is wrapped around it, so it must be stepped itself"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.physics.close()

    @torch.no_grad()
    def returns(self, y: Tensor, policy: Policy, horizon: int, discount: float) -> np.ndarray:
        """As `EnvSimulator.returns`."""
        at, warm = self.at, self.warm
        total, running = np.zeros(len(y)), np.ones(len(y), dtype=bool)
        for t in range(horizon):
            (derived,), at, warm = self.physics.follow(at, warm, y[None].numpy(force=True))
            total += np.where(running, discount**t * derived.reward, 0.0)
            running = running & ~derived.terminated & (self.left > t + 1)
            if not running.any():
                break
            y = policy(torch.from_numpy(derived.x.astype(np.float32)).to(self.device))
        return total


def half_cheetah(env: Any, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray) -> Derived:
    """HalfCheetah-v5: forward velocity minus squared controls. Arrays (B, ...); `before` is qpos before the step."""
    speed = (qpos[:, 0] - before[:, 0]) / env.dt
    reward = env._forward_reward_weight * speed - env._ctrl_cost_weight * np.square(action).sum(-1)
    hidden = int(env._exclude_current_positions_from_observation)
    return Derived(np.concatenate([qpos[:, hidden:], qvel], axis=1), reward, np.zeros(len(qpos), dtype=bool))


def hopper(env: Any, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray) -> Derived:
    """Hopper-v5: as HalfCheetah-v5, with a reward inside its healthy ranges and termination outside them."""
    moved = half_cheetah(env, before, qpos, qvel, action)
    (low, high), (low_z, high_z), (low_angle, high_angle) = (
        env._healthy_state_range, env._healthy_z_range, env._healthy_angle_range,
    )  # fmt: skip
    state = np.concatenate([qpos, qvel], axis=1)[:, 2:]
    healthy = ((low < state) & (state < high)).all(-1)
    healthy &= (low_z < qpos[:, 1]) & (qpos[:, 1] < high_z) & (low_angle < qpos[:, 2]) & (qpos[:, 2] < high_angle)
    hidden = int(env._exclude_current_positions_from_observation)
    x = np.concatenate([qpos[:, hidden:], qvel.clip(-10, 10)], axis=1)
    return Derived(x, moved.reward + env._healthy_reward * healthy, ~healthy & bool(env._terminate_when_unhealthy))


def inverted_pendulum(env: Any, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray) -> Derived:
    """InvertedPendulum-v5: one for every step until the pole leans by more than 0.2."""
    x = np.concatenate([qpos, qvel], axis=1)
    fallen = ~np.isfinite(x).all(-1) | (np.abs(x[:, 1]) > 0.2)
    return Derived(x, 1.0 - fallen, fallen)


DERIVATIONS: dict[str, Derivation] = {
    "HalfCheetah-v5": half_cheetah, "Hopper-v5": hopper, "InvertedPendulum-v5": inverted_pendulum,
}  # fmt: skip
WHOLE = ("HalfCheetah-v5", "InvertedPendulum-v5")  # unless positions are excluded, x is (qpos, qvel), and nothing is clipped


def derivation(env: gymnasium.Env[Any, Any], name: str) -> Derivation:
    """The function from physics to rewards and observations of an environment; `name` is for messages.

    Raises:
        UserError: it is not known here.
    """
    if env.spec is None or env.spec.id not in DERIVATIONS:
        raise UserError(f"env={name}: mujoco.rollout is known to give the rewards of {', '.join(DERIVATIONS)} alone")
    return DERIVATIONS[env.spec.id]


class Simulator(Dynamics):
    """The true MuJoCo model of an environment as dynamics, by `mujoco.rollout`: values alone, without gradients.

    A plan is one open-loop rollout, which is bit for bit what the environment does from the positions and velocities in x, with
    the contact solver started from zero, as after a reset. In play, x has been rounded to float32, and the environment's own
    solver continues from the step before; so what it then does agrees to rounding and solver tolerance. Time limits do not
    end plans.

    Args:
        env: a Gymnasium environment whose observation is all positions and velocities of its physics.
        name: of the environment, for messages; None takes its id.
        threads: at most; as many as there are cores by default.

    Raises:
        UserError: its rewards as a function of its physics are not known, its observation does not determine its physics, or a
            wrapper changes what it observes, does or is rewarded with.
    """

    differentiable = False

    def __init__(self, env: gymnasium.Env[Any, Any], name: str | None = None, threads: int = 1_000) -> None:
        super().__init__()
        name = name or (env.spec.id if env.spec else type(env.unwrapped).__name__)
        derive, base, space = derivation(env, name), cast(Any, env.unwrapped), cast(Any, env.action_space)
        if not transparent(env):
            raise UserError(f"env={name}: a wrapper may change what it observes, does or is rewarded with; none is needed here")
        numbers, (nq, nv) = int(np.prod(env.observation_space.shape or ())), (base.model.nq, base.model.nv)
        assert env.spec is not None, "or its derivation is not known"
        if env.spec.id not in WHOLE or numbers != nq + nv:
            raise UserError(
                f"env={name}: a plan by simulation begins at the state of the physics, {nq} positions and {nv} velocities, "
                f"which its observation of {numbers} numbers does not determine. {', '.join(WHOLE)} observe theirs, "
                "with env_kwargs.exclude_current_positions_from_observation=false where they have it"
            )
        self.physics = Physics(base, derive, Units(Space.of(space)), threads)

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return self.follow(x, [y])[0]

    def follow(self, x: Tensor, actions: Sequence[Tensor]) -> list[Moved]:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *actions)):
            raise UserError(
                "dynamics=simulator: MuJoCo gives values without gradients, and gradients are asked for; a model that queries "
                "values alone is needed, as with model.update=Cem"
            )
        at, warm = self.physics.states(len(x))
        at[:, 1 : 1 + x.shape[-1]] = x.numpy(force=True)  # after the time
        results, _, _ = self.physics.follow(at, warm, torch.stack(list(actions)).numpy(force=True))
        return [Moved(*(torch.from_numpy(part).to(x) for part in (one.x, one.reward, ~one.terminated))) for one in results]


def _single(env: GymEnv) -> gymnasium.Env[Any, Any]:
    """The first environment."""
    rows: list[gymnasium.Env[Any, Any]] = getattr(env.vector, "envs", [])
    if not rows:
        raise UserError(f"env={env.name}: environments in this process are needed, not a user's vector environment")
    return rows[0]
