"""Environments with known equations in torch, for planners."""

from collections.abc import Callable
from typing import Any

from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, TimeLimit
from torch import Tensor

from rlamort.config import locate
from rlamort.env.snapshot import Snapshot, layers

Equations = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # see `rlamort.dynamics.Known`
# what gives the equations of an environment of the class
HOMES = {"gymnasium.envs.classic_control.pendulum.PendulumEnv": "rlamort.envs.pendulum.dynamics"}
TRANSPARENT = (OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, Snapshot, TimeLimit)


def equations_of(env: Any) -> Equations | None:
    """The equations of an environment: its own method `dynamics`, or those of its class here.

    None where there is neither, or where a wrapper may change what it observes, is given or is rewarded with.
    """
    inner = env.unwrapped
    if not transparent(env):
        return None
    own, home = getattr(inner, "dynamics", None), HOMES.get(f"{type(inner).__module__}.{type(inner).__qualname__}")
    found = own if callable(own) else locate(home)(inner) if home else None
    # a function, which copies of an agent share: a method would bring its environment into each of them
    return None if found is None else lambda x, u: found(x, u)


def longest_of(env: Any) -> int | None:
    """Steps until an episode is truncated, by a wrapper or as an attribute `max_episode_steps` says; None if neither does."""
    limits = [layer._max_episode_steps for layer in layers(env) if isinstance(layer, TimeLimit)]
    own = getattr(env.unwrapped, "max_episode_steps", None)
    return min((int(limit) for limit in [*limits, *([own] if isinstance(own, int) else [])]), default=None)


def transparent(env: Any) -> bool:
    """Whether no wrapper may change what an environment observes, does or is rewarded with; subclasses of these may."""
    return all(type(layer) in TRANSPARENT for layer in layers(env)[:-1])
