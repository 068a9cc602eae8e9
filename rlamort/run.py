"""A run: a method built for an environment, trained, measured, saved."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import yaml
from gymnasium.vector import VectorEnv

from rlamort import checkpoint
from rlamort.agent import Agent
from rlamort.config import Config, locate, resolve, short_name
from rlamort.env import Spec
from rlamort.envs.gym import GymEnv, name_of, open_env
from rlamort.errors import UserError
from rlamort.score import Score, score
from rlamort.track import Records, Several, Tracker
from rlamort.train import Clock, Schedule, Update, captured, measure

COMPILE_FROM = 15_000  # updates: below, compiling costs more time than it saves


class Randomness:
    """A stream of torch's global generator of its own, so that what runs beside a learner neither moves it nor is moved."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(seed)
            self.states = self._read()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                self.states = self._read()

    def _read(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]


class Directory:
    """A run's files: config.yaml, versions.json, metrics.jsonl, agent/, plots/, videos/.

    Args:
        path: a folder that must not exist yet.

    Raises:
        UserError: it exists, or cannot be made.
    """

    def __init__(self, path: Path, config: Config) -> None:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"dir={path}: it exists already; give a new one, or leave dir out to have one made") from None
        except OSError as error:
            raise UserError(f"dir={path}: it cannot be made: {error.strerror}") from error
        self.path = path
        facts = {"method": config.method, "row": config.row, **config.values}
        (path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(facts)), sort_keys=False))
        (path / "versions.json").write_text(json.dumps(checkpoint.versions(), indent=2) + "\n")
        self.records = Records(path / "metrics.jsonl")


def new_path(config: Config) -> Path:
    """A name under runs/ that says what it is: method, environment, seed, time."""
    env = "".join(c if c.isalnum() or c in "-." else "_" for c in str(config.values["env"]))
    method = short_name(config.method).replace("/", "-")
    name = f"{method}-{env}-s{config.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(path for path in (Path("runs") / c for c in candidates) if not path.exists())


