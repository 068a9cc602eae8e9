"""A run: a method built for an environment, trained, measured, saved."""

import contextlib
import functools
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import yaml
from gymnasium.vector import VectorEnv

from rlamort import checkpoint
from rlamort.agent import Agent
from rlamort.capture import Captured, Eager
from rlamort.config import FIXED, FREE, Config, locate, methods, resolve, short_name
from rlamort.directory import Directory
from rlamort.env import Env, Episode, Spec
from rlamort.envs.make import name_of
from rlamort.errors import Diverged, Preempted, UserError
from rlamort.foreign import read_sb3
from rlamort.machine import cores, device_of, fast_products
from rlamort.mirror import Mirror, require
from rlamort.randomness import Randomness
from rlamort.resets import Resets
from rlamort.score import Score, score
from rlamort.track import Tracker
from rlamort.train import Clock, Journal, Schedule, Updates, crosses

COMPILE_FROM = 15_000  # updates: below, compiling costs more time than it saves


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
    closed = False

    def __init__(self, env: Any, *, eval_env: Any = None, **fields: Any) -> None:
        self._settle(resolve(self.method, {**fields, "env": name_of(env)}), env, eval_env)
        self._build(self.source.env.spec)
        given = self.config.run.dir
        self.directory = Directory(Path(given), self.config) if given else None
        if self.tracked and not given:
            raise UserError(f"track={', '.join(self.tracked)}: it copies the records of a run directory, so dir is needed too")

    def _build(self, spec: Spec) -> None:
        with self.randomness():
            self.agent: Agent = self._drawn(spec).to(self.device)

    def _drawn(self, spec: Spec) -> Agent:
        """An agent that has learned nothing yet."""
        kind = locate(self.config.row["agent"])
        drawn: Agent = kind(spec, **self.config.keywords(kind))
        return drawn

    def _settle(self, config: Config, env: Any, eval_env: Any) -> None:
        self.config, self._env_given = config, env
        self._eval_given = eval_env
        torch.set_num_threads(config.run.threads or min(torch.get_num_threads(), cores()))
        self.device = device_of(config.run.device)
        self.randomness = Randomness(config.run.seed, self.device)
        self.clock = Clock()
        self._source: Any = None
        self._evaluation: Env | None = None
        self.updates: Updates | None = None
        self._compiled: bool | None = None  # decided when updates begin, and kept by the run from then on
        self._kept = 0  # the env_step of the latest checkpoint
        self._kept_frames: np.ndarray | None = None
        self._mirrors: list[Mirror] = []
        self._final = 0  # bytes of records that no resume will write again
        track = (config.run.track,) if isinstance(config.run.track, str) else config.run.track
        self.tracked = [backend for backend in track if backend != "none"]
        for backend in self.tracked:
            require(backend)

    def _open_env(self, env: Any, count: int, vectorization: str = "sync") -> Env:
        run = self.config.run
        opened: Env = locate(self.config.row["opens"])(
            env, count=count, env_kwargs=run.env_kwargs, vectorization=vectorization,
            max_episode_steps=run.max_episode_steps, max_faults=run.max_env_faults, timeout=run.env_timeout,
            device=self.device,
        )  # fmt: skip
        return opened

    @property
    def source(self) -> Any:
        """p(x): opened, with its environment checked, when it is first needed."""
        if self._source is None:
            run = self.config.run
            if self._env_given is None:
                raise UserError("env: this agent was loaded without one; give load an env to learn or to be evaluated in")
            env = self._open_env(self._env_given, run.num_envs, run.vectorization)
            env.reset(run.seed)
            kind = locate(self.config.row["source"])
            self._source = kind(env, **self.config.keywords(kind))
        return self._source

    def _evaluation_env(self, episodes: int) -> Env:
        given = self._eval_given or self.agent.spec.problem or _kind_of(self._env_given)  # a problem's learned part is shared
        if given is None:
            raise UserError("env: this agent was loaded without one; give load an env to learn or to be evaluated in")
        if self._evaluation is None or self._evaluation.count != episodes:
            self._evaluation = self._open_env(given, episodes).held_out()
        return self._evaluation

    def score(self, episodes: int | None = None) -> Score:
        """Play evaluation episodes: fixed seeds, deterministic actions, environments of their own."""
        with fast_products():  # as evaluations while it learns
            return score(self.agent, self._evaluation_env(episodes or self.config.run.eval_episodes))

    def close(self) -> None:
        """Give back what the environments hold, worker processes among it."""
        for env in (self._source.env if self._source else None, self._evaluation):
            if env is not None:
                env.close()
        for mirror in self._mirrors:
            mirror.close(self._final)
        if self.directory is not None:
            self.directory.close()
        self.closed = True

    def learn(
        self,
        total_timesteps: int,
        *,
        reset_num_timesteps: bool = True,
        trackers: Sequence[Tracker] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Train for `total_timesteps` more environment steps.

        Args:
            total_timesteps: environment steps, over all environments.
            reset_num_timesteps: count steps in records from zero again; what was learned and stored stays either way.
            trackers: take losses, returns and evaluations; without one, and without `dir`, there are no evaluations.
            stop: asked after every step; when it says so, the run saves itself and `Preempted` is raised.
        """
        run, source = self.config.run, self.source
        if reset_num_timesteps and self.clock.env_step and self.directory is not None:
            raise UserError("reset_num_timesteps: steps in a run directory count on; reset_num_timesteps=False is needed")
        if reset_num_timesteps:
            self.clock = Clock(updates=self.clock.updates, y=self.clock.y)
        schedule = Schedule(
            total_timesteps, run.warmup_steps, run.warmup_steps if run.update_after is None else run.update_after,
            run.utd, run.batch_size, run.eval_every, run.log_every,
        )  # fmt: skip
        if self.directory is not None and not self._mirrors:
            self._mirrors = [Mirror(self.directory.path, backend, run.track_timeout) for backend in self.tracked]
        takers = [*([self.directory.records] if self.directory else []), *trackers]
        scorer = None
        if takers:
            evaluation = self._evaluation_env(run.eval_episodes)  # now, so that one that cannot be made stops nothing later
            scorer = functools.partial(score, env=evaluation)
        journal = Journal(takers, scorer, functools.partial(self._keep, stop))
        with self.training():
            locate(self.config.row["train"])(
                self.agent, source, schedule, self.clock, self._prepared(total_timesteps * run.utd), journal
            )
            journal.measure(self.agent, self.clock)
            if self.directory is not None:
                self.save_checkpoint()
        return self

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """What holds while it learns: its own stream of random numbers, and the fastest matrix products."""
        with self.randomness(), fast_products():
            yield

    def _prepared(self, planned: int) -> Updates:
        if self._compiled is None:
            wanted = self.config.run.compile
            self._compiled = wanted is True or (wanted == "auto" and planned >= COMPILE_FROM)
        if self.updates is None:
            source, run = self.source, self.config.run
            self.updates = (Captured if self._compiled else Eager)(self.agent, lambda: source.sample(run.batch_size))
            if run.reset_every:
                fresh = functools.partial(self._drawn, self.agent.spec)
                self.updates = Resets(self.updates, self.agent, fresh, run.reset_every, lambda: self.clock.updates)
        return self.updates

    def _keep(self, stop: Callable[[], bool]) -> None:
        stopping = stop()
        if self.directory is not None:
            due = crosses(self._kept, self.clock.env_step, self.config.run.checkpoint_every)
            if stopping or due:
                self.save_checkpoint()
        if stopping:
            for mirror in self._mirrors:
                mirror.preempted()
            raise Preempted(f"stopped at step {self.clock.env_step:,}")

    def save_checkpoint(self) -> None:
        """Write everything that `resume` needs into the run directory. Storage that fails costs a warning, not the run."""
        assert self.directory is not None, "only a run with a directory has checkpoints"
        if not self.source.resumable:
            self._release()
            return
        self.check_finite()
        if self._kept_frames is not None and (self._kept, self._final) == (self.clock.env_step, self.directory.records.size()):
            return  # it is the newest already
        frames = self.source.frames_since(
            np.zeros_like(self.source.written) if self._kept_frames is None else self._kept_frames
        )
        try:
            self.directory.checkpoints.write(self.clock.env_step, self.agent.state_dict(), self._facts(), self._state(), frames)
        except OSError as error:
            free = shutil.disk_usage(self.directory.path).free
            warnings.warn(
                f"checkpoint at step {self.clock.env_step:,}: {error.strerror} ({free / 2**20:.0f} MiB are free there); "
                f"training goes on, and the one before is untouched",
                stacklevel=2,
            )
        else:
            self._kept, self._kept_frames = self.clock.env_step, frames["high"]
            self._release()

    def _release(self) -> None:
        """Records so far are final: those who follow the run may have them."""
        assert self.directory is not None
        self._final = self.directory.records.size()
        for mirror in self._mirrors:
            mirror.advance(self._final)

    def check_finite(self) -> None:
        """Raises Diverged where a parameter or an optimiser's state is no longer finite, so that none is ever saved."""
        for name, tensor in self.agent.state_dict().items():
            if not tensor.isfinite().all():
                raise Diverged(f"{name} is no longer finite at environment step {self.clock.env_step}: learning has diverged")

    def report_nan(self, error: Diverged) -> Path:
        """Write what is known of a divergence beside the run: losses, and the state of every tensor; the file."""
        assert self.directory is not None
        tensors = {
            name: {"finite": bool(t.isfinite().all()), "largest": float(t.abs().max()) if t.numel() else 0.0}
            for name, t in self.agent.state_dict().items()
        }
        file = self.directory.path / "nan_report" / f"step_{self.clock.env_step:012d}.json"
        file.parent.mkdir(exist_ok=True)
        losses = {name: float(value) for name, value in self.clock.metrics.items()}
        file.write_text(json.dumps({"error": str(error), "updates": self.clock.updates, "losses": losses, "tensors": tensors}))
        return file

    def _state(self) -> dict[str, Any]:
        assert self.directory is not None
        clock = self.clock
        return {
            "clock": {
                "env_step": clock.env_step, "updates": clock.updates, "seconds": clock.seconds, "scored": clock.scored,
                "metrics": clock.metrics, "episodes": [[e.total, e.length] for e in clock.episodes], "y": clock.y,
            },
            "source": self.source.state(),
            "torch": self.randomness.current(),
            "numpy": np.random.get_state(legacy=False),  # not ours, but an environment may draw from them
            "python": random.getstate(),
            "records": self.directory.records.size(),
            "compiled": self._compiled,
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _restore(self, loaded: checkpoint.Loaded) -> bool:
        """Everything as it was; False where only new episodes could be begun."""
        assert self.directory is not None
        state = loaded.state
        try:
            loaded.saved.fill(self.agent)
            clock = state["clock"]
            self.clock = Clock(
                clock["env_step"], clock["updates"], clock["seconds"], clock["scored"],
                clock["metrics"], [Episode(total, length) for total, length in clock["episodes"]],
            )  # fmt: skip
            exact: bool = self.source.restore(state["source"], loaded.frames())
            if exact and clock["y"] is not None:  # it was chosen for the contexts that stand now
                self.clock.y = clock["y"].to(self.device)
            self.randomness.states = state["torch"]
            np.random.set_state(state["numpy"])
            version, words, gauss = state["python"]
            random.setstate((version, tuple(words), gauss))
            self.directory.records.cut(state["records"])
            self._compiled = state["compiled"]
            torch.set_num_threads(state["threads"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, checkpoint.Damaged) as error:
            raise UserError(f"{loaded.saved.path}: it does not fit this run: {error}") from error
        self._kept, self._kept_frames = self.clock.env_step, self.source.written.copy()
        return exact

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """As `rlamort.agent.Agent.predict`."""
        with self.randomness():
            return self.agent.predict(observation, state, episode_start, deterministic)

    def save(self, path: str | Path) -> None:
        """Write networks, targets, optimisers and normaliser to the folder `path`, as safetensors and JSON."""
        checkpoint.save_agent(Path(path), self.agent.state_dict(), self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "method": self.config.method,
            "values": self.config.values,
            "spec": self.agent.spec.facts(),
            "env_step": self.clock.env_step,
            "updates": self.clock.updates,
            "versions": checkpoint.versions(),
        }

    @classmethod
    def load(cls, path: str | Path, env: Any = None, method: str | None = None) -> Self:
        """The agent that `save` wrote; the folder of a run counts as that of its agent.

        Args:
            path: the folder.
            env: to learn on; None takes the one it was trained on, opened when it is needed.
            method: the YAML file of a method of your own. What a saved agent says of such a file is not followed, since
                that would import what it names.

        Raises:
            UserError: there is none, or its parts do not fit each other, or another method's.
        """
        saved = _agent_in(Path(path))
        try:
            method, values = trusted(saved.facts["method"], method), saved.facts["values"]
            clock = Clock(saved.facts["env_step"], saved.facts["updates"])
            facts = dict(saved.facts["spec"])
            posed = facts.pop("problem", None)
            spec = Spec(**facts)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{saved.path}: its description lacks {error}") from error
        if method != cls.method:
            raise UserError(f"{saved.path}: it holds an agent of {method}, not of {cls.method}; rlamort.load takes any")
        learner = cls.__new__(cls)
        config = resolve(method, {**values, "dir": None})
        learner._settle(config, values["env"] if env is None else env, None)
        learner._build(learner.source.env.spec if posed else spec)  # a problem cannot be read from a file: it is opened
        saved.fill(learner.agent)
        learner.clock = clock
        return learner


def trusted(named: Any, given: str | None) -> str:
    """The method that a file names, if it is one of rlamort's; of another, only what the user gives is imported.

    Raises:
        UserError: the file names a method that is not rlamort's, and the user gives none.
    """
    if named in methods():
        return str(named)
    if given is None:
        raise UserError(f"method: {named} is not one of rlamort's; name its file yourself to have it imported (method=FILE)")
    return str(Path(given).resolve())


def load(path: str | Path, env: Any = None, method: str | None = None) -> Learner:
    """A saved agent of any method, as `Learner.load`; `sb3:FILE.zip` reads one that Stable-Baselines3 saved.

    Nothing in the file is executed: of a Stable-Baselines3 file, its tensors and plain JSON are read, never its pickles.
    """
    if str(path).startswith("sb3:"):
        return _from_sb3(Path(str(path).removeprefix("sb3:")), env)
    return learner_class(trusted(_agent_in(Path(path)).facts.get("method"), method)).load(path, env, method)


def _from_sb3(path: Path, env: Any) -> Learner:
    foreign = read_sb3(path)
    kind = learner_class(foreign.method)
    learner = kind.__new__(kind)
    learner._settle(resolve(foreign.method, {**foreign.values, "env": None if env is None else name_of(env)}), env, None)
    learner._build(foreign.spec)
    foreign.fill(learner.agent)
    return learner


def _agent_in(path: Path) -> checkpoint.Saved:
    """The agent in a folder, or in a run directory: the finished one, or that of the newest checkpoint."""
    if (path / "agent").is_dir():
        return checkpoint.open_saved(path / "agent")
    if (path / "ckpt").is_dir() and (loaded := checkpoint.Checkpoints(path / "ckpt").newest()) is not None:
        return loaded.saved
    return checkpoint.open_saved(path)


EXACT, EXCEPT_EPISODE, STATISTICAL = "exact", "exact but for the episode", "statistical"


def resume(path: Path, changes: dict[str, Any], method: str | None = None) -> tuple[Learner, str]:
    """A run as it was at its newest whole checkpoint, ready to `learn` on, and how exact that is.

    exact: it goes on bit for bit as if it had not been interrupted. Exact but for the episode: the environment cannot give its
    state, so the episode that was going on ends there, as a truncated one. Statistical: versions, device or settings differ.

    Args:
        path: the run directory.
        changes: values that are to differ from now on.
        method: as for `Learner.load`.

    Raises:
        UserError: it is no run, another process has it, or a change would make it another run.
    """
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{path}: it is not a run directory; one that `rlamort train` made, with a config.yaml, is needed")
    facts = yaml.safe_load(config_file.read_text())
    method = trusted(facts.pop("method"), method)
    facts.pop("row")
    before = resolve(method, facts)
    config = resolve(method, {**facts, **changes, "dir": str(path)})
    differing = {name: (before.values[name], value) for name, value in config.values.items() if value != before.values[name]}
    for name, (old, new) in differing.items():
        if name in FIXED:
            raise UserError(f"{name}: the run in {path} has {old}, and {new} would make it another run; start a new one")
        if name not in FREE:
            warnings.warn(f"{name}: {new} from here on, {old} until now", stacklevel=2)
    learner = learner_class(method).__new__(learner_class(method))
    learner._settle(config, config.values["env"], None)
    learner.directory = Directory(path, config, fresh=False)
    learner.directory.checkpoints.sweep()
    loaded = learner.directory.checkpoints.newest()
    learner._build(learner.source.env.spec)
    if loaded is None:  # it was killed before its first checkpoint
        learner.directory.records.cut(0)
        return learner, EXACT
    exact = learner._restore(loaded)
    then, now = loaded.saved.facts["versions"], checkpoint.versions()
    for name in sorted(now):
        if then.get(name) != now[name]:
            warnings.warn(f"{name} is {now[name]} now; the run was made with {then.get(name)}", stacklevel=2)
    same = then == now and learner.device.type == "cpu" and not set(differing) - FREE
    return learner, (EXACT if exact else EXCEPT_EPISODE) if same else STATISTICAL


def _kind_of(env: Any) -> Any:
    """What evaluation environments are made from: those of a vector environment are single ones of its kind."""
    if isinstance(env, VectorEnv) and env.spec is not None:
        return env.spec.id
    return env


def learner_class(name: str) -> type[Learner]:
    """The `Learner` of one method."""
    return type(short_name(name).upper().replace("/", "_"), (Learner,), {"method": name})
