"""Any Gymnasium environment, id, instance or `gymnasium.vector` environment, as a batched `Env`."""

import functools
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box as BoxSpace
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from rlamort.envs.snapshot import Snapshot

from rlamort.env import Env, Episode, Spec, Step
from rlamort.errors import Fault, UserError, nearest

Factory = Callable[[], gymnasium.Env[Any, Any]]
PATIENCE = 10_000  # steps after which an episode of an environment that declares no limit counts as endless


def factory(
    env: str | gymnasium.Env[Any, Any] | Callable[..., gymnasium.Env[Any, Any]],
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
) -> Factory:
    """What makes one fresh environment of that kind, each time it is called.

    Args:
        env: Gymnasium id, `module:Class` (the current folder counts), a class or function that makes one, or an instance.
        env_kwargs: keywords of its constructor.
        max_episode_steps: truncates longer episodes; None leaves the environment's own limit.

    Raises:
        UserError: nothing of that name exists, or it cannot be made.
    """
    kwargs = dict(env_kwargs or {})
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    if isinstance(env, gymnasium.Env):
        if env.spec is None:
            raise UserError(
                f"env: a second {type(env).__name__} is needed, to evaluate or to step several, and an instance without "
                f"a spec cannot be copied; give the class, or 'module:Class', or a registered id"
            )
        spec = env.spec
        return lambda: gymnasium.make(spec, disable_env_checker=True, **limit)
    if isinstance(env, str):
        made = _imported(env) if ":" in env else None
        if made is None:
            try:
                gymnasium.spec(env)
            except gymnasium.error.Error as error:
                raise UserError(f"env={env}: there is no such environment. {nearest(env, gymnasium.registry)}") from error
            name = env
            return lambda: gymnasium.make(name, disable_env_checker=True, **limit, **kwargs)
        env = made

    def make() -> gymnasium.Env[Any, Any]:
        single = env(**kwargs)
        return single if max_episode_steps is None else gymnasium.wrappers.TimeLimit(single, max_episode_steps)

    return make


