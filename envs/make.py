"""From what a user calls an environment to one that has been checked: ids, `module:Class`, classes, instances."""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box as BoxSpace
from gymnasium.vector import VectorEnv
from rlamort.envs.gym import Factory, GymEnv, Ours
from rlamort.envs.named import class_at, module_of
from rlamort.envs.one_step import single

from rlamort.env import Spec
from rlamort.errors import Fault, UserError, nearest
from rlamort.problem import Problem

PATIENCE = 10_000  # steps after which an episode of an environment that declares no limit counts as endless


def factory(
    env: str | Problem | type[Problem] | gymnasium.Env[Any, Any] | Callable[..., gymnasium.Env[Any, Any]],
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
) -> Factory:
    """What makes one fresh environment of that kind, each time it is called.

    Args:
        env: Gymnasium id, `module:Class` (the current folder counts), a class or function that makes one, or an instance;
            of a `Problem` its class or an instance, which become one-step environments.
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
                registered = gymnasium.spec(env)
            except gymnasium.error.Error as error:
                raise UserError(f"env={env}: there is no such environment. {nearest(env, gymnasium.registry)}") from error
            name = env

            def named() -> gymnasium.Env[Any, Any]:
                if "mujoco" in str(registered.entry_point):
                    _hear_mujoco_once()
                return gymnasium.make(name, disable_env_checker=True, **limit, **kwargs)

            return named
        env = made
    kind: Callable[..., Any] = env
    if isinstance(env, Problem) or (isinstance(env, type) and issubclass(env, Problem)):
        kind = functools.partial(single, env)

    def make() -> gymnasium.Env[Any, Any]:
        fresh = kind(**kwargs)
        return fresh if max_episode_steps is None else gymnasium.wrappers.TimeLimit(fresh, max_episode_steps)

    return make


def _imported(path: str) -> type[Any] | None:
    """The class that `module:Class` names; None when the second half is a Gymnasium id that importing registers."""
    module_of(path, "env")
    if path.partition(":")[2] in gymnasium.registry:
        return None
    return class_at(path, "env", (gymnasium.Env, Problem))


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


def probe(name: str, make: Factory) -> tuple[Spec, bool]:
    """Make one environment, reset it and step it, so that what is wrong with it shows before any work starts.

    Returns:
        Its sizes and bounds, and whether it declares a limit to the length of its episodes.

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
    return spec, bool(env.spec and env.spec.max_episode_steps)


def _hear_mujoco_once() -> None:
    """In this process MuJoCo says each warning once; by itself it does at every opening, and keeps a file of them."""
    try:
        import mujoco
    except ImportError:  # Gymnasium says it better
        return
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(functools.cache(lambda message: print(f"MuJoCo: {message}", file=sys.stderr)))


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


def open_env(
    env: Any,
    *,
    count: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    vectorization: str = "sync",
    max_episode_steps: int | None = None,
    max_faults: int = 0,
    timeout: float = 60.0,
    device: torch.device | None = None,
) -> GymEnv:
    """Check an environment of any accepted kind and give it as a batched `Env`.

    Args:
        env: as in `factory`, or a `gymnasium.vector.VectorEnv`, which brings its own count.
        count: rows.
        env_kwargs: keywords of its constructor.
        vectorization: "sync" (this process) or "async" (a worker process per row).
        max_episode_steps: truncates longer episodes.
        max_faults: failures in steps that are forgiven.
        timeout: seconds that worker processes may take over a step.
        device: where tensors live; the CPU by default.

    Raises:
        UserError, Fault: see `probe`.
    """
    device, name = device or torch.device("cpu"), name_of(env)
    if isinstance(env, VectorEnv):
        return GymEnv(env, name, spec_of(name, env.single_observation_space, env.single_action_space), device)
    if isinstance(env, gymnasium.Env) and count == 1 and env.spec is None:
        wrapped = env if max_episode_steps is None else gymnasium.wrappers.TimeLimit(env, max_episode_steps)
        limit = None if max_episode_steps else PATIENCE
        spec = spec_of(name, env.observation_space, env.action_space)
        return GymEnv(Ours(lambda: wrapped), name, spec, device, limit=limit)  # it cannot be made again, so nothing is forgiven
    make = factory(env, env_kwargs, max_episode_steps)
    spec, declared = probe(name, make)
    limit = None if max_episode_steps or declared else PATIENCE
    ours = Ours(make, count, vectorization)
    return GymEnv(ours, name, spec, device, limit=limit, max_faults=max_faults, timeout=timeout)


def name_of(env: Any) -> str:
    """How messages and records call an environment."""
    if isinstance(env, str):
        return env
    spec = getattr(env, "spec", None)
    if spec is not None:
        return str(spec.id)
    return env.__name__ if isinstance(env, type) else type(env).__name__
