"""Environments from ids, `module:Class`, classes, functions and instances, tested before use."""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box as BoxSpace
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from rlamort.config.imports import class_at, module_of
from rlamort.env import Env, Space, Spec
from rlamort.env.bandit import Bandit
from rlamort.env.capacity import require_memory, resident, workers_of
from rlamort.env.copies import Copies, same_results
from rlamort.env.gym import LARGEST, GymEnv
from rlamort.env.imports import here
from rlamort.env.known import declares_limit, equations_of, equations_of_all, longest_of
from rlamort.env.native import NativeEnv, NativeVectorEnv
from rlamort.env.one_step import ENTRY, open_problem, single
from rlamort.env.record import name_of
from rlamort.env.simulate import Simulator
from rlamort.env.snapshot import layers
from rlamort.env.tasks import LEARNED
from rlamort.env.vector import Factory, vector_of
from rlamort.errors import Fault, UserError, nearest
from rlamort.problem import Problem

PATIENCE = 10_000  # steps after which an episode of an environment without a declared limit is an error


def factory(
    env: str | Problem | type[Problem] | gymnasium.Env[Any, Any] | Callable[..., gymnasium.Env[Any, Any]],
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
) -> Factory:
    """A function that makes a new environment of that kind at every call.

    Args:
        env: Gymnasium id, `module:Class` (the current folder is searched), a class or function that makes one, or an instance;
            or a `Problem` class or instance, as a one-step environment.
        env_kwargs: keywords of its constructor.
        max_episode_steps: truncates longer episodes; None keeps the environment's own limit.

    Raises:
        UserError: there is none of that name, or it cannot be made.
    """
    kwargs = dict(env_kwargs or {})
    if isinstance(env, gymnasium.Env):
        copies, name = copies_of(env), name_of(env)
        _refuse_kwargs(name, kwargs)
        return lambda: limited(copies(), name, max_episode_steps)
    if isinstance(env, str):
        constructor = _imported(env) if ":" in env else None
        if constructor is None:
            try:
                registered = gymnasium.spec(env)
            except gymnasium.error.Error as error:
                raise UserError(
                    f"env={env}: there is no such environment. {here(env, 'env') or nearest(env, gymnasium.registry)}"
                ) from error
            name = env
            limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}

            def named() -> gymnasium.Env[Any, Any]:
                if "mujoco" in str(registered.entry_point):
                    _hear_mujoco_once()
                return gymnasium.make(name, disable_env_checker=True, **limit, **kwargs)

            return named
        env = constructor
    kind: Callable[..., Any] = env
    if isinstance(env, Problem) or (isinstance(env, type) and issubclass(env, Problem)):
        kind = functools.partial(single, env)
    if not callable(kind):
        raise UserError(
            f"env={env!r}: a {type(env).__name__} is given; an id, module:Class, a class, an instance, a function that makes "
            "one, or a vector environment is needed"
        )
    return lambda: limited(kind(**kwargs), name_of(env), max_episode_steps)


def copies_of(env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any], options: dict[str, Any] | None = None) -> Copies:
    """A function that makes environments like an existing one.

    Raises:
        UserError: it cannot be copied.
    """
    try:
        return Copies(env, options)
    except UserError as error:
        raise UserError(
            f"env={name_of(env)}: a second one is needed, to evaluate in or to step several, and {error}; give eval_env, or "
            f"instead of the instance its class, 'module:Class', a registered id, or a function that makes a new one"
        ) from error


def limited(env: Any, name: str, max_episode_steps: int | None) -> Any:
    """`env` with a time limit.

    Raises:
        UserError: it truncates shorter ones itself.
    """
    if max_episode_steps is None or not isinstance(env, gymnasium.Env):
        return env
    for layer in layers(env):
        own = layer._max_episode_steps if isinstance(layer, TimeLimit) else None
        if own is not None and own < max_episode_steps:
            raise UserError(
                f"max_episode_steps={max_episode_steps}: {name} truncates its episodes after {own} steps itself; at most that, "
                f"or an environment without a limit, is needed"
            )
    return TimeLimit(env, max_episode_steps)


