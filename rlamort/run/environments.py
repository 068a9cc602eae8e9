"""What a run is trained in and what it is evaluated in, which are never the same."""

import contextlib
import warnings
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from rlamort.config import Config, locate, opening
from rlamort.env import Env, Spec
from rlamort.env.copies import Copies
from rlamort.env.make import copies_of
from rlamort.env.record import name_of, recorded
from rlamort.env.snapshot import layers, learned
from rlamort.errors import UserError
from rlamort.host.plain import plain
from rlamort.problem import Problem

KEYS = ("env", "eval_env")
MADE = (gymnasium.Env, VectorEnv)  # what a user may have made already


class Environments:
    """Opens them when they are first needed. What layers of the first have learned about its numbers, the others have, frozen.

    Args:
        config: the run's.
        device: where their tensors live.
        env: what to train in, in any form that is accepted; None takes what the configuration names.
        eval_env: what to be evaluated in, likewise; where there is neither, others of the kind of `env`.
        unnamed: why the configuration's name for one of them does not make it again, by key.

    Raises:
        UserError: both are the same environment, or a key is given that a vector environment has no use for.

    Attributes:
        spec: what the agent was made for, once there is one.
        saved: statistics of layers that were saved, for the environment to go on with.
    """

    def __init__(self, config: Config, device: torch.device, env: Any, eval_env: Any, unnamed: dict[str, str]) -> None:
        self.config, self.device, self.unnamed = config, device, unnamed
        self._given = {"env": env, "eval_env": eval_env}
        self.spec: Spec | None = None
        self.saved: dict[str, Any] | None = None
        self._training: Env | None = None
        self._evaluation: Env | None = None
        self._copies: Copies | None = None
        if _innermost(env) & _innermost(eval_env):
            raise UserError("eval_env: it is the environment that is trained in, which evaluations would disturb; give another")

    def find(self, key: str) -> Any:
        """What was given as `key`, or its name; None where there is neither.

        Raises:
            UserError: the name does not make it again.
        """
        if self._given[key] is None and key in self.unnamed:
            raise UserError(f"{key}: {self.unnamed[key]}, so it cannot be made again by name; give {key}=...")
        return self.config.values[key] if self._given[key] is None else self._given[key]

    def _env(self) -> Any:
        found = self.find("env")
        if found is None:
            raise UserError("env: this agent was loaded without one; give load an env to learn or to be evaluated in")
        return found

    def require_second(self, must: bool) -> None:
        """Find out whether another one can be made of what is trained in; an error where it `must`, else a warning."""
        if self._given["eval_env"] is None and isinstance(self._given["env"], MADE):
            try:
                self._copies = copies_of(self._given["env"], self.config.run.reset_options)
            except UserError as error:
                if must:
                    raise
                warnings.warn(str(error), stacklevel=4)
        if self._copies is not None and _keeps_to_itself(self._copies):
            warnings.warn(
                f"env={name_of(self._given['env'])}: wrappers in its worker processes may keep statistics, which evaluations "
                "and saved agents cannot have; give what makes one environment, with num_envs and vectorization=async, or take "
                "normalise=true instead of these wrappers",
                stacklevel=4,
            )

    def require_spaces(self) -> None:
        """Open what was given, to say now whether its spaces are not those that the agent was made for."""
        if self._given["env"] is not None:
            self._match(self.training, "env")
        if self._given["eval_env"] is not None:
            self.evaluation(1)

    @property
    def training(self) -> Env:
        """What to train in."""
        if self._training is None:
            run, given = self.config.run, self._env()
            self._training = self._open(given, run.num_envs, run.vectorization)
            if self.saved is not None:
                self._training.take(self.saved, frozen=False)
            observation = self._training.spec.observation
            if observation.dtype == "uint8" and len(observation.shape) > 1:
                warnings.warn(
                    f"env={name_of(given)}: its observations are images, {observation}; networks here see them flattened, as "
                    f"{observation.dim} numbers up to 255; normalise=true scales them",
                    stacklevel=4,
                )
        return self._training

    def another(self, count: int) -> Env:
        """Others of the kind of what is trained in, `count` of them or, of a vector environment, as many as it has."""
        given = self._env()
        if isinstance(given, MADE):
            self._copies = self._copies or copies_of(given, self.config.run.reset_options)
            given = self._copies() if isinstance(given, VectorEnv) else self._copies
        elif self.spec is not None and self.spec.problem is not None:
            given = self.spec.problem  # what is learned with the solver is shared
        return self._frozen(self._open(given, count).held_out(), "env")

    def evaluation(self, episodes: int) -> Env:
        """Where so many episodes are to be played, as many side by side as it has rows."""
        given, before = self.find("eval_env"), self._evaluation
        if given is not None:
            rows = 1 if isinstance(given, gymnasium.Env) else episodes
            if before is None or (before.count != rows and not isinstance(given, VectorEnv)):
                self._evaluation = self._frozen(self._open(given, rows, own=False).held_out(), "eval_env")
        elif before is None or before.count != episodes or self._copies is not None:  # of what can be changed, a fresh copy
            self._evaluation = self.another(episodes)
        if before is not None and before is not self._evaluation:
            before.close()
        assert self._evaluation is not None
        return self._frozen(self._evaluation, "eval_env" if given is not None else "env")

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """While others are opened and play: nothing of it shows in what is trained in."""
        return contextlib.nullcontext() if self._training is None else self._training.undisturbed()

    def statistics(self) -> dict[str, Any] | None:
        """What layers of the environment have learned about its numbers."""
        return self.saved if self._training is None else self._training.statistics()

    def close(self) -> None:
        """Give back what they hold, worker processes among it."""
        for env in (self._training, self._evaluation):
            if env is not None:
                env.close()

    def _open(self, env: Any, count: int, vectorization: str = "sync", own: bool = True) -> Env:
        """`own` where it is what is trained in, or its like, which keywords of the constructor are for."""
        run, vector = self.config.run, isinstance(env, VectorEnv)
        opened: Env = locate(self.config.row["opens"])(
            env, count=count, env_kwargs=run.env_kwargs if own and not isinstance(env, (*MADE, Copies, Problem)) else None,
            vectorization=vectorization, max_episode_steps=None if vector else run.max_episode_steps,
            max_faults=run.max_env_faults, timeout=run.env_timeout, reset_options=None if vector else run.reset_options,
            device=self.device, **opening(self.config),
        )  # fmt: skip
        return opened

    def _frozen(self, env: Env, key: str) -> Env:
        self._match(env, key)
        statistics = self.statistics()
        if statistics is not None:
            env.take(statistics, frozen=True)
        return env

    def _match(self, env: Env, key: str) -> None:
        if self.spec is not None:
            self.spec.require(env.spec, f"{key}={env.name}")


