"""A run: a method built for an environment, trained, measured, saved."""

import contextlib
import functools
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
import torch
import yaml
from gymnasium.vector import VectorEnv

from rlamort.agent import Agent
from rlamort.config import FIXED, FREE, Config, defaults, fields, locate, methods, read_row, resolve, short_name
from rlamort.env import Env, Episode, Spec
from rlamort.errors import Diverged, Preempted, UserError
from rlamort.host.machine import cores, device_of, fast_products, require_memory
from rlamort.host.plain import plain, revived
from rlamort.host.randomness import Randomness
from rlamort.run import checkpoint
from rlamort.run.callback import Callback, Called, Enough
from rlamort.run.capture import Captured, Eager
from rlamort.run.directory import Directory
from rlamort.run.environments import Environments, told
from rlamort.run.mirror import Mirror, require
from rlamort.run.resets import Resets
from rlamort.run.sb3_file import read_sb3
from rlamort.run.sharing import Sharing
from rlamort.run.track import Terminal, Tracker, Values
from rlamort.score import SEED, Score, score
from rlamort.train import Clock, Journal, Schedule, Updates, crosses

COMPILE_FROM = 15_000  # updates: below, compiling costs more time than it saves


class Learner:
    """A method on an environment, with Stable-Baselines3's four verbs: learn, predict, save, load.

    Args:
        env: Gymnasium id, `module:Class`, class, function that makes one, instance, or `gymnasium.vector` environment. An
            instance is itself trained in; copies of it are what is evaluated in, and the further ones of `num_envs`.
        eval_env: where it is evaluated, as `env`; None makes another of the same kind.
        fields: the keys that `rlamort train METHOD --help` lists, as keywords. With `dir`, what happens is recorded there
            and the agent is evaluated on the way; without, nothing is written.

    Raises:
        UserError: a key that does not exist, a value that it cannot have, an environment that does not fit.
    """

    method: ClassVar[str]
    directory: Directory | None = None
    closed = False

    def __init__(self, env: Any, *others: Any, eval_env: Any = None, **fields: Any) -> None:
        if others:
            raise UserError(_one_argument(type(self).__name__, env, len(others)))
        values, unnamed = told(env, eval_env, fields)
        self._settle(resolve(self.method, {**fields, **values}), env, eval_env, unnamed)
        given = self.config.run.dir
        self.environments.require_second(must=bool(given) or self.config.run.num_envs > 1)
        self._build(self.source.env.spec)
        self.environments.require_spaces()
        self.directory = Directory(Path(given), self._written()) if given else None
        if self.tracked and not given:
            raise UserError(f"track={', '.join(self.tracked)}: it copies the records of a run directory, so dir is needed too")
        for key, reason in unnamed.items() if given else ():
            warnings.warn(
                f"{key}: {reason}, so no command can make it again for {given}: `rlamort resume` and the others, and "
                f"rlamort.resume and rlamort.load, will need {key}=...",
                stacklevel=2,
            )

    def _build(self, spec: Spec) -> None:
        with Randomness(0, self.device)():
            require_memory(self.method, lambda: self._drawn(spec.apart()), self.device)
        with self.randomness():
            self.agent: Agent = self._drawn(spec).to(self.device)
        self.config.values.update(self.agent.chosen)
        self.environments.spec = spec

    def _drawn(self, spec: Spec) -> Agent:
        """An agent that has learned nothing yet."""
        kind = locate(self.config.row["agent"])
        drawn: Agent = kind(spec, **self.config.keywords(kind))
        return drawn

    def _settle(self, config: Config, env: Any, eval_env: Any, unnamed: dict[str, str]) -> None:
        self.config = config
        self.device = device_of(config.run.device)
        self.environments = Environments(config, self.device, env, eval_env, unnamed)
        self.threads = config.run.threads or min(torch.get_num_threads(), cores())
        self.randomness = Randomness(config.run.seed, self.device)
        self.clock = Clock()
        self.latest: Values = {}  # what was recorded last
        self._source: Any = None
        self.updates: Updates | None = None
        self._compiled: bool | None = None  # decided when updates begin, and kept by the run from then on
        self._loaded = self._proved = False
        self._kept = 0  # the env_step of the latest checkpoint
        self._kept_frames: np.ndarray | None = None
        self._mirrors: list[Mirror] = []
        self._final = 0  # bytes of records that no resume will write again
        track = (config.run.track,) if isinstance(config.run.track, str) else config.run.track
        self.tracked = [backend for backend in track if backend != "none"]
        for backend in self.tracked:
            require(backend)

    @property
    def source(self) -> Any:
        """p(x): opened, with its environment checked, when it is first needed."""
        if self._source is None:
            with self.randomness():  # environments may draw while they are made
                env = self.environments.training
                env.reset(self.config.run.seed)
                kind = locate(self.config.row["source"])
                self._source = kind(env, **self.config.keywords(kind))
        return self._source

    def score(self, episodes: int | None = None) -> Score:
        """Play evaluation episodes: fixed seeds, deterministic actions, environments of their own."""
        return self._scored(episodes or self.config.run.eval_episodes, self.agent)

    def _scored(self, episodes: int, agent: Agent) -> Score:
        with self.at_work(Randomness(SEED, self.device)), self.environments.undisturbed():
            return score(agent, self._evaluation_env(episodes), episodes=episodes)

    def _evaluation_env(self, episodes: int) -> Env:
        return self.environments.evaluation(episodes)

    def close(self) -> None:
        """Give back what the environments hold, worker processes among it."""
        self.environments.close()
        for mirror in self._mirrors:
            mirror.close(self._final)
        if self.directory is not None:
            self.directory.close()
        self.closed = True

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        *,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        trackers: Sequence[Tracker] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Train for `total_timesteps` more environment steps.

        Args:
            total_timesteps: environment steps, over all environments.
            callback: called with the learner after every record, evaluation and checkpoint; where it gives False, learning ends
                there, as if `total_timesteps` were over.
            reset_num_timesteps: count steps in records from zero again; what was learned and stored stays either way.
            progress_bar: show progress in the terminal.
            trackers: take losses, returns and evaluations; without one, and without `dir`, there are no evaluations.
            stop: asked after every step; when it says so, the run saves itself and `Preempted` is raised.

        Raises:
            Diverged: something in the agent is no longer finite.
        """
        run, source = self.config.run, self.source
        self._called = Called(callback, self)
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
        scorer = functools.partial(self._scored, run.eval_episodes) if takers else None
        if scorer is not None:
            with self.environments.undisturbed():
                self._evaluation_env(run.eval_episodes)  # now, so that one that cannot be made stops nothing later
        updates = self.clock.updates
        with contextlib.ExitStack() as around:
            if progress_bar:
                takers.append(around.enter_context(Terminal(total_timesteps)))
            journal = Journal([*takers, self._called], scorer, functools.partial(self._keep, stop))
            around.enter_context(self.training())
            if self.directory is not None and not self._proved:
                source.env.prove()
                self._proved = True
            with contextlib.suppress(Enough):
                locate(self.config.row["train"])(
                    self.agent, source, schedule, self.clock, self._prepared(total_timesteps * run.utd), journal
                )
            self.check_finite()
            with contextlib.suppress(Enough):
                journal.measure(self.agent, self.clock)
            if self.directory is not None:
                self.save_checkpoint()
        if self._loaded and self.clock.updates == updates and source.resumable:
            warnings.warn(
                f"learn({total_timesteps}): the agent is as it was loaded. Its replay began empty, and updates begin after "
                f"{schedule.update_after:,} steps (warmup_steps, update_after); learn longer, or set these lower",
                stacklevel=2,
            )
        return self

    @contextlib.contextmanager
    def at_work(self, randomness: Randomness) -> Iterator[None]:
        """What holds while it learns or is evaluated: a stream of random numbers, threads, the fastest matrix products."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with randomness(), fast_products():
                yield
        finally:
            torch.set_num_threads(before)

    def training(self) -> contextlib.AbstractContextManager[None]:
        """What holds while it learns."""
        return self.at_work(self.randomness)

    def _prepared(self, planned: int) -> Updates:
        if self._compiled is None:
            wanted = self.config.run.compile
            self._compiled = wanted is True or (wanted == "auto" and planned >= COMPILE_FROM)
        if self.updates is None:
            source, run = self.source, self.config.run
            self.updates = (Captured if self._compiled else Eager)(self.agent, lambda: source.sample(run.batch_size))
            if run.threads is None and self.threads > 1 and self.device.type == "cpu":
                self.updates = Sharing(self.updates, self.agent, self.threads)
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
        self._called.stop_if_asked()

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
            self.directory.records.sync()
            self.directory.checkpoints.write(self.clock.env_step, self.agent.state_dict(), self._facts(), self._state(), frames)
        except (OSError, UserError) as error:
            free = shutil.disk_usage(self.directory.path).free
            reason = error.strerror if isinstance(error, OSError) else str(error)
            warnings.warn(
                f"checkpoint at step {self.clock.env_step:,}: {reason} ({free / 2**20:.0f} MiB are free there); "
                f"training goes on, and the one before is untouched",
                stacklevel=2,
            )
        else:
            first, self._kept, self._kept_frames = not self._kept, self.clock.env_step, frames["high"]
            self._release()
            if first:  # once more, since much may have come about since the beginning
                self.source.env.prove()
            self._called()

    def _release(self) -> None:
        """Records so far are final: those who follow the run may have them."""
        assert self.directory is not None
        self._final = self.directory.records.size()
        for mirror in self._mirrors:
            mirror.advance(self._final)

    def check_finite(self) -> None:
        """Raises Diverged where something of the agent is no longer finite, so that it is never saved or given away."""
        if what := self.agent.unsound():
            raise Diverged(f"{what} is no longer finite at environment step {self.clock.env_step}: learning has diverged")

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
            **self.randomness.current(),
            "records": self.directory.records.size(),
            "compiled": self._compiled,
            "threads": self.threads,
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
            self.randomness.states = {name: state[name] for name in ("torch", "numpy", "python")}
            self.directory.records.cut(state["records"])
            self._compiled = state["compiled"]
            self.threads = state["threads"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, checkpoint.Damaged) as error:
            raise UserError(f"{loaded.saved.path}: it does not fit this run: {error}") from error
        self._kept, self._kept_frames = self.clock.env_step, self.source.written.copy()
        return exact

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """As `rlamort.agent.Agent.predict`."""
        with self.randomness.of_torch():
            return self.agent.predict(observation, state, episode_start, deterministic)

    def save(self, path: str | Path) -> None:
        """Write networks, targets, optimisers and normaliser to the folder `path`, as safetensors and JSON.

        Raises:
            Diverged: something in them is not finite.
            UserError: the folder holds anything else than an agent that was saved there before.
        """
        self.check_finite()
        checkpoint.save_agent(Path(path), self.agent.state_dict(), self._facts())

    def _facts(self) -> dict[str, Any]:
        written = self._written()
        del written["row"]
        return {
            **written,
            "spec": self.agent.spec.facts(),
            "statistics": plain(self.environments.statistics()),
            "env_step": self.clock.env_step,
            "updates": self.clock.updates,
            "versions": checkpoint.versions(),
        }

    def _written(self) -> dict[str, Any]:
        """The configuration as files hold it."""
        values, unnamed = self.config.values, self.environments.unnamed
        if "env" in unnamed:  # nobody makes it from these again, and they may hold what no file can
            values = values | {"env_kwargs": None}
        written = {name: plain(value) if isinstance(value, dict) else value for name, value in values.items()}
        return {"method": self.config.method, "row": self.config.row, "unnamed": unnamed, "values": written}

    @classmethod
    def load(cls, path: str | Path, env: Any = None, method: str | None = None, eval_env: Any = None) -> Self:
        """The agent that `save` wrote; the folder of a run counts as that of its agent.

        Args:
            path: the folder.
            env: to learn on; None takes the one it was trained on, opened when it is needed.
            eval_env: to be evaluated in; None takes the one it was evaluated in.
            method: the YAML file of a method of your own. What a saved agent says of such a file is not followed, since
                that would import what it names.

        Raises:
            UserError: there is none, or its parts do not fit each other, or another method's.
        """
        saved = _agent_in(Path(path))
        try:
            method, values = trusted(saved.facts["method"], method), revived(saved.facts["values"])
            clock = Clock(saved.facts["env_step"], saved.facts["updates"])
            spec, posed = Spec.read(saved.facts["spec"]), "problem" in saved.facts["spec"]
            unnamed, statistics = dict(saved.facts.get("unnamed", {})), revived(saved.facts.get("statistics"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{saved.path}: its description lacks {error}") from error
        if method != cls.method:
            raise UserError(f"{saved.path}: it holds an agent of {method}, not of {cls.method}; rlamort.load takes any")
        learner = cls.__new__(cls)
        rows = {"num_envs": env.num_envs} if isinstance(env, VectorEnv) else {}
        learner._settle(resolve(method, {**values, **rows, "dir": None}), env, eval_env, unnamed)
        learner.environments.saved = statistics
        learner.environments.require_second(must=False)
        if not posed:  # a problem cannot be read from a file: it is opened
            saved.require_fit(lambda: learner._drawn(spec))
        learner._build(learner.source.env.spec if posed else spec)
        saved.fill(learner.agent)
        learner.clock, learner._loaded = clock, True
        learner.environments.require_spaces()
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


def load(path: str | Path, env: Any = None, method: str | None = None, eval_env: Any = None) -> Learner:
    """A saved agent of any method, as `Learner.load`; `sb3:FILE.zip` reads one that Stable-Baselines3 saved.

    Nothing in the file is executed: of a Stable-Baselines3 file, its tensors and plain JSON are read, never its pickles.
    """
    if str(path).startswith("sb3:"):
        return _from_sb3(Path(str(path).removeprefix("sb3:")), env, eval_env)
    return learner_class(trusted(_agent_in(Path(path)).facts.get("method"), method)).load(path, env, method, eval_env)


def _from_sb3(path: Path, env: Any, eval_env: Any) -> Learner:
    foreign = read_sb3(path)
    kind = learner_class(foreign.method)
    learner = kind.__new__(kind)
    values, unnamed = told(env, eval_env, {})
    learner._settle(resolve(foreign.method, {**foreign.values, **values}), env, eval_env, unnamed)
    learner.environments.require_second(must=False)
    learner._build(foreign.spec)
    foreign.fill(learner.agent)
    learner._loaded = True
    learner.environments.require_spaces()
    return learner


def _agent_in(path: Path) -> checkpoint.Saved:
    """The agent in a folder, or in a run directory: the finished one, or that of the newest checkpoint."""
    if (path / "agent").is_dir():
        return checkpoint.open_saved(path / "agent")
    if (path / "ckpt").is_dir() and (loaded := checkpoint.Checkpoints(path / "ckpt").newest()) is not None:
        return loaded.saved
    return checkpoint.open_saved(path)


EXACT, EXCEPT_EPISODE, STATISTICAL = "exact", "exact but for the episode", "statistical"


def resume(
    path: str | Path,
    changes: Mapping[str, Any] = MappingProxyType({}),
    method: str | None = None,
    env: Any = None,
    eval_env: Any = None,
) -> tuple[Learner, str]:
    """A run as it was at its newest whole checkpoint, ready to `learn` on, and how exact that is.

    exact: it goes on bit for bit as if it had not been interrupted. Exact but for the episode: the environment cannot give its
    state, so the episode that was going on ends there, as a truncated one; `learner.source.env.unsaved` says what is to blame.
    Statistical: versions, device or settings differ.

    Args:
        path: the run directory.
        changes: values that are to differ from now on.
        method: as for `Learner.load`.
        env: where it trained, for a run whose environment no name makes again.
        eval_env: where it was evaluated, likewise.

    Raises:
        UserError: it is no run, another process has it, or a change would make it another run.
    """
    path, changes = Path(path), dict(changes)
    facts = run_facts(path)
    method = trusted(facts["method"], method)
    before = resolve(method, facts["values"])
    given = {"env": changes.pop("env", env), "eval_env": changes.pop("eval_env", eval_env)}
    for key, one in given.items():
        name = told(one, None, {})[0]["env"]
        if one is not None and key not in facts["unnamed"] and name != before.values[key]:
            raise _another_run(key, path, before.values[key], name)
    config = resolve(method, {**before.values, **changes, "dir": str(path)})
    differing = {name: (before.values[name], value) for name, value in config.values.items() if value != before.values[name]}
    for name, (old, new) in differing.items():
        if name in FIXED:
            raise _another_run(name, path, old, new)
        if name not in FREE:
            warnings.warn(f"{name}: {new} from here on, {old} until now", stacklevel=2)
    learner = learner_class(method).__new__(learner_class(method))
    learner._settle(config, given["env"], given["eval_env"], facts["unnamed"])
    for key in given:
        learner.environments.find(key)
    learner.environments.require_second(must=True)
    learner.directory = Directory(path, learner._written(), fresh=False)
    learner.directory.checkpoints.sweep()
    loaded = learner.directory.checkpoints.newest()
    learner._build(learner.source.env.spec)
    learner.environments.require_spaces()
    if loaded is None:  # it was killed before its first checkpoint
        learner.directory.records.cut(0)
        return learner, EXACT
    Spec.read(loaded.saved.facts["spec"]).require(learner.agent.spec, f"env={learner.source.env.name}")
    exact = learner._restore(loaded)
    then, now = loaded.saved.facts["versions"], checkpoint.versions()
    for name in sorted(now):
        if then.get(name) != now[name]:
            warnings.warn(f"{name} is {now[name]} now; the run was made with {then.get(name)}", stacklevel=2)
    same = then == now and learner.device.type == "cpu" and not set(differing) - FREE
    return learner, (EXACT if exact else EXCEPT_EPISODE) if same else STATISTICAL


def _another_run(name: str, path: Path, old: Any, new: Any) -> UserError:
    return UserError(f"{name}: the run in {path} has {old}, and {new} would make it another run; start a new one")


def run_facts(path: Path) -> dict[str, Any]:
    """What the config.yaml of a run directory says: its method, values, and why a name in them makes no environment.

    Raises:
        UserError: it is none.
    """
    file = path / "config.yaml"
    facts = yaml.safe_load(file.read_text()) if file.is_file() else None
    if not isinstance(facts, dict) or not {"method", "row"} <= set(facts):
        lacking = "with a config.yaml" if facts is None else "whose config.yaml has a method and its row"
        raise UserError(f"{path}: it is not a run directory; one that `rlamort train` made, {lacking}, is needed")
    values = {name: value for name, value in facts.items() if name not in ("method", "row", "unnamed")}
    return {"method": facts["method"], "unnamed": dict(facts.get("unnamed", {})), "values": revived(values)}


def _one_argument(name: str, env: Any, more: int) -> str:
    """The message for those who come from Stable-Baselines3, where a policy's name comes first."""
    policy = f"{env} names a policy of Stable-Baselines3's; here " if isinstance(env, str) and "Policy" in env else ""
    return (
        f"{policy}the environment comes first, and nothing else is given without a name: "
        f"rlamort.{name}(env, hidden=[256, 256]); {more + 1} values are given"
    )


def learner_class(name: str) -> type[Learner]:
    """The `Learner` of one method."""
    row = read_row(name)
    known = [field for field in fields(row).values() if field.name not in ("env", "eval_env")]
    chosen = defaults(row)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("env", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("eval_env", keyword, default=None),
        *(inspect.Parameter(field.name, keyword, default=chosen[field.name], annotation=field.type) for field in known),
    ]
    lines = [f"{field.name}: {field.help}" for field in known]
    about = "\n".join(
        [f"{row['about']}.", "", inspect.getdoc(Learner) or "", "", "Fields:", *(f"    {line}" for line in lines)]
    )
    facts = {"method": name, "__doc__": about, "__signature__": inspect.Signature(parameters)}
    return type(short_name(name).upper().replace("/", "_"), (Learner,), facts)