def _refuse_kwargs(name: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise UserError(f"env_kwargs: {', '.join(kwargs)} given for {name}, which is made already; give its class, or its id")


def _imported(path: str) -> type[Any] | None:
    """The class `module:Class`; None if the second half is a Gymnasium id that importing the module registers."""
    module_of(path, "env")
    if path.partition(":")[2] in gymnasium.registry:
        return None
    return class_at(path, "env", (gymnasium.Env, Problem), "gymnasium.Env or rlamort.Problem")


def spec_of(name: str, observation: gymnasium.Space[Any], action: gymnasium.Space[Any]) -> Spec:
    """Sizes and bounds for a continuous agent.

    Raises:
        UserError: a space that a continuous agent cannot use, with a remedy.
    """
    if not isinstance(action, BoxSpace) or np.dtype(action.dtype).kind != "f":
        raise UserError(f"env={name}: its action space is {action}; a Box of bounded floats is needed, by every method here")
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        bounded = f"gymnasium.spaces.Box(-1, 1, {action.shape}, '{np.dtype(action.dtype).name}')"
        raise UserError(
            f"env={name}: its action bounds are infinite ({action}); every bound must be finite. Actions here keep to the "
            f"bounds, so leave gymnasium.wrappers.ClipAction out; or give those that are meant, -1 and 1, say, as by "
            f"gymnasium.wrappers.TransformAction(env, lambda action: action, {bounded})"
        )
    if np.abs(np.array([action.low, action.high], np.float64)).max(initial=0) > LARGEST:
        raise UserError(
            f"env={name}: its action bounds are {action.low.min():g} and {action.high.max():g}; bounds of at most {LARGEST:g}, "
            f"which float32 holds, are needed"
        )
    if not (action.low < action.high).all():
        raise UserError(f"env={name}: an action bound is not below its upper one ({action})")
    if not isinstance(observation, BoxSpace):
        raise UserError(
            f"env={name}: its observation space is {observation}; a Box is needed. "
            f"Wrap it in gymnasium.wrappers.FlattenObservation"
        )
    for what, space in (("observation", observation), ("action", action)):
        if not math.prod(space.shape):
            raise UserError(f"env={name}: its {what} space is {space}, which holds no numbers")
    return Spec.of(Space.of(observation), Space.of(action))


def probe(name: str, make: Factory, options: dict[str, Any] | None = None) -> tuple[Spec, bool, gymnasium.Env[Any, Any]]:
    """Make an environment, reset it and step it, so that errors appear before any work starts.

    Returns:
        Its sizes and bounds, whether it declares a time limit, and the closed environment.

    Raises:
        UserError: it cannot be made, or its spaces are not supported.
        Fault: it raises, or returns other types, shapes or values than it declares.
    """
    try:
        env = make()
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise UserError(f"env={name}: it cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"env={name}: it makes a {type(env).__name__}; a gymnasium.Env is needed")
    require_spaces(env)
    spec = spec_of(name, env.observation_space, env.action_space)
    env.action_space.seed(0)
    try:
        begun = env.reset(seed=0, options=options)
        if not (isinstance(begun, tuple) and len(begun) == 2):
            raise Fault(f"env {name}: reset must return (observation, info), got {begun!r}")
        first, _ = begun
        outcome = env.step(env.action_space.sample())
        if not (isinstance(outcome, tuple) and len(outcome) == 5):
            raise Fault(f"env {name}: step must return (observation, reward, terminated, truncated, info), got {outcome!r}")
        second, reward, terminated, truncated, _ = outcome
        for when, observation in (("reset", first), ("step", second)):
            _check_observation(name, when, observation, env.observation_space)
        if not isinstance(reward, SupportsFloat) or np.asarray(reward).shape or not np.isfinite(float(reward)):
            raise Fault(f"env {name}: step returned reward {reward!r}; a finite number is needed")
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
    return _with_dynamics(spec, env, lambda: Simulator(make, name)), declares_limit(env), env.unwrapped


def require_spaces(env: gymnasium.Env[Any, Any]) -> None:
    """Raises UserError where an environment does not say what it takes and gives."""
    for space in ("observation_space", "action_space"):
        if not isinstance(found := getattr(env, space, None), gymnasium.Space):
            raise UserError(f"env={name_of(env)}: its {space} is {found}; a gymnasium.spaces.Box is needed")


def _hear_mujoco_once() -> None:
    """Print each of MuJoCo's warnings once per process, instead of at every construction and to a log file."""
    try:
        import mujoco
    except ImportError:  # Gymnasium says it better
        return
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(functools.cache(lambda message: print(f"MuJoCo: {message}", file=sys.stderr)))


def _check_observation(name: str, when: str, observation: Any, space: gymnasium.Space[Any]) -> None:
    declared = f"shape {space.shape} and dtype {space.dtype}"
    if not isinstance(observation, np.ndarray | np.generic):
        raise Fault(
            f"env {name}: {when} returned an observation of type {type(observation).__name__}; an array of {declared} is needed"
        )
    if observation.shape != space.shape:
        raise Fault(f"env {name}: {when} returned an observation of shape {observation.shape}; it declares {declared}")
    if observation.dtype.kind != np.dtype(space.dtype).kind:  # widths may differ: training is in float32 anyway
        raise Fault(f"env {name}: {when} returned an observation of dtype {observation.dtype}; it declares {declared}")
    if not np.isfinite(observation).all():
        odd = np.asarray(observation)[~np.isfinite(observation)][0]
        raise Fault(f"env {name}: {when} returned an observation with {odd}; finite numbers are needed")


def open_env(
    env: Any,
    *,
    count: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    vectorization: str = "sync",
    workers: int | None = None,
    max_episode_steps: int | None = None,
    max_faults: int = 0,
    timeout: float = 60.0,
    reset_options: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> Env:
    """Test an environment of any accepted kind and return it as a batched `Env`: a problem as a `Bandit`, others by `open_gym`.

    Args:
        env: as in `open_gym`; the others too, but that a problem has neither workers nor episodes, as `open_problem` says.

    Raises:
        UserError, Fault: see `open_gym` and `open_problem`.
    """
    problem = _problem_in(env)
    keywords: dict[str, Any] = {
        "count": count, "env_kwargs": env_kwargs, "vectorization": vectorization, "workers": workers,
        "max_episode_steps": max_episode_steps, "max_faults": max_faults, "timeout": timeout,
        "reset_options": reset_options, "device": device,
    }  # fmt: skip
    return open_gym(env, **keywords) if problem is None else Bandit(open_problem(problem, **keywords))


def _problem_in(env: Any) -> Problem | type[Problem] | str | None:
    """The problem, its class or its id; None of other environments."""
    if isinstance(env, str):
        if ":" in env and (kind := _imported(env)) is not None:
            env = kind
        elif env in gymnasium.registry:  # what somebody's registration puts around it is Gymnasium's alone
            spec = gymnasium.registry[env]
            return env if spec.entry_point == ENTRY and not spec.additional_wrappers else None
    return env if isinstance(env, Problem) or (isinstance(env, type) and issubclass(env, Problem)) else None


def open_gym(
    env: Any,
    *,
    count: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    vectorization: str = "sync",
    workers: int | None = None,
    max_episode_steps: int | None = None,
    max_faults: int = 0,
    timeout: float = 60.0,
    reset_options: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> GymEnv:
    """Test an environment of any accepted kind and return it through Gymnasium's interface, problems included.

    Args:
        env: as in `factory`, or a `gymnasium.vector.VectorEnv`, which has its own count.
        count: number of environments side by side.
        env_kwargs: keywords of its constructor.
        vectorization: "sync" (in this process) or "async" (in worker processes).
        workers: number of worker processes; None takes one for each core.
        max_episode_steps: truncates longer episodes.
        max_faults: number of tolerated failures in steps.
        timeout: time limit of a step in worker processes, in seconds.
        reset_options: options of every reset.
        device: of tensors; the CPU by default.

    Raises:
        UserError, Fault: see `probe`; or a keyword that does not apply to a vector environment or an instance.
    """
    device, name = device or torch.device("cpu"), name_of(env)
    if isinstance(env, VectorEnv):
        for key, value in (
            ("env_kwargs", env_kwargs),
            ("max_episode_steps", max_episode_steps),
            ("reset_options", reset_options),
        ):
            if value:
                raise UserError(f"{key}={value}: {name} is a vector environment that is made already, so it comes too late")
        spec = _with_problem(spec_of(name, env.single_observation_space, env.single_action_space), env)
        rows = getattr(env.unwrapped, "envs", [])
        if len({id(row.unwrapped) for row in rows}) < len(rows):
            raise UserError(f"env={name}: the same environment is twice in the vector environment; different ones are needed")
        if rows and type(env) is SyncVectorEnv:  # in this process, and nothing is around them
            spec = _with_dynamics(spec, rows[0], lambda: _simulator_of(rows, name))
            spec = spec._replace(equations=equations_of_all(rows))
        return GymEnv(env, name, spec, device)
    processes = workers_of(vectorization, count, workers)
    first, probed, before, grown = None, None, resident(), math.inf
    if isinstance(env, gymnasium.Env):
        _refuse_kwargs(name, env_kwargs or {})
        require_spaces(env)
        spec, first = spec_of(name, env.observation_space, env.action_space), limited(env, name, max_episode_steps)
        spec, declared = _with_dynamics(spec, first, lambda: Simulator(copies_of(env), name)), declares_limit(first)
        try:
            make = factory(env, None, max_episode_steps)
        except UserError as error:
            if count > 1 or vectorization != "sync":
                raise
            make, max_faults = _none_left(error), 0
        else:
            probe(name, make, reset_options)
    else:
        make = factory(env, env_kwargs, max_episode_steps)
        spec, declared, probed = probe(name, make, reset_options)
        grown = resident() - before  # with what it imports, so no environment takes more
    limit = None if max_episode_steps or declared else PATIENCE
    require_memory(make, count, processes, grown)
    spaces = (spec.observation.box(), spec.action.box())
    vector = vector_of(make, spaces, count, processes, reset_options, first, timeout)
    opened = GymEnv(vector, name, spec, device, limit=limit, max_faults=max_faults)
    rows = [row.unwrapped for row in getattr(opened.vector, "envs", ())]
    if len({id(row) for row in [*rows, probed]}) <= len(rows):
        raise UserError(
            f"env={name}: the function returned the same environment twice; it must make a new one at every call, or pass the "
            f"environment itself"
        )
    return opened


def _simulator_of(rows: Sequence[gymnasium.Env[Any, Any]], name: str) -> Simulator:
    """The simulator of environments side by side.

    Raises:
        UserError: see `Simulator`; or they are not alike.
    """
    make = copies_of(rows[0])
    if not same_results(rows):
        raise UserError(
            f"env={name}: its environments give the same actions other results, so no simulator is that of all; {LEARNED}"
        )
    return Simulator(make, name)


def _with_dynamics(spec: Spec, env: Any, simulator: Callable[[], Simulator]) -> Spec:
    """With what planners may ask of the environment: its equations, how to make its simulator, and how long episodes are."""
    return _with_problem(spec, env)._replace(equations=equations_of(env), simulator=simulator, longest=longest_of(env))


def _with_problem(spec: Spec, env: Any) -> Spec:
    """With the question whether its problem is frozen, of a native environment."""
    native = env.unwrapped.env if isinstance(env.unwrapped, NativeEnv | NativeVectorEnv) else None
    return spec if native is None else spec._replace(frozen=native.spec.frozen)


def _none_left(error: UserError) -> Factory:
    def make() -> gymnasium.Env[Any, Any]:
        raise error

    return make