def told(env: Any, eval_env: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a configuration says of environments that are given: values by key, and why a name of one does not make it again.

    Args:
        env: to train in.
        eval_env: to be evaluated in.
        fields: other keys that are given.

    Raises:
        UserError: a key is given that a vector environment has no use for.
    """
    _refuse_idle(env, fields)
    ours = recorded(env, fields.get("env_kwargs"), fields.get("max_episode_steps"))
    theirs = recorded(eval_env, None, None)
    values: dict[str, Any] = {"env": ours.name, "eval_env": theirs.name}
    if env is not None:
        values |= {"env_kwargs": ours.env_kwargs, "max_episode_steps": ours.max_episode_steps}
    if isinstance(env, VectorEnv):
        values["num_envs"] = env.num_envs
    unnamed = {key: one.unnamed for key, one in (("env", ours), ("eval_env", theirs)) if one.unnamed}
    try:
        plain(ours.env_kwargs)
    except TypeError as error:
        unnamed.setdefault("env", f"env_kwargs{error} is given, which no file holds")
    try:
        plain(fields.get("reset_options"))
    except TypeError as error:
        raise UserError(f"reset_options{error} is given; numbers, text, arrays, lists and dicts are needed") from error
    return values, unnamed


def _refuse_idle(env: Any, fields: dict[str, Any]) -> None:
    """Raises UserError for a key that `env`, which is made already, has no use for."""
    late = ["env_kwargs"] if isinstance(env, MADE) else []
    if isinstance(env, VectorEnv):
        late += ["max_episode_steps", "reset_options", "vectorization", "max_env_faults", "env_timeout"]
    for key in late:
        if fields.get(key) is not None:
            raise UserError(f"{key}={fields[key]}: {name_of(env)} is given, which is made already, so this comes too late")
    if isinstance(env, VectorEnv) and fields.get("num_envs", env.num_envs) != env.num_envs:
        raise UserError(f"num_envs={fields['num_envs']}: the vector environment that is given has {env.num_envs}")


def _keeps_to_itself(copies: Copies) -> bool:
    """Whether it has worker processes of its own in which wrappers learn."""
    return isinstance(copies.env.unwrapped, AsyncVectorEnv) and bool(learned(layers(copies.first.unwrapped.envs[0]))["layers"])


def _innermost(env: Any) -> set[int]:
    """The environments, by identity, that an instance plays in the end."""
    if not isinstance(env, MADE):
        return set()
    return {id(env.unwrapped), *(id(row.unwrapped) for row in getattr(env.unwrapped, "envs", ()))}
