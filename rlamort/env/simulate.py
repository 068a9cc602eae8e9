"""Monte Carlo action values: from a saved state, a rollout that begins with the action and continues with the policy.

x state (B, d) · y action (B, n) in [-1, 1]^n · S saved states · H horizon · gamma discount
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlamort.env import Policy
from rlamort.env.copies import equal
from rlamort.env.gym import GymEnv
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
    kept: dict[tuple[int, int], tuple[Tensor, Any, Tensor, float, Tensor]] = {}
    x = env.reset(seed)
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
            kept[int(e), now] = (x[e].clone(), rows[e], y[e].clone(), float(step.reward[e]), step.x_next[e].clone())
        x = env.x
    env.episodes()
    states = [kept[int(e), int(t)] for e, t in zip(episode, time, strict=True)]
    at, held, played, rewards, after = zip(*states, strict=True)
    if any(not equal(_unnumbered(row["shared"]), _unnumbered(held[0]["shared"])) for row in held):
        raise UserError(f"env={env.name}: it changes what all of its class share, so its states cannot stand side by side")
    return Saved(torch.stack(at), list(held), episode, time, torch.stack(played), np.array(rewards), torch.stack(after))


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
            y = policy(env.x)
        env.episodes()
        return total


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
        from mujoco import MjData, mj_getState, mj_stateSize, mjtState
        from mujoco.rollout import Rollout

        self.derive, single, self.device = derivation(env), _single(env), saved.x.device
        self.env, self.base = env, cast(Any, single.unwrapped)
        limit = single.spec.max_episode_steps if single.spec else None
        self.left = np.full(len(saved.rows), np.inf) if limit is None else limit - saved.time  # steps until it is truncated
        kind, model, data = int(mjtState.mjSTATE_FULLPHYSICS), self.base.model, self.base.data
        self.physics = np.empty((len(saved.rows), mj_stateSize(model, kind)))
        self.warm = np.empty((len(saved.rows), model.nv))
        self.velocity = slice(1 + model.nq, 1 + model.nq + model.nv)  # a state is time, qpos, qvel, ...
        env.reset(0)
        fresh = env.state()
        for i, row in reversed(list(enumerate(saved.rows))):
            env.restore(fresh | {"rows": [row]})
            mj_getState(model, data, self.physics[i], kind)
            self.warm[i] = data.qacc_warmstart
        threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(saved.rows))
        self.data = [MjData(model) for _ in range(threads)]
        self.rollout = Rollout(nthread=threads)
        self._compare()

    def _compare(self) -> None:
        """Compare one step of both from the first saved state."""
        y = torch.linspace(-0.5, 0.5, self.env.domain.dim, device=self.env.device)[None]
        ours, _, _ = self._advance(self.physics[:1], self.warm[:1], y)
        theirs = self.env.step(y)
        x, reward = theirs.x_next.numpy(force=True), theirs.reward.numpy(force=True)
        if not (np.allclose(ours.x, x, atol=1e-5) and np.allclose(ours.reward, reward, atol=1e-5)):
            self.rollout.close()
            raise UserError(
                f"env={self.env.name}: mujoco.rollout gives a step the reward {ours.reward[0]:g}, it itself {reward[0]:g}: "
                f"something is wrapped around it, so it must be stepped itself"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.rollout.close()  # ends its threads

    def _advance(self, at: np.ndarray, warm: np.ndarray, y: Tensor) -> tuple["Derived", np.ndarray, np.ndarray]:
        """One step from states at (B, .) with actions y (B, n): the results, next states, and next warm starts."""
        model, skip, position = self.base.model, self.base.frame_skip, slice(1, self.velocity.start)
        action = self.env.units.decode(y.numpy(force=True))
        control = np.repeat(action[:, None].astype(np.float64), skip, axis=1)
        path, _ = self.rollout.rollout(model, self.data, at, control, nstep=skip, initial_warmstart=warm)
        before, after = path[:, -2] if skip > 1 else at, path[:, -1].copy()
        warm = (after[:, self.velocity] - before[:, self.velocity]) / model.opt.timestep
        return self.derive(self.base, at[:, position], after[:, position], after[:, self.velocity], action), after, warm

    @torch.no_grad()
    def returns(self, y: Tensor, policy: Policy, horizon: int, discount: float) -> np.ndarray:
        """As `EnvSimulator.returns`."""
        at, warm = self.physics, self.warm
        total, running = np.zeros(len(y)), np.ones(len(y), dtype=bool)
        for t in range(horizon):
            derived, at, warm = self._advance(at, warm, y)
            total += np.where(running, discount**t * derived.reward, 0.0)
            running = running & ~derived.terminated & (self.left > t + 1)
            if not running.any():
                break
            y = policy(torch.from_numpy(derived.x.astype(np.float32)).to(self.device))
        return total


class Derived(NamedTuple):
    """An environment's results as a function of a step of its physics."""

    x: np.ndarray  # (B, d)
    reward: np.ndarray  # (B,)
    terminated: np.ndarray  # (B,) bool


Derivation = Callable[[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Derived]


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


DERIVATIONS: dict[str, Derivation] = {"HalfCheetah-v5": half_cheetah, "Hopper-v5": hopper}


def derivation(env: GymEnv) -> Derivation:
    """The function from physics to rewards and observations of an environment.

    Raises:
        UserError: it is not known here.
    """
    spec = _single(env).spec
    if spec is None or spec.id not in DERIVATIONS:
        raise UserError(f"env={env.name}: mujoco.rollout is known to give the rewards of {', '.join(DERIVATIONS)} alone")
    return DERIVATIONS[spec.id]


def _single(env: GymEnv) -> gymnasium.Env[Any, Any]:
    """The first environment."""
    rows: list[gymnasium.Env[Any, Any]] = getattr(env.vector, "envs", [])
    if not rows:
        raise UserError(f"env={env.name}: environments in this process are needed, not a user's vector environment")
    return rows[0]
