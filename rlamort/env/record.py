"""The name by which a run's environment is constructed again."""

import inspect
import sys
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.vector.vector_env import VectorWrapper
from gymnasium.wrappers import PassiveEnvChecker

from rlamort.env.copies import Copies, alike
from rlamort.env.snapshot import layers
from rlamort.errors import UserError
from rlamort.problem import Problem


class Recorded(NamedTuple):
    """The record of an environment."""

    name: str | None
    env_kwargs: dict[str, Any] | None
    max_episode_steps: int | None
    unnamed: str = ""  # why another process cannot construct it by that name; empty if it can


def recorded(env: Any, env_kwargs: dict[str, Any] | None, max_episode_steps: int | None) -> Recorded:
    """The name, keywords and time limit that construct an environment like `env`, of any accepted kind, if there are such."""
    settings = (env_kwargs, max_episode_steps)
    if env is None or isinstance(env, str):
        return Recorded(env, *settings)
    if isinstance(env, type):
        path = path_of(env)
        return Recorded(path or env.__name__, *settings, "" if path else f"{env.__name__} {_nowhere(env)}")
    if isinstance(env, Problem):
        return Recorded(type(env).__name__, *settings, f"an instance of {type(env).__name__} is given, not its class")
    if isinstance(env, VectorEnv):
        return _of_rows(env)
    if isinstance(env, gymnasium.Env):
        return _of_instance(env, max_episode_steps)
    name = getattr(env, "__name__", type(env).__name__)
    return Recorded(name, *settings, f"{name} is a function, and nothing that a file names is called")


def path_of(kind: type) -> str:
    """`module:Class` if another process can import it; else an empty string."""
    module = sys.modules.get(kind.__module__)
    found = getattr(module, kind.__qualname__, None)
    return f"{kind.__module__}:{kind.__qualname__}" if found is kind and kind.__module__ != "__main__" else ""


def _nowhere(kind: type) -> str:
    where = "the script that runs" if kind.__module__ == "__main__" else f"{kind.__module__}, inside something else,"
    return f"is defined in {where} where no other process finds it"


def spec_of_instance(env: Any) -> EnvSpec | None:
    """Gymnasium's spec of an environment; None if it has none or a wrapper cannot serialise it."""
    try:
        spec = env.spec
    except (ValueError, AttributeError, TypeError):
        spec = env.unwrapped.spec
    return spec if isinstance(spec, EnvSpec) else None


def _of_instance(env: gymnasium.Env[Any, Any], max_episode_steps: int | None) -> Recorded:
    spec, inner = spec_of_instance(env), type(env.unwrapped)
    try:
        one = Copies(env).first
    except UserError as error:
        return Recorded(_called(env), None, max_episode_steps, f"an instance is given, and {error}")
    if spec is not None:
        limit = spec.max_episode_steps
        bare = not any(isinstance(layer, PassiveEnvChecker) for layer in layers(one))
        if alike(one, lambda: gymnasium.make(spec.id, max_episode_steps=limit, disable_env_checker=bare, **spec.kwargs)):
            usual = gymnasium.registry[spec.id].max_episode_steps if spec.id in gymnasium.registry else None
            return Recorded(spec.id, spec.kwargs or None, max_episode_steps or (limit if limit != usual else None))
    elif not isinstance(env, gymnasium.Wrapper) and (path := path_of(inner)) and _callable_bare(inner) and alike(one, inner):
        return Recorded(path, None, max_episode_steps)
    return Recorded(
        _called(env), None, max_episode_steps, "an instance with wrappers, arguments or attributes of its own is given"
    )


def _called(env: Any) -> str:
    spec = spec_of_instance(env)
    return spec.id if spec is not None else path_of(type(env.unwrapped)) or type(env.unwrapped).__name__


def _callable_bare(kind: type) -> bool:
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError):
        return False
    return True


def _of_rows(env: VectorEnv[Any, Any, Any]) -> Recorded:
    base = env.unwrapped
    name = base.spec.id if base.spec is not None else type(base).__name__
    if isinstance(env, VectorWrapper):
        return Recorded(name, None, None, "a vector environment with wrappers of its own is given")
    rows = base.envs if isinstance(base, SyncVectorEnv) else [make() for make in getattr(base, "env_fns", ())]
    if not rows:
        return Recorded(name, None, None, "a vector environment of a class of its own is given")
    first = recorded(rows[0], None, None)
    if first.unnamed or all(alike(Copies(row).first, Copies(rows[0])) for row in rows[1:]):
        return first
    return Recorded(first.name, None, None, "a vector environment whose rows differ is given")


def name_of(env: Any) -> str:
    """An environment's name in messages."""
    if isinstance(env, Copies):
        env = env.env
    if env is None or isinstance(env, str):
        return str(env)
    if isinstance(env, type) or not isinstance(env, gymnasium.Env | VectorEnv | Problem):
        return getattr(env, "__name__", type(env).__name__)
    if isinstance(env, Problem):
        return type(env).__name__
    spec = spec_of_instance(env)
    return spec.id if spec is not None else type(layers(env)[-1]).__name__
