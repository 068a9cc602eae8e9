"""A method on an environment: trained, evaluated, saved and loaded."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from rlamort.agent import Agent, Player
from rlamort.config import Config, Size, convert, defaults, fields, locate, rational, read_row, resolve, short_name
from rlamort.env import Spec
from rlamort.errors import Diverged, Preempted, UserError
from rlamort.host.machine import cores, default_dtype, device_of, products_of, require_memory, require_products, versions
from rlamort.host.plain import plain, revived
from rlamort.host.randomness import Randomness
from rlamort.host.saved import save_agent
from rlamort.run.callback import Callback, Called
from rlamort.run.directory import Directory
from rlamort.run.durable import Durable
from rlamort.run.environments import Environments, environment_values
from rlamort.run.fitting import require_enough, require_frozen, require_trained
from rlamort.run.mirror import require
from rlamort.run.overlap import require_apart
from rlamort.run.resets import require_resets
from rlamort.run.stored import agent_in, as_here, trusted, values_of
from rlamort.run.track import Terminal, until_enough
from rlamort.run.updates import updates_of
from rlamort.score import SEED, Score, score
from rlamort.train import Clock, Journal, Schedule, Tracker, Updates, Values
from rlamort.update import Refine

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
    durable: Durable | None = None  # saves it to its run directory, where it has one
    closed = False

    def __init__(self, env: Any, *others: Any, eval_env: Any = None, **fields: Any) -> None:
        if others:
            raise UserError(_one_argument(type(self).__name__, env, len(others)))
        values, unnamed = environment_values(env, eval_env, fields)
        self._settle(resolve(self.method, {**fields, **values}), env, eval_env, unnamed)
        directory = self.config.run.dir
        self.environments.require_second(must=bool(directory) or self.config.run.num_envs > 1)
        self._begin()
        self.build(self.source.env.spec)
        require_trained(self.agent, self.config)  # these are not asked of loaded agents, which may only act
        require_enough(self.agent, self._schedule(0), self.config.run.num_envs)
        self.durable = Durable(self, Directory(Path(directory), self.description())) if directory else None
        if self.tracked and not directory:
            raise UserError(f"track={', '.join(self.tracked)}: it copies the records of a run directory, so dir is needed too")
        for key, reason in unnamed.items() if directory else ():
            warnings.warn(
                f"{key}: {reason}, so no command can make it again for {directory}: `rlamort resume` and the others, and "
                f"rlamort.resume and rlamort.load, will need {key}=...",
                stacklevel=2,
            )

    @classmethod
    def unbuilt(cls, config: Config, env: Any, eval_env: Any, unnamed: dict[str, str]) -> Self:
        """A learner whose agent `build` makes later, for agents that come from files."""
        learner = cls.__new__(cls)
        learner._settle(config, env, eval_env, unnamed)
        return learner

    def build(self, spec: Spec) -> None:
        """Construct the agent.

        Raises:
            UserError: its networks do not fit in memory, or the spaces of an environment that was passed differ from `spec`.
        """
        with Randomness(0, self.device)(), default_dtype(self.config.run.dtype):
            require_memory(self.method, lambda: self._fresh_agent(spec.apart()), self.device)
        with self.randomness(), default_dtype(self.config.run.dtype):
            self.agent: Agent = self._fresh_agent(spec).to(self.device)
        require_resets(self.agent, self.config.run.reset_every)
        self.config.values.update(self.agent.chosen)
        self.environments.spec = spec
        self.environments.require_spaces()

    def _fresh_agent(self, spec: Spec) -> Agent:
        """An untrained agent."""
        kind = locate(self.config.row["agent"])
        agent: Agent = kind(spec, **self.config.keywords(kind))
        return agent

    def _settle(self, config: Config, env: Any, eval_env: Any, unnamed: dict[str, str]) -> None:
        self.config = config
        self.device = device_of(config.run.device)
        self.matmul = str(config.values["matmul"]) if "matmul" in config.values else "float32"
        require_products(self.matmul, self.device)
        self.environments = Environments(config, self.device, env, eval_env, unnamed)
        self.threads = config.run.threads or min(torch.get_num_threads(), cores())
        self.randomness = Randomness(config.run.seed, self.device)
        self.clock = Clock()
        self.latest: Values = {}  # what was recorded last
        self._source: Any = None
        self.updates: Updates | None = None
        self._compiled: bool | None = None  # decided when updates begin, and kept by the run from then on
        track = (config.run.track,) if isinstance(config.run.track, str) else config.run.track
        self.tracked: Sequence[str] = [backend for backend in track if backend != "none"]
        for backend in self.tracked:
            require(backend)

    @property
    def directory(self) -> Directory | None:
        """The run directory; None where nothing is written."""
        return None if self.durable is None else self.durable.directory

    @property
    def source(self) -> Any:
        """p(x), over the training environment; constructed when it is first needed."""
        if self._source is None:
            with self.randomness(), default_dtype(self.config.run.dtype):  # environments may draw while they are made
                env = self.environments.training
                if self.config.run.overlap:
                    require_apart(env)
                env.reset(self.config.run.seed)
                kind = locate(self.config.row["source"])
                self._source = kind(env, **self.config.keywords(kind))
        return self._source

    def _begin(self) -> None:
        """Refuse what rewards cannot train, and let the source do its slow preparation, unless that is done or restored."""
        require_frozen(self.source.env.spec)
        with self.randomness():
            self.source.prepare()

    def score(self, episodes: int | None = None, *, refine: Refine = None, budget_us: float | None = None) -> Score:
        """Play evaluation episodes: fixed seeds, deterministic actions, refined as by `predict`, environments of their own."""
        count = self.config.run.eval_episodes if episodes is None else convert("episodes", episodes, Size)
        return self._scored(count, self.agent.refined(refine, budget_us))

    def _scored(self, episodes: int, agent: Agent) -> Score:
        with self.at_work(Randomness(SEED, self.device)), self.environments.undisturbed():
            return score(agent, self.environments.evaluation(episodes), episodes=episodes)

    def close(self) -> None:
        """Release the environments' resources, worker processes included, and the run directory."""
        self.environments.close()
        if self.durable is not None:
            self.durable.close()
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
            callback: called with the learner after every record, evaluation and checkpoint; where it returns False, learning
                ends there, as if `total_timesteps` were over.
            reset_num_timesteps: count steps in records from zero again; what was learned and stored stays either way.
            progress_bar: show progress in the terminal.
            trackers: take losses, returns and evaluations; without one, and without `dir`, there are no evaluations.
            stop: called after every step; where it returns True, a checkpoint is saved and `Preempted` is raised.

        Raises:
            Diverged: something in the agent is no longer finite.
        """
        called, durable = Called(callback, self), self.durable
        self._begin()
        if reset_num_timesteps and self.clock.env_step and durable is not None:
            raise UserError("reset_num_timesteps: steps in a run directory count on; reset_num_timesteps=False is needed")
        if reset_num_timesteps:
            kept = self.clock
            self.clock = Clock(updates=kept.updates, y=kept.y, h=kept.h, learning_steps=kept.learning_steps)
        schedule, updates = self._schedule(total_timesteps), self.clock.updates
        takers = [*([] if durable is None else [durable.records()]), *trackers]
        scorer = functools.partial(self._scored, self.config.run.eval_episodes) if takers else None
        if scorer is not None:
            with self.environments.undisturbed():
                self.environments.evaluation(self.config.run.eval_episodes)  # now, so that an error in it comes before training
        with contextlib.ExitStack() as around:
            if progress_bar:
                takers.append(around.enter_context(Terminal(total_timesteps)))
            around.enter_context(self.training())
            self._train(schedule, Journal([*takers, called], scorer, lambda: self._after_round(called, stop())))
            if durable is not None and durable.save():
                called()
        if self.agent.loaded and self.clock.updates == updates and self.source.resumable:
            warnings.warn(
                f"learn({total_timesteps}): the agent is as it was loaded. Its replay began empty, and updates begin after "
                f"{schedule.update_after:,} steps (warmup_steps, update_after); learn longer, or set these lower",
                stacklevel=2,
            )
        return self

    def _schedule(self, steps: int) -> Schedule:
        run = self.config.run
        update_after = run.warmup_steps if run.update_after is None else run.update_after
        return Schedule(
            steps, run.warmup_steps, update_after, rational(run.utd), run.batch_size, run.eval_every, run.log_every,
            run.checkpoint_every, run.reset_every,
        )  # fmt: skip

    def _train(self, schedule: Schedule, journal: Journal) -> None:
        """Run the method's loop, to its end or until something says that it is enough, and a last evaluation."""
        if self.durable is not None:
            self.durable.prove()
        with until_enough(self.clock):
            updates = self._prepared(schedule.steps * schedule.utd)
            locate(self.config.row["train"])(self.agent, self.source, schedule, self.clock, updates, journal)
        self.check_finite()
        with until_enough(self.clock):
            journal.measure(self.agent, self.clock)

    def _after_round(self, called: Called, stopping: bool) -> None:
        if self.durable is not None and self.durable.keep(stopping):
            called()
        if stopping:
            raise Preempted(f"stopped at step {self.clock.env_step:,}")
        called.stop_if_asked()

    @contextlib.contextmanager
    def at_work(self, randomness: Randomness) -> Iterator[None]:
        """A context with its random numbers, threads, default dtype and the fastest matrix products."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with randomness(), default_dtype(self.config.run.dtype), products_of(self.matmul):
                yield
        finally:
            torch.set_num_threads(before)

    def training(self) -> contextlib.AbstractContextManager[None]:
        """The context in which it learns."""
        return self.at_work(self.randomness)

    def _prepared(self, planned: Fraction) -> Updates:
        if self._compiled is None:
            wanted = self.config.run.compile
            self._compiled = wanted is True or (wanted == "auto" and planned >= COMPILE_FROM)
        if self.updates is None:
            fresh = functools.partial(self._fresh_agent, self.agent.spec)
            self.updates = updates_of(
                self.agent, self.source, self.config.run, self._compiled, self.threads, fresh, lambda: self.clock.updates
            )
        return self.updates

    def check_finite(self) -> None:
        """Raises Diverged if some tensor of the agent is not finite, so that it is never saved."""
        if what := self.agent.unsound():
            raise Diverged(f"{what} is no longer finite at environment step {self.clock.env_step}: learning has diverged")

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs but the agent and the frames of the replay."""
        return {
            "clock": self.clock.state(),
            "source": self.source.state(),
            **self.randomness.current(),
            "compiled": self._compiled,
            "threads": self.threads,
        }

    def restore(self, state: dict[str, Any], frames: Iterator[dict[str, Any]]) -> bool:
        """Continue from `state` and the replay's frames, in the order of writing; returns False if episodes begin anew."""
        clock = state["clock"]
        self.clock = Clock.of(clock)
        exact: bool = self.source.restore(state["source"], frames)
        if exact and clock["y"] is not None:  # it was chosen for the contexts that stand now
            self.clock.y = clock["y"].to(self.device)
        if exact and clock.get("h") is not None:  # older checkpoints have none
            self.clock.h = tuple(part.to(self.device) for part in clock["h"])
            Player(self.agent, self.source.env.count, self.clock.h)  # says where it does not fit
        self.randomness.states = {name: state[name] for name in ("torch", "numpy", "python")}
        self._compiled, self.threads = state["compiled"], state["threads"]
        return exact

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False,
        *, refine: Refine = None, budget_us: float | None = None,
    ) -> tuple[np.ndarray, Any]:  # fmt: skip
        """As `rlamort.agent.Agent.predict`."""
        with self.randomness.of_torch():
            return self.agent.predict(observation, state, episode_start, deterministic, refine=refine, budget_us=budget_us)

    def save(self, path: str | Path) -> None:
        """Write networks, targets, optimisers and normaliser to the folder `path`, as safetensors and JSON.

        Raises:
            Diverged: something in them is not finite.
            UserError: the folder holds anything else than an agent that was saved there before.
        """
        self.check_finite()
        save_agent(Path(path), self.agent.state_dict(), self.facts())

    def facts(self) -> dict[str, Any]:
        """The JSON that is saved beside an agent's tensors."""
        written = self.description()
        del written["row"]
        return {
            **written,
            "spec": self.agent.spec.facts(),
            "statistics": plain(self.environments.statistics()),
            "env_step": self.clock.env_step,
            "updates": self.clock.updates,
            "versions": versions(),
        }

    def description(self) -> dict[str, Any]:
        """The configuration as plain values, for files."""
        values, unnamed = self.config.plain(), self.environments.unnamed
        if "env" in unnamed:  # it is not constructed from these again, and they may hold what no file can
            values = values | {"env_kwargs": None}
        written = {name: plain(value) if isinstance(value, dict) else value for name, value in values.items()}
        return {"method": self.config.method, "row": self.config.row, "unnamed": unnamed, "values": written}

    @classmethod
    def load(cls, path: str | Path, env: Any = None, method: str | None = None, eval_env: Any = None) -> Self:
        """Load an agent from a folder that `save` wrote, or from a run directory.

        Args:
            path: the folder.
            env: to train on; None takes the one it was trained on, constructed when it is needed.
            eval_env: to evaluate on; None takes the one it was evaluated on.
            method: the YAML file of a method of your own. The file that a saved agent names is not read, since
                that would import what it names.

        Raises:
            UserError: there is none, or it is incomplete, or of another method.
        """
        saved = agent_in(Path(path))
        try:
            method = trusted(saved.facts["method"], method)
            values = as_here(values_of(method, revived(saved.facts["values"])))
            clock = Clock(saved.facts["env_step"], saved.facts["updates"])
            spec, from_env = Spec.read(saved.facts["spec"]), "problem" in saved.facts["spec"]
            unnamed, statistics = dict(saved.facts.get("unnamed", {})), revived(saved.facts.get("statistics"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{saved.path}: its description lacks {error}") from error
        if method != cls.method:
            raise UserError(f"{saved.path}: it holds an agent of {method}, not of {cls.method}; rlamort.load takes any")
        rows = {"num_envs": env.num_envs} if isinstance(env, VectorEnv) else {}
        learner = cls.unbuilt(resolve(method, {**values, **rows, "dir": None}), env, eval_env, unnamed)
        from_env = from_env or learner.config.of_environment
        learner.environments.saved = statistics
        learner.environments.require_second(must=False)
        if not from_env:  # neither a problem nor equations can be read from a file: they are opened
            saved.require_fit(lambda: learner._fresh_agent(spec))
        learner.build(learner.source.env.spec if from_env else spec)
        saved.fill(learner.agent)
        learner.clock, learner.agent.loaded = clock, True
        return learner


def _one_argument(name: str, env: Any, more: int) -> str:
    """The error for positional arguments, as of Stable-Baselines3, where a policy's name comes first."""
    policy = f"{env} names a policy of Stable-Baselines3's; here " if isinstance(env, str) and "Policy" in env else ""
    return (
        f"{policy}the environment comes first, and nothing else is given without a name: "
        f"rlamort.{name}(env, hidden=[256, 256]); {more + 1} values are given"
    )


def learner_class(name: str) -> type[Learner]:
    """The subclass of `Learner` for one method, with its keys in the signature and docstring."""
    row = read_row(name)
    known = [field for field in fields(row).values() if field.name not in ("env", "eval_env")]
    chosen = defaults(row)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("env", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("eval_env", keyword, default=None),
        *(inspect.Parameter(field.name, keyword, default=chosen[field.name], annotation=field.type) for field in known),
    ]
    lines = [f"    {field.name}: {field.help}" for field in known]
    about = "\n".join([f"{row['about']}.", "", inspect.getdoc(Learner) or "", "", "Fields:", *lines])
    facts = {"method": name, "__doc__": about, "__signature__": inspect.Signature(parameters)}
    return type(short_name(name).upper().replace("/", "_"), (Learner,), facts)
