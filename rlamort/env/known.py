"""Environments with known equations in torch, for planners."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, TimeLimit
from torch import Tensor

from rlamort.config import locate
from rlamort.env.copies import same_results
from rlamort.env.record import spec_of_instance
from rlamort.env.snapshot import Snapshot, layers
from rlamort.errors import UserError

Equations = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # see `rlamort.dynamics.Known`
# what gives the equations of an environment of the class
HOMES = {"gymnasium.envs.classic_control.pendulum.PendulumEnv": "rlamort.envs.pendulum.dynamics"}
BESIDE = ("reset", "reset_model", "render", "close")  # functions that no step calls
TRANSPARENT = (OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, Snapshot, TimeLimit)


def equations_of(env: Any) -> Equations | None:
    """The equations of an environment: its own method `dynamics`, or those of its class here.

    None where there is neither, or where a wrapper or another `step` may change what it observes, does or is rewarded with.
    """
    inner = env.unwrapped
    if not transparent(env):
        return None
    own, home = getattr(inner, "dynamics", None), HOMES.get(f"{type(inner).__module__}.{type(inner).__qualname__}")
    if callable(own):
        found = None if _stepped_anew(inner) else own
    else:
        found = locate(home)(inner) if home and not replaced(inner) else None
    # a function, which copies of an agent share: a method would bring its environment into each of them
    return None if found is None else lambda x, u: found(x, u)


def equations_of_all(rows: Sequence[Any]) -> Equations | None:
    """The equations of environments side by side; None where these are not alike, or cannot be copied to see."""
    equations = equations_of(rows[0])
    try:
        return equations if equations is not None and same_results(rows) else None
    except UserError:
        return None


def replaced(env: Any) -> list[str]:
    """Functions of its class that an instance has its own of, but for those that steps do not call."""
    return [name for name in vars(env) if callable(getattr(type(env), name, None)) and name not in BESIDE]


def _stepped_anew(env: Any) -> bool:
    """Whether the `step` of the class that has `dynamics` is another one in a subclass, or in the instance."""
    holders = [env, *type(env).__mro__]
    step, dynamics = (next((holder for holder in holders if name in vars(holder)), None) for name in ("step", "dynamics"))
    if dynamics is None or holders.index(step) >= holders.index(dynamics):
        return False
    described = getattr(dynamics, "step", gymnasium.Env.step)  # of a base that leaves it to subclasses, it is theirs
    return described is not gymnasium.Env.step and not getattr(described, "__isabstractmethod__", False)


def longest_of(env: Any) -> int | None:
    """Steps until an episode is truncated, by a wrapper or as an attribute `max_episode_steps` says; None if neither does."""
    limits = [layer._max_episode_steps for layer in layers(env) if isinstance(layer, TimeLimit)]
    own = getattr(env.unwrapped, "max_episode_steps", None)
    return min((int(limit) for limit in [*limits, *([own] if isinstance(own, int) else [])]), default=None)


def declares_limit(env: Any) -> bool:
    """Whether it has a time limit, around it or in Gymnasium's spec."""
    spec = spec_of_instance(env)
    return any(isinstance(layer, TimeLimit) for layer in layers(env)) or bool(spec and spec.max_episode_steps)


def transparent(env: Any) -> bool:
    """Whether no wrapper may change what an environment observes, does or is rewarded with; subclasses of these may."""
    return all(type(layer) in TRANSPARENT for layer in layers(env)[:-1])