def _imported(path: str) -> Callable[..., gymnasium.Env[Any, Any]] | None:
    """The class that `module:Class` names; None when the second half is a Gymnasium id that importing registers."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"env={path}: no module {module_name!r} could be imported from {os.getcwd()}: {error}") from error
    if attribute in gymnasium.registry:
        return None
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"env={path}: module {module_name!r} has no {attribute!r}. {nearest(attribute, public)}")
    made: Callable[..., gymnasium.Env[Any, Any]] = getattr(module, attribute)
    return made


def spec_of(name: str, observation: gymnasium.Space[Any], action: gymnasium.Space[Any]) -> Spec:
    """Sizes and bounds for a continuous agent.

    Raises:
        UserError: a space that a continuous agent cannot use, named with what to do.
    """
    if not isinstance(action, BoxSpace):
        raise UserError(f"env={name}: its action space is {action}; a Box of bounded floats is needed, by every method here")
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UserError(
            f"env={name}: its action bounds are infinite ({action}); every bound must be finite. "
            f"Wrap it in gymnasium.wrappers.RescaleAction, or give the space bounds"
        )
    if not (action.low < action.high).all():
        raise UserError(f"env={name}: an action bound is not below its upper one ({action})")
    if not isinstance(observation, BoxSpace):
        raise UserError(
            f"env={name}: its observation space is {observation}; a Box is needed. "
            f"Wrap it in gymnasium.wrappers.FlattenObservation"
        )
    return Spec(math.prod(observation.shape), action.low.ravel().tolist(), action.high.ravel().tolist())


def probe(name: str, make: Factory) -> Spec:
    """Make one environment, reset it and step it twice, so that what is wrong with it shows before any work starts.

    Raises:
        UserError: it cannot be made, or its spaces do not fit.
        Fault: it raises, or what it returns is not what it declares.
    """
    try:
        env = make()
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise UserError(f"env={name}: it cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"env={name}: it makes a {type(env).__name__}; a gymnasium.Env is needed")
    spec = spec_of(name, env.observation_space, env.action_space)
    env.action_space.seed(0)
    try:
        first, _ = env.reset(seed=0)
        outcome = env.step(env.action_space.sample())
        if not (isinstance(outcome, tuple) and len(outcome) == 5):
            raise Fault(f"env {name}: step must return (observation, reward, terminated, truncated, info), got {outcome!r}")
        second, reward, terminated, truncated, _ = outcome
        for when, given in (("reset", first), ("step", second)):
            _check_observation(name, when, given, env.observation_space)
        if not np.isfinite(float(reward)):
            raise Fault(f"env {name}: step returned reward {reward}; a finite number is needed")
        for flag, value in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(value, bool | np.bool_):
                raise Fault(f"env {name}: step returned {flag}={value!r}; a bool is needed")
        if np.shares_memory(first, second):
            warnings.warn(
                f"env {name} reuses its observation array: what it returned before changes with every step. "
                f"rlamort copies, so training is right, but other code that keeps observations is not",
                stacklevel=2,
            )
    except (Fault, UserError):
        raise
    except Exception as error:
        raise Fault(f"env {name}: it raised in its first steps: {type(error).__name__}: {error}") from error
    finally:
        env.close()
    return spec


def _check_observation(name: str, when: str, given: Any, space: gymnasium.Space[Any]) -> None:
    declared = f"shape {space.shape} and dtype {space.dtype}"
    if not isinstance(given, np.ndarray | np.generic):
        raise Fault(
            f"env {name}: {when} returned an observation of type {type(given).__name__}; an array of {declared} is needed"
        )
    if given.shape != space.shape:
        raise Fault(f"env {name}: {when} returned an observation of shape {given.shape}; it declares {declared}")
    if given.dtype.kind != np.dtype(space.dtype).kind:  # widths may differ: training is in float32 anyway
        raise Fault(f"env {name}: {when} returned an observation of dtype {given.dtype}; it declares {declared}")
    if not np.isfinite(given).all():
        odd = np.asarray(given)[~np.isfinite(given)][0]
        raise Fault(f"env {name}: {when} returned an observation with {odd}; finite numbers are needed")


def make_vector(make: Factory, count: int, vectorization: str) -> VectorEnv[Any, Any, Any]:
    """`count` environments stepped in this process (sync) or in a worker process each (async), reset on demand."""
    makers = [functools.partial(_in_row, make, row) for row in range(count)]
    if vectorization == "async":
        # not fork: the parent already runs torch's threads
        return AsyncVectorEnv(makers, context="forkserver", autoreset_mode=AutoresetMode.DISABLED)
    return SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED)


def _in_row(make: Factory, row: int) -> Snapshot:
    return Snapshot(make(), row)


class GymEnv(Env):
    """The adapter. Whatever a vector environment's autoreset mode, the same episodes give the same transitions.

    Args:
        vector: any `gymnasium.vector.VectorEnv` that declares its autoreset mode.
        name: for messages.
        device: where x, rewards and actions live.
        limit: steps after which an episode that has not ended is an error; None where a time limit is declared.
        make: what made its environments, where that is known.
    """

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        name: str,
        device: torch.device,
        limit: int | None = None,
        make: Factory | None = None,
    ) -> None:
        super().__init__(spec_of(name, vector.single_observation_space, vector.single_action_space), device)
        mode = vector.metadata.get("autoreset_mode")
        if mode is None:
            raise UserError(
                f"env={name}: its metadata declares no 'autoreset_mode'; "
                f"allowed: {', '.join(str(mode) for mode in AutoresetMode)} (gymnasium.vector.AutoresetMode)"
            )
        self.vector, self.name, self.count, self.limit, self.make = vector, name, vector.num_envs, limit, make
        self.mode = AutoresetMode(mode)
        space = vector.single_action_space
        assert isinstance(space, BoxSpace)
        self._action_shape, self._action_dtype = (self.count, *space.shape), space.dtype
        self._low, self._high = space.low.ravel().astype(np.float32), space.high.ravel().astype(np.float32)
        self._ours = make is not None  # made by `make_vector`, so that each row can give its state
        self._steps = 0
        self._ended = np.zeros(self.count, dtype=bool)  # rows whose episode is over and that NEXT_STEP resets next
        self._total = np.zeros(self.count)
        self._length = np.zeros(self.count, dtype=np.int64)
        self._finished: list[Episode] = []

    def reset(self, seed: int) -> torch.Tensor:
        self.vector.action_space.seed(seed)
        observation, _ = self._call(lambda: self.vector.reset(seed=seed))
        self._ended[:] = False
        self._total[:] = 0
        self._length[:] = 0
        self._finished.clear()
        self.x = self._to_device(self._rows(observation, "reset"))
        return self.x

    def step(self, y: torch.Tensor) -> Step:
        action = self.box.decode(y).numpy(force=True)
        if not np.isfinite(action).all():
            raise Fault(f"env {self.name}, step {self._steps}: the agent's action is {action}; its network has diverged")
        action = action.clip(self._low, self._high).astype(self._action_dtype).reshape(self._action_shape)
        valid = ~self._ended
        observation, reward, terminated, truncated, info = self._call(lambda: self.vector.step(action))
        self._steps += 1
        terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        ended = terminated | truncated
        reward = np.array(reward, dtype=np.float32)
        if not np.isfinite(reward).all():
            raise Fault(
                f"env {self.name}, step {self._steps}: reward {reward[~np.isfinite(reward)][0]}; finite numbers are needed"
            )
        following = self._rows(observation, f"step {self._steps}")
        successor = following
        if ended.any():
            if self.mode is AutoresetMode.SAME_STEP:
                successor = following.copy()
                for row in np.flatnonzero(ended):
                    successor[row] = self._rows(info["final_obs"][row][None], f"step {self._steps}")[0]
            elif self.mode is AutoresetMode.DISABLED:
                # a fresh dict and mask each time: the call takes the mask out of the dict
                fresh, _ = self._call(lambda: self.vector.reset(options={"reset_mask": ended.copy()}))
                following = self._rows(fresh, f"reset after step {self._steps}")
            else:
                self._ended = ended
        if self.mode is AutoresetMode.NEXT_STEP:
            self._ended = ended
        self._record(reward, ended, valid)
        x_next = self._to_device(successor)
        self.x = x_next if following is successor else self._to_device(following)
        return Step(
            x_next,
            self._to_device(reward),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(valid),
        )

    def episodes(self) -> list[Episode]:
        finished, self._finished = self._finished, []
        return finished

    def state(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "steps": self._steps,
            "ended": self._ended,
            "total": self._total,
            "length": self._length,
            "finished": [[e.total, e.length] for e in self._finished],
            "rows": list(self.vector.call("snapshot")) if self._ours else None,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        self._steps = state["steps"]
        self._finished = [Episode(total, length) for total, length in state["finished"]]
        if not self._ours or any(row is None for row in state["rows"]):
            self.reset(int(state["steps"]))  # as good a seed as any, and the same whenever it is done again
            return False
        self._call(lambda: self.vector.reset(seed=0))  # they must have been reset once before a state is put in
        self._call(lambda: self.vector.call("restore", state["rows"]))
        self._ended[:], self._total[:], self._length[:] = state["ended"], state["total"], state["length"]
        self.x = state["x"].to(self.device)
        return True

    def close(self) -> None:
        self.vector.close()

    def _record(self, reward: np.ndarray, ended: np.ndarray, valid: np.ndarray) -> None:
        self._total += reward * valid
        self._length += valid
        for row in np.flatnonzero(ended):
            self._finished.append(Episode(float(self._total[row]), int(self._length[row])))
        self._total[ended] = 0
        self._length[ended] = 0
        if self.limit is not None and self._length.max() >= self.limit:
            raise Fault(
                f"env {self.name}: an episode has not ended after {self.limit} steps, and it declares no limit; "
                f"give max_episode_steps=N (longer episodes are then truncated)"
            )

    def _rows(self, observation: Any, when: str) -> np.ndarray:
        """(B, ...) as the environment gave it -> (B, d) float32 in an array of our own, checked."""
        rows = np.array(observation, dtype=np.float32).reshape(len(observation), -1)
        if rows.shape[1] != self.spec.x_dim:
            raise Fault(f"env {self.name}, {when}: {rows.shape[1]} numbers in an observation; it declares {self.spec.x_dim}")
        if not np.isfinite(rows).all():
            bad = rows[~np.isfinite(rows)][0]
            raise Fault(f"env {self.name}, {when}: an observation holds {bad}; finite numbers are needed")
        return rows

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _call(self, function: Callable[[], Any]) -> Any:
        """What the environment answers; what it raises, as a fault that names it."""
        try:
            return function()
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise Fault(f"env {self.name}: it raised at step {self._steps + 1}: {what}") from error


def open_env(
    env: Any,
    *,
    count: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    vectorization: str = "sync",
    max_episode_steps: int | None = None,
    device: torch.device | None = None,
) -> GymEnv:
    """Check an environment of any accepted kind and give it as a batched `Env`.

    Args:
        env: as in `factory`, or a `gymnasium.vector.VectorEnv`, which brings its own count.
        count: rows.
        env_kwargs: keywords of its constructor.
        vectorization: "sync" (this process) or "async" (a worker process per row).
        max_episode_steps: truncates longer episodes.
        device: where tensors live; the CPU by default.

    Raises:
        UserError, Fault: see `probe`.
    """
    device = device or torch.device("cpu")
    if isinstance(env, VectorEnv):
        return GymEnv(env, name_of(env), device)
    if isinstance(env, gymnasium.Env) and count == 1 and env.spec is None:
        wrapped = env if max_episode_steps is None else gymnasium.wrappers.TimeLimit(env, max_episode_steps)
        limit = None if max_episode_steps else PATIENCE
        return GymEnv(make_vector(lambda: wrapped, 1, "sync"), name_of(env), device, limit, lambda: wrapped)
    make = factory(env, env_kwargs, max_episode_steps)
    probe(name_of(env), make)
    vector = make_vector(make, count, vectorization)
    return GymEnv(vector, name_of(env), device, _patience(make, max_episode_steps), make)


def _patience(make: Factory, max_episode_steps: int | None) -> int | None:
    if max_episode_steps is not None:
        return None
    single = make()
    declared = single.spec.max_episode_steps if single.spec else None
    single.close()
    return None if declared else PATIENCE


def name_of(env: Any) -> str:
    """How messages and records call an environment."""
    if isinstance(env, str):
        return env
    spec = getattr(env, "spec", None)
    if spec is not None:
        return str(spec.id)
    return env.__name__ if isinstance(env, type) else type(env).__name__