class Learner:
    """A method on an environment, with Stable-Baselines3's four verbs: learn, predict, save, load.

    Args:
        env: Gymnasium id, `module:Class`, class, instance, or `gymnasium.vector` environment.
        eval_env: where it is evaluated, as `env`; None makes another of the same kind.
        fields: the keys that `rlamort train METHOD --help` lists, as keywords. With `dir`, what happens is recorded there
            and the agent is evaluated on the way; without, nothing is written.

    Raises:
        UserError: a key that does not exist, a value that it cannot have, an environment that does not fit.
    """

    method: ClassVar[str]
    directory: Directory | None = None

    def __init__(self, env: Any, *, eval_env: Any = None, **fields: Any) -> None:
        self._settle(resolve(self.method, {**fields, "env": name_of(env)}), env, eval_env)
        spec = self.source.env.spec
        with self.randomness():
            self.agent = self._new_agent(spec)
        given = self.config.run.dir
        self.directory = Directory(Path(given), self.config) if given else None

    def _settle(self, config: Config, env: Any, eval_env: Any) -> None:
        self.config, self._env_given = config, env
        self._eval_given = _kind_of(env) if eval_env is None else eval_env
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.device = device_of(config.run.device)
        self.randomness = Randomness(config.run.seed, self.device)
        self.clock = Clock()
        self._source: Any = None
        self._evaluation: GymEnv | None = None
        self._captured: Update | None = None

    def _new_agent(self, spec: Spec) -> Agent:
        kind = locate(self.config.row["agent"])
        agent: Agent = kind(spec, **self.config.keywords(kind)).to(self.device)
        return agent

    def _open_env(self, env: Any, count: int, vectorization: str = "sync") -> GymEnv:
        run = self.config.run
        return open_env(
            env, count=count, env_kwargs=run.env_kwargs, vectorization=vectorization,
            max_episode_steps=run.max_episode_steps, device=self.device,
        )  # fmt: skip

    @property
    def source(self) -> Any:
        """p(x): opened, with its environment checked, when it is first needed."""
        if self._source is None:
            run = self.config.run
            env = self._open_env(self._env_given, run.num_envs, run.vectorization)
            env.reset(run.seed)
            kind = locate(self.config.row["source"])
            self._source = kind(env, **self.config.keywords(kind))
        return self._source

    def _evaluation_env(self, episodes: int) -> GymEnv:
        if self._evaluation is None or self._evaluation.count != episodes:
            self._evaluation = self._open_env(self._eval_given, episodes)
        return self._evaluation

    def score(self, episodes: int | None = None) -> Score:
        """Play evaluation episodes: fixed seeds, deterministic actions, environments of their own."""
        return score(self.agent, self._evaluation_env(episodes or self.config.run.eval_episodes))

    def close(self) -> None:
        """Give back what the environments hold, worker processes among it."""
        for env in (self._source.env if self._source else None, self._evaluation):
            if env is not None:
                env.close()

    def learn(self, total_timesteps: int, *, reset_num_timesteps: bool = True, trackers: Sequence[Tracker] = ()) -> Self:
        """Train for `total_timesteps` more environment steps.

        Args:
            total_timesteps: environment steps, over all environments.
            reset_num_timesteps: count steps in records from zero again; what was learned and stored stays either way.
            trackers: take losses, returns and evaluations; without one, and without `dir`, there are no evaluations.
        """
        run, source = self.config.run, self.source
        if reset_num_timesteps:
            self.clock = Clock(updates=self.clock.updates)
        schedule = Schedule(
            total_timesteps, run.warmup_steps, run.warmup_steps if run.update_after is None else run.update_after,
            run.utd, run.batch_size, run.eval_every, run.log_every,
        )  # fmt: skip
        takers = [*([self.directory.records] if self.directory else []), *trackers]
        scorer = None
        if takers:
            evaluation = self._evaluation_env(run.eval_episodes)  # now, so that one that cannot be made stops nothing later
            scorer = functools.partial(score, env=evaluation)
        tracker = Several(takers)
        update = self._update(total_timesteps * run.utd)
        with self.randomness():
            locate(self.config.row["train"])(self.agent, source, scorer, schedule, tracker, self.clock, update)
            if scorer is not None and self.clock.scored != self.clock.env_step:
                measure(self.agent, scorer, tracker, self.clock)
        return self

    def _update(self, planned: int) -> Update:
        wanted = self.config.run.compile
        if self._captured is None and (wanted is True or (wanted == "auto" and planned >= COMPILE_FROM)):
            self._captured = captured(self.agent)
        return self._captured or self.agent.update

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """As `rlamort.agent.Agent.predict`."""
        with self.randomness():
            return self.agent.predict(observation, state, episode_start, deterministic)

    def save(self, path: str | Path) -> None:
        """Write networks, targets, optimisers and normaliser to the folder `path`, as safetensors and JSON."""
        facts = {
            "method": self.config.method,
            "values": self.config.values,
            "spec": self.agent.spec._asdict(),
            "clock": dataclasses.asdict(self.clock),
            "versions": checkpoint.versions(),
        }
        checkpoint.save(Path(path), self.agent.state_dict(), facts)

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Self:
        """The agent that `save` wrote; the folder of a run counts as that of its agent.

        Args:
            path: the folder.
            env: to learn on; None takes the one it was trained on, opened when it is needed.

        Raises:
            UserError: there is none, or its parts do not fit each other, or another method's.
        """
        path = Path(path)
        saved = checkpoint.open_saved(path / "agent" if (path / "agent").is_dir() else path)
        try:
            method, values, clock = saved.facts["method"], saved.facts["values"], Clock(**saved.facts["clock"])
            spec = Spec(**saved.facts["spec"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{saved.path}: its description lacks {error}") from error
        if method != cls.method:
            raise UserError(f"{saved.path}: it holds an agent of {method}, not of {cls.method}; rlamort.load takes any")
        learner = cls.__new__(cls)
        config = resolve(method, {**values, "dir": None})
        learner._settle(config, values["env"] if env is None else env, None)
        with learner.randomness():
            learner.agent = learner._new_agent(spec)
        saved.fill(learner.agent)
        learner.clock = clock
        return learner


def load(path: str | Path, env: Any = None) -> Learner:
    """A saved agent of any method, as `Learner.load`."""
    path = Path(path)
    saved = checkpoint.open_saved(path / "agent" if (path / "agent").is_dir() else path)
    return learner_class(str(saved.facts.get("method"))).load(path, env)


def _kind_of(env: Any) -> Any:
    """What evaluation environments are made from: those of a vector environment are single ones of its kind."""
    if isinstance(env, VectorEnv) and env.spec is not None:
        return env.spec.id
    return env


def learner_class(name: str) -> type[Learner]:
    """The `Learner` of one method."""
    return type(short_name(name).upper().replace("/", "_"), (Learner,), {"method": name})


def device_of(name: str) -> torch.device:
    """Raises UserError where it is asked for and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: auto, cpu, cuda or cuda:N is needed") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu or device=auto")
    return device
