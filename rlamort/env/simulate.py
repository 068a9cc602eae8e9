"""Simulators put into a state: action values by rollouts that continue with a policy, and MuJoCo as dynamics of plans.

x state (B, d) · y action (B, n) in [-1, 1]^n · S saved states · H horizon · gamma discount
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlamort.dynamics import Dynamics, Ends, Moved, Rewards
from rlamort.env import Policy, Space, Units
from rlamort.env.copies import equal
from rlamort.env.gym import GymEnv
from rlamort.env.known import longest_of, transparent
from rlamort.env.tasks import LEARNED, Stepped, Task, task_of
from rlamort.errors import UserError

STEPS, REPLAYED = 5, 0.3  # steps that are replayed, with actions up to this share of their range


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
        """sum_{t < H} gamma^t r_t (S,) of rollouts that begin with y (S, n) and follow `policy`, within the episode.

        It is NaN where the environment failed.
        """
        env, total, running = self.env, np.zeros(len(y)), np.ones(len(y), dtype=bool)
        self._put_back()
        for t in range(horizon):
            step = env.step(y)
            total += np.where(running, discount**t * step.reward.numpy(force=True).astype(np.float64), 0.0)
            total[running & ~step.valid] = np.nan
            running = running & ~step.over
            if not running.any():
                break
            y = policy(env.x.to(env.device))
        env.episodes()
        return total


class Physics:
    """An environment's physics from any states, by `mujoco.rollout`: all states in one call, in as many threads as torch has.

    Args:
        task: the environment's results as functions of its physics.
        units: of its actions.
    """

    def __init__(self, task: Task, units: Any) -> None:
        from mujoco import mj_stateSize, mjtIntegrator, mjtState

        self.task, self.model, self.units = task, task.model, units
        self.size, nq, nv = mj_stateSize(self.model, int(mjtState.mjSTATE_FULLPHYSICS)), self.model.nq, self.model.nv
        self.position, self.velocity = slice(1, 1 + nq), slice(1 + nq, 1 + nq + nv)  # a state is time, qpos, qvel, ...
        self.ahead = int(task.late and self.model.opt.integrator == mjtIntegrator.mjINT_RK4)
        self.data: list[Any] = []
        self.rollout: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of an agent share it: between calls it holds nothing

    def states(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """States (count, s) and warm starts of the contact solver (count, nv), all zero."""
        return np.zeros((count, self.size)), np.zeros((count, self.model.nv))

    def roll(self, at: np.ndarray, warm: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """MuJoCo's own steps with controls (B, T, n): states (B, T, s) and sensors (B, T, m) after each."""
        from mujoco import MjData
        from mujoco.rollout import Rollout

        threads = torch.get_num_threads()
        if len(self.data) != threads:
            self.close()
            self.data, self.rollout = [MjData(self.model) for _ in range(threads)], Rollout(nthread=threads)
        found: tuple[np.ndarray, np.ndarray] = self.rollout.rollout(
            self.model, self.data, at, control, nstep=control.shape[1], initial_warmstart=warm
        )
        return found

    def follow(self, at: np.ndarray, warm: np.ndarray, y: np.ndarray) -> tuple[Stepped, np.ndarray, np.ndarray]:
        """H actions y (H, B, n), one after another, from states and warm starts (B, .): steps (B, H), and both after them."""
        (steps, count, _), skip = y.shape, self.task.env.frame_skip
        action = self.units.decode(y.reshape(steps * count, -1)).reshape(steps, count, -1).swapaxes(0, 1)
        control = np.empty((count, skip * steps + self.ahead, action.shape[-1]))
        control[:, : skip * steps].reshape(count, steps, skip, -1)[:] = action[:, :, None]
        control[:, skip * steps :] = action[:, -1:]
        path, sensors = self.roll(at, warm, control)
        ends = path[:, skip - 1 : skip * steps : skip]  # (B, H, s)
        sensors, first = sensors[:, skip - 1 + self.ahead :: skip][:, :steps], sensors[:, :1]
        qpos, qvel = ends[..., self.position], ends[..., self.velocity]
        before = np.concatenate([at[:, None, self.position], qpos[:, :-1]], 1)
        last, previous = ends[:, -1], path[:, skip * steps - 2] if skip * steps > 1 else at
        warm = (last - previous)[:, self.velocity] / self.model.opt.timestep
        stepped = Stepped(before, qpos, qvel, np.concatenate([first, sensors[:, :-1]], 1), sensors, action)
        return stepped, last.copy(), warm

    def close(self) -> None:
        """End its threads."""
        if self.rollout is not None:
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
        UserError: the rewards of this environment as a function of its physics are not known, or differ, or a policy cannot act
            on what is known of its observations.
    """

    def __init__(self, env: GymEnv, saved: Saved) -> None:
        from mujoco import mj_getState, mjtState

        single, count, self.env, self.device = _single(env), len(saved.rows), env, env.device
        if not transparent(single):
            raise UserError(f"env={env.name}: something is wrapped around it that may change it, so it must be stepped itself")
        base, limit = cast(Any, single.unwrapped), longest_of(single)
        self.left = np.full(count, np.inf) if limit is None else limit - saved.time  # steps until it is truncated
        self.physics = Physics(task_of(base, env.name), env.units)
        if not self.physics.task.continued:
            raise UserError(f"env={env.name}: what it observes is no function of its rolled-out states alone")
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
        task, theirs = self.physics.task, self.env.step(y)
        step, _, _ = self.physics.follow(self.at[:1], self.warm[:1], y[None].numpy(force=True))
        (ours,), x, reward = task.rewards(step)[0][0], theirs.x_next.numpy(force=True), theirs.reward.numpy(force=True)
        if not (np.allclose(task.observed(step)[0], x, atol=1e-5) and np.allclose(ours, reward, atol=1e-5)):
            self.physics.close()
            raise UserError(
                f"env={self.env.name}: mujoco.rollout gives a step the reward {ours:g}, it itself {reward[0]:g}, "
                f"so it must be stepped itself"
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
            step, at, warm = self.physics.follow(at, warm, y[None].numpy(force=True))
            reward, terminated = (part[:, 0] for part in self.physics.task.rewards(step))
            total += np.where(running, discount**t * reward, 0.0)
            running = running & ~terminated & (self.left > t + 1)
            if not running.any():
                break
            x = self.physics.task.observed(step)[:, 0]
            y = policy(torch.from_numpy(x.astype(np.float32)).to(self.device))
        return total


class Met(NamedTuple):
    """Steps that an environment was played for."""

    x: Tensor  # (T, d)
    y: Tensor  # (T, n)
    x_next: Tensor  # (T, d)
    reward: Tensor  # (T,)
    ended: Tensor  # (T,) 1 where the task ended, else 0


class Simulator(Dynamics):
    """The true MuJoCo model of an environment as dynamics, by `mujoco.rollout`: values alone, without gradients.

    A plan is one open-loop rollout from the positions and velocities that the observation x tells, with the contact solver
    started from zero, as after a reset. In play, x has been rounded to float32, and the environment's own solver continues
    from the step before; so what it then does agrees to rounding and solver tolerance. Time limits do not end plans.

    Args:
        make: makes environments of one kind; two are made, and a few steps of one of them are replayed.
        name: of the environment, for messages; None takes its id.

    Raises:
        UserError: see `rlamort.env.tasks.task_of`; or a wrapper may change what it observes, does or is rewarded with; or a
            replayed step has other results.
    """

    differentiable = False

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], name: str | None = None) -> None:
        super().__init__()
        env = make()
        self.name = name or (env.spec.id if env.spec else type(env.unwrapped).__name__)
        if not transparent(env):
            raise UserError(
                f"env={self.name}: a wrapper may change what it observes, does or is rewarded with; none is needed here"
            )
        self.physics = Physics(task_of(env.unwrapped, self.name), Units(Space.of(cast(Any, env.action_space))))
        env.reset(seed=0)
        self._replay(make())

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return self.follow(x, [y])[0]

    def follow(self, x: Tensor, actions: Sequence[Tensor]) -> list[Moved]:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *actions)):
            raise UserError(
                "dynamics=simulator: MuJoCo gives values without gradients, and gradients are asked for; a model that queries "
                "values alone is needed, as with model.update=Cem"
            )
        task, step = self.physics.task, self._steps(x.numpy(force=True), torch.stack(list(actions)).numpy(force=True))
        reward, terminated = task.rewards(step)
        seen, gains, goes_on = (torch.from_numpy(part).to(x) for part in (task.observed(step), reward, ~terminated))
        return [Moved(*parts) for parts in zip(seen.unbind(1), gains.unbind(1), goes_on.unbind(1), strict=True)]

    def rewards(self) -> Rewards:
        """Its rewards as a function of observations and actions alone, for dynamics that predict observations.

        Raises:
            UserError: they read positions or sensors that are not observed; or those of the replayed steps are others.
        """
        return self._seen("rewards", lambda step: self.physics.task.rewards(step)[0])

    def ends(self) -> Ends:
        """Where its tasks end, in the same way, and with the same errors."""
        return self._seen("ends", lambda step: ~self.physics.task.rewards(step)[1])

    def _seen(self, what: str, found: Callable[[Stepped], np.ndarray]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What is found in steps, as a function of x, y and x_next."""
        task, units = self.physics.task, self.physics.units
        hidden = getattr(task.env, "observation_structure", {}).get("skipped_qpos", 0)
        if hidden or task.model.nsensor:
            unseen = f"{hidden} positions" if hidden else f"{task.model.nsensor} sensors"
            remedy = "env_kwargs.exclude_current_positions_from_observation=false shows them, or " if hidden else ""
            raise UserError(
                f"env={self.name}: dynamics.{what}=own: its {what} read {unseen} that it does not observe, so the model cannot "
                f"see them; {remedy}dynamics.{what}=learned is needed"
            )

        def seen(x: Tensor, y: Tensor, x_next: Tensor) -> Tensor:
            before, (qpos, qvel) = task.states(x.numpy(force=True))[0], task.states(x_next.numpy(force=True))
            none = np.zeros((len(x), 0))
            return torch.from_numpy(found(Stepped(before, qpos, qvel, none, none, units.decode(y.numpy(force=True))))).to(x)

        theirs = self.met.reward if what == "rewards" else 1 - self.met.ended
        for t, (own, known) in enumerate(zip(seen(*self.met[:3]).tolist(), theirs.tolist(), strict=True)):
            if not abs(own - known) <= task.close * (1 + abs(known)):
                raise UserError(
                    f"env={self.name}: dynamics.{what}=own: by what it observes, step {t + 1} of an episode has {own:g}, where "
                    f"it gives {known:g}: its {what} read what it does not observe; dynamics.{what}=learned is needed"
                )
        return seen

    def _steps(self, x: np.ndarray, y: np.ndarray) -> Stepped:
        """The steps (B, H) of plans y (H, B, n) from observations x (B, d)."""
        at, warm = self.physics.states(len(x))
        at[:, self.physics.position], at[:, self.physics.velocity] = self.physics.task.states(x)
        return self.physics.follow(at, warm, y)[0]

    def _replay(self, env: gymnasium.Env[Any, Any]) -> None:
        """Play a few steps in another environment, from another seed, and compare the plan of the same actions."""
        data, space = cast(Any, env.unwrapped).data, cast(Any, env.action_space)
        x, _ = env.reset(seed=1)
        y = np.random.default_rng(0).uniform(-REPLAYED, REPLAYED, (STEPS, 1, int(np.prod(space.shape)))).astype(np.float32)
        step = self._steps(np.asarray(x, dtype=np.float64).reshape(1, -1), y)
        met: list[tuple[Any, ...]] = []
        try:
            reward, terminated = (part[0].tolist() for part in self.physics.task.rewards(step))
        except Exception as error:
            raise UserError(f"env={self.name}: its method rewards raised {type(error).__name__}: {error}") from error
        for t, action in enumerate(self.physics.units.decode(y[:, 0])):
            seen = np.array(x, dtype=np.float64).ravel()  # an environment may reuse its array
            x, gained, ended, over, _ = env.step(action)
            worst = int(np.abs(data.qvel - step.qvel[0, t]).argmax())
            known = {
                f"the velocity {worst}": (data.qvel[worst], step.qvel[0, t, worst]),
                "the reward": (float(gained), reward[t]),
                "an end": (float(ended), float(terminated[t])),
            }
            for what, (theirs, ours) in known.items():
                if not abs(theirs - ours) <= self.physics.task.close * (1 + abs(theirs)):
                    raise UserError(
                        f"env={self.name}: step {t + 1} of an episode has {what} {theirs:g}, and replayed by mujoco.rollout "
                        f"from its first observation {ours:g}: it is no function of the state and the action; {LEARNED}"
                    )
            met.append((seen, y[t, 0], np.array(x, dtype=np.float64).ravel(), gained, ended))
            if ended or over:
                break
        env.close()
        self.met = Met(*(torch.tensor(np.array(part, dtype=np.float64)) for part in zip(*met, strict=True)))


def _single(env: GymEnv) -> gymnasium.Env[Any, Any]:
    """The first environment."""
    rows: list[gymnasium.Env[Any, Any]] = getattr(env.vector, "envs", [])
    if not rows:
        raise UserError(f"env={env.name}: environments in this process are needed, not a user's vector environment")
    return rows[0]
