"""Experts to imitate, as parts: saved agents, planners, objects of a user's own, and data sets.

N environments side by side · d = x_dim · n = dim of an action · x (N, d) as the environment gives it, y (N, n) in [-1, 1]^n
"""

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlamort.agent import Agent, Player
from rlamort.config import Fixed, Part, locate, resolve
from rlamort.config.imports import divided, module_of
from rlamort.env import Env
from rlamort.errors import UserError
from rlamort.run.recorded import Recorded, from_minari, from_npz
from rlamort.run.restore import load
from rlamort.source.base import Tree

TIMED = 7  # decisions, whose median is the expert's latency
KEYWORDS = ("state", "episode_start", "deterministic")  # of Stable-Baselines3's `predict`


class Advice(Protocol):
    """An expert that plays in N environments: x -> y, and what it remembers of each."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def begin(self, begins: np.ndarray) -> None: ...  # (N,) bool: where an episode begins
    def state(self) -> Tree: ...
    def restore(self, state: Tree) -> None: ...


@dataclass(frozen=True)
class Expert(Part):
    """Whom a policy imitates: one who is asked for labels, or a data set of them."""

    @classmethod
    def named(cls, name: str, key: str) -> "Expert":
        """As of any part; or by what it is: a run or a saved agent, sb3:FILE.zip, FILE.npz, minari:ID, module:object."""
        if name.startswith("minari:"):
            return Minari(name.removeprefix("minari:"))
        if name.endswith(".npz") and not name.startswith("sb3:"):
            return Arrays(name)
        if name.startswith("sb3:") or (name not in cls.names() and Path(name).is_dir()):
            return Trained(name)
        if ":" in name and not _is_part(name, key):
            return Own(name)
        if name not in cls.names() and ("/" in name or not divided(name)[0]):
            raise UserError(
                f"{key}={name}: it is no folder of a run, and none of {', '.join(cls.presets)}, sb3:FILE.zip, FILE.npz, "
                "minari:ID and module:object with `predict`"
            )
        return super().named(name, key)

    @property
    def name(self) -> str:
        """For messages."""
        return f"expert={self.label()}"

    def advice(self, env: Env) -> Advice:
        """The expert in all environments of `env`, at the beginning of their episodes.

        Raises:
            UserError: it cannot be asked, or was made for other spaces.
        """
        raise UserError(
            f"{self.name}: it is a data set, which knows no labels for states that are met; one who can be asked is needed"
        )

    def recorded(self, env: Env) -> Recorded | None:
        """The labels of a data set; None of an expert who is asked.

        Raises:
            UserError: it does not fit the environment.
        """
        return None


def _is_part(name: str, key: str) -> bool:
    found = getattr(module_of(name, key), divided(name)[1], None)
    return isinstance(found, type) and issubclass(found, Expert)


@dataclass(frozen=True)
class Trained(Expert):
    """An agent from a file.

    Args:
        path: of a run directory or a saved agent; or sb3:FILE.zip, of Stable-Baselines3's.
    """

    path: Fixed[str] = ""

    @property
    def name(self) -> str:
        return f"expert={self.path}"

    def advice(self, env: Env) -> "Asked":
        try:
            learner = load(self.path)
        except UserError as error:  # it names a file, of which there may be several in a command
            raise UserError(f"{self.name}: {error}") from error
        learner.agent.spec.require(env.spec, f"{self.name}, in env={env.name}")
        if learner.environments.saved is not None:  # of wrappers whose statistics are part of what it has learned
            env.take(learner.environments.saved, frozen=True)
        return Asked(self.name, learner.agent, env)


@dataclass(frozen=True)
class Planner(Expert):
    """A method that plays well without training, such as a planner with known dynamics.

    Args:
        method: its name.
        keys: its keys that differ from their defaults, e.g. expert.keys.horizon=30.
    """

    method: Fixed[str] = "mpc"
    keys: Fixed[dict[str, Any] | None] = None

    @property
    def name(self) -> str:
        return f"expert={self.method}"

    def advice(self, env: Env) -> "Asked":
        config = resolve(self.method, dict(self.keys or {}))
        kind = locate(config.row["agent"])
        return Asked(self.name, kind(env.spec, **config.keywords(kind)), env)


@dataclass(frozen=True)
class Own(Expert):
    """An object of a user's own with `predict`, in the environment's units.

    Its signature is Stable-Baselines3's, `predict(observation, state, episode_start, deterministic) -> action, state`, of
    which it may leave out all but the observations (N, ...), and return the actions (N, ...) alone.

    Args:
        path: module:name, of the object, or of a class or function that makes it.
    """

    path: Fixed[str] = ""

    @property
    def name(self) -> str:
        return f"expert={self.path}"

    def advice(self, env: Env) -> "Predicting":
        module, (_, attribute) = module_of(self.path, "expert"), divided(self.path)
        found = getattr(module, attribute, None)
        if not hasattr(found, "predict") or isinstance(found, type):
            found = found() if callable(found) else None
        predict = getattr(found, "predict", None)
        if not callable(predict):
            raise UserError(f"{self.name}: an object with `predict`, or a class or function that makes one, is needed")
        return Predicting(self.name, predict, env)


@dataclass(frozen=True)
class Arrays(Expert):
    """Arrays of a .npz file, in the environment's units: see `rlamort.run.recorded.from_npz`.

    Args:
        path: of the file.
    """

    path: Fixed[str] = ""

    @property
    def name(self) -> str:
        return f"expert={self.path}"

    def recorded(self, env: Env) -> Recorded:
        return from_npz(Path(self.path), self.name, env.spec)


@dataclass(frozen=True)
class Minari(Expert):
    """A data set on this machine, read by Minari: pip install 'rlamort[minari]'.

    Args:
        id: of the data set, under MINARI_DATASETS_PATH.
    """

    id: Fixed[str] = ""

    @property
    def name(self) -> str:
        return f"expert=minari:{self.id}"

    def recorded(self, env: Env) -> Recorded:
        return from_minari(self.id, self.name, env.spec)


Expert.presets = {"planner": Planner()}


class Asked:
    """One of our agents, asked for what it would do without exploring.

    Args:
        name: for messages.
        agent: who is asked.
        env: where.
    """

    def __init__(self, name: str, agent: Agent, env: Env) -> None:
        self.name, self.agent = name, agent.to(env.device).requires_grad_(False)
        self.player = Player(self.agent, env.count)

    def __call__(self, x: Tensor) -> Tensor:
        return finite(self.name, self.player(x, explore=False))

    def begin(self, begins: np.ndarray) -> None:
        self.player.begin(begins)

    def state(self) -> Tree:
        return {"h": list(self.player.h)}

    def restore(self, state: Tree) -> None:
        carry = tuple(part.to(self.agent.device) for part in state["h"])
        self.player = Player(self.agent, self.player.count, carry)


class Predicting:
    """A user's `predict`.

    Args:
        name: for messages.
        predict: the function.
        env: where it is asked.
    """

    def __init__(self, name: str, predict: Callable[..., Any], env: Env) -> None:
        self.name, self.predict, self.spec = name, predict, env.spec
        taken = inspect.signature(predict).parameters.values()
        every = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken)
        self.keywords = [name for name in KEYWORDS if every or name in {one.name for one in taken}]
        self.remembered: Any = None
        self.begins = np.ones(env.count, dtype=bool)

    def __call__(self, x: Tensor) -> Tensor:
        space = self.spec.observation
        observation = x.numpy(force=True).reshape(-1, *space.shape).astype(space.dtype)
        every = {"state": self.remembered, "episode_start": self.begins, "deterministic": True}
        found = self.predict(observation, **{name: every[name] for name in self.keywords})
        action, self.remembered = found if isinstance(found, tuple) else (found, None)
        self.begins = np.zeros_like(self.begins)
        return finite(self.name, torch.from_numpy(self.spec.units.encode(self._checked(np.asarray(action)))).to(x))

    def _checked(self, action: np.ndarray) -> np.ndarray:
        space, units = self.spec.action, self.spec.units
        shape = (len(self.begins), *space.shape)
        if action.dtype.kind != "f" or action.shape != shape:
            raise UserError(
                f"{self.name}: it predicts {action.dtype} of shape {action.shape}; floats of shape {shape} in {space} are "
                "needed"
            )
        held = units.decode(units.encode(action).astype(np.float64))
        if (far := np.abs(action - held).max(initial=0, where=np.isfinite(action))) > 1e-4 * max(1, np.abs(held).max()):
            raise UserError(
                f"{self.name}: its actions, between {action.min():g} and {action.max():g}, lie outside {space}, by up to "
                f"{far:.3g}"
            )
        return action

    def begin(self, begins: np.ndarray) -> None:
        self.begins = self.begins | begins

    def state(self) -> Tree:
        kept = self.remembered
        if not (kept is None or (isinstance(kept, tuple | list) and all(isinstance(one, np.ndarray) for one in kept))):
            raise UserError(f"{self.name}: its state is a {type(kept).__name__}; a tuple of arrays, or None, is needed")
        return {"remembered": None if kept is None else list(kept), "begins": self.begins}

    def restore(self, state: Tree) -> None:
        self.remembered = None if state["remembered"] is None else tuple(state["remembered"])
        self.begins = state["begins"].astype(bool)


def finite(name: str, y: Tensor) -> Tensor:
    """Labels y (N, n). Raises UserError if they are not finite."""
    if not y.isfinite().all():
        raise UserError(f"{name}: its label is {y[~y.isfinite().all(-1)][0].tolist()}; finite numbers are needed")
    return y


def latency(advice: Advice, x: Tensor) -> float:
    """The median seconds of a decision for contexts x (N, d); random generators and what it remembers are as before."""
    seconds, before = [], advice.state()
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        for _ in range(TIMED):
            started = time.perf_counter()
            advice(x).numpy(force=True)  # a GPU's answer is waited for
            seconds.append(time.perf_counter() - started)
    advice.restore(before)
    return statistics.median(seconds)
