"""The training and evaluation environments of a run, which are always separate."""

import contextlib
import warnings
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from rlamort.config import Config, locate, opening
from rlamort.env import Env, Spec
from rlamort.env.copies import Copies
from rlamort.env.make import copies_of, require_spaces
from rlamort.env.record import name_of, recorded
from rlamort.env.snapshot import layers, learned
from rlamort.errors import UserError
from rlamort.host.machine import default_dtype
from rlamort.host.plain import plain
from rlamort.problem import Problem

KEYS = ("env", "eval_env")
INSTANCES = (gymnasium.Env, VectorEnv)  # instances, which users construct themselves
TWICE = {"normalise": "NormalizeObservation", "reward_scale": "NormalizeReward"}  # keys, and wrappers that do the same


class Environments:
    """Opens them when they are first needed. Evaluation uses the training environment's running statistics, frozen.

    Args:
        config: the run's configuration.
        device: of their tensors.
        env: the training environment, of any accepted kind; None takes the configuration's.
        eval_env: the evaluation environment, likewise; without either, another one like `env`.
        unnamed: by key, why an environment cannot be constructed by the configuration's name.

    Raises:
        UserError: both are the same environment, or a key does not apply to a vector environment.

    Attributes:
        spec: the agent's, once it is built.
        saved: running statistics of wrappers from a file, for the training environment.
    """

    def __init__(self, config: Config, device: torch.device, env: Any, eval_env: Any, unnamed: dict[str, str]) -> None:
        self.config, self.device, self.unnamed = config, device, unnamed
        self._envs = {"env": env, "eval_env": eval_env}
        self.spec: Spec | None = None
        self.saved: dict[str, Any] | None = None
        self._training: Env | None = None
        self._evaluation: Env | None = None
        self._copies: Copies | None = None
        if _innermost(env) & _innermost(eval_env):
            raise UserError("eval_env: it is the training environment, which evaluations would disturb; pass another one")

    def find(self, key: str) -> Any:
        """The environment passed as `key`, or its name; None if there is neither.

        Raises:
            UserError: it cannot be constructed by that name.
        """
        if self._envs[key] is None and key in self.unnamed:
            raise UserError(f"{key}: {self.unnamed[key]}, so it cannot be constructed by name; pass {key}=...")
        return self.config.values[key] if self._envs[key] is None else self._envs[key]

    def _env(self) -> Any:
        found = self.find("env")
        if found is None:
            raise UserError(
                "env: None is given, or this agent was loaded without one; pass one to load, for training and evaluation"
            )
        return found

    def require_second(self, must: bool) -> None:
        """Test whether a second environment like the training one can be made; an error if it `must`, else a warning."""
        if self._envs["eval_env"] is None and isinstance(self._envs["env"], INSTANCES):
            try:
                self._copies = copies_of(self._envs["env"], self.config.run.reset_options)
            except UserError as error:
                if must:
                    raise
                warnings.warn(str(error), stacklevel=4)
        if self._copies is not None and _keeps_to_itself(self._copies):
            warnings.warn(
                f"env={name_of(self._envs['env'])}: running statistics of wrappers in its worker processes are not visible to "
                "evaluations and saved agents; pass a function that makes one environment, with num_envs and "
                "vectorization=async, or use normalise=true instead of these wrappers",
                stacklevel=4,
            )

    def require_spaces(self) -> None:
        """Open the environments that were passed, and raise UserError if their spaces differ from the agent's."""
        if self._envs["env"] is not None:
            self._match(self.training, "env")
        if self._envs["eval_env"] is not None:
            self.evaluation(1)

    @property
    def training(self) -> Env:
        """The training environment."""
        if self._training is None:
            run, env = self.config.run, self._env()
            self._training = self._open(env, run.num_envs, run.vectorization, run.num_workers)
            self._refuse_twice(self._training)
            if self.saved is not None:
                self._training.take(self.saved, frozen=False)
            observation = self._training.spec.observation
            if observation.dtype == "uint8" and len(observation.shape) > 1:
                warnings.warn(
                    f"env={name_of(env)}: its observations are images, {observation}; networks here see them flattened, as "
                    f"{observation.dim} numbers up to 255; normalise=true scales them",
                    stacklevel=4,
                )
        return self._training

    def another(self, count: int) -> Env:
        """Environments like the training one, `count` of them, or for a vector environment as many as it has."""
        env = self._env()
        if isinstance(env, INSTANCES):
            self._copies = self._copies or copies_of(env, self.config.run.reset_options)
            env = self._copies() if isinstance(env, VectorEnv) else self._copies
        elif self.spec is not None and self.spec.problem is not None:
            env = self.spec.problem  # what is learned with the solver is shared
        return self._frozen(self._open(env, count).held_out(), "env")

    def evaluation(self, episodes: int) -> Env:
        """The evaluation environment for so many episodes, side by side where possible."""
        env, before = self.find("eval_env"), self._evaluation
        if env is not None:
            rows = 1 if isinstance(env, gymnasium.Env) else episodes
            if before is None or (before.count != rows and not isinstance(env, VectorEnv)):
                self._evaluation = self._frozen(self._open(env, rows, own=False).held_out(), "eval_env")
        elif before is None or before.count != episodes or self._copies is not None:  # of what can be changed, a fresh copy
            self._evaluation = self.another(episodes)
        if before is not None and before is not self._evaluation:
            before.close()
        assert self._evaluation is not None
        return self._frozen(self._evaluation, "eval_env" if env is not None else "env")

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """A context in which other environments may be opened and stepped without affecting the training one."""
        return contextlib.nullcontext() if self._training is None else self._training.undisturbed()

    def statistics(self) -> dict[str, Any] | None:
        """Running statistics of the training environment's wrappers."""
        return self.saved if self._training is None else self._training.statistics()

    def close(self) -> None:
        """Release their resources, worker processes included."""
        for env in (self._training, self._evaluation):
            if env is not None:
                env.close()

    def _open(self, env: Any, count: int, vectorization: str = "sync", workers: int | None = None, own: bool = True) -> Env:
        """`own` for the training environment and others like it, which take the constructor's keywords."""
        run, vector = self.config.run, isinstance(env, VectorEnv)
        with default_dtype(run.dtype):
            opened: Env = locate(self.config.row["opens"])(
                env, count=count, vectorization=vectorization, workers=workers,
                env_kwargs=run.env_kwargs if own and not isinstance(env, (*INSTANCES, Copies, Problem)) else None,
                max_episode_steps=None if vector else run.max_episode_steps,
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

    def _refuse_twice(self, env: Env) -> None:
        """Raises UserError where a key is to normalise what a wrapper normalises already."""
        found = env.statistics() or {"around": {"layers": {}}, "rows": []}
        wrappers = {kind.partition(":")[2] for one in (found["around"], *found["rows"]) for kind in one["layers"]}
        for key, wrapper in TWICE.items():
            value = self.config.plain().get(key)
            if value not in (None, False, "none") and wrapper in wrappers:
                raise UserError(f"{key}={value} and a wrapper {wrapper} of {env.name}: both normalise the same; one is needed")

    def _match(self, env: Env, key: str) -> None:
        if self.spec is not None:
            self.spec.require(env.spec, f"{key}={env.name}")


def environment_values(env: Any, eval_env: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration's values for environments that are passed, and why one cannot be constructed by name, by key.

    Args:
        env: for training.
        eval_env: for evaluation.
        fields: other keys.

    Raises:
        UserError: a key does not apply to a vector environment, or an environment declares no spaces.
    """
    _refuse_idle(env, fields)
    for one in (env, eval_env):
        if isinstance(one, gymnasium.Env):
            require_spaces(one)
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
    """Raises UserError for a key that does not apply to an existing `env`."""
    late = ["env_kwargs"] if isinstance(env, INSTANCES) else []
    if isinstance(env, VectorEnv):
        late += ["max_episode_steps", "reset_options", "vectorization", "num_workers", "max_env_faults", "env_timeout"]
    for key in late:
        if fields.get(key) is not None:
            raise UserError(f"{key}={fields[key]}: {name_of(env)} is given, which is made already, so this comes too late")
    if isinstance(env, VectorEnv) and fields.get("num_envs", env.num_envs) != env.num_envs:
        raise UserError(f"num_envs={fields['num_envs']}: the vector environment that is given has {env.num_envs}")


def _keeps_to_itself(copies: Copies) -> bool:
    """Whether wrappers in its worker processes keep running statistics."""
    return isinstance(copies.env.unwrapped, AsyncVectorEnv) and bool(learned(layers(copies.first.unwrapped.envs[0]))["layers"])


def _innermost(env: Any) -> set[int]:
    """The ids of the innermost environments of an instance."""
    if not isinstance(env, INSTANCES):
        return set()
    return {id(env.unwrapped), *(id(row.unwrapped) for row in getattr(env.unwrapped, "envs", ()))}
