"""The loop: collect, evaluate, improve, score. No method is named here."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from rlamort.agent import Agent
from rlamort.env import Env, Episode
from rlamort.errors import Diverged
from rlamort.objective import Metrics
from rlamort.score import Score
from rlamort.source import Batch, Collected
from rlamort.track import Tracker, Values


class Schedule(NamedTuple):
    """Integers that say how often: see `rlamort.config.Run` for each."""

    steps: int  # of the environment, in this call
    warmup_steps: int
    update_after: int
    utd: int
    batch_size: int
    eval_every: int
    log_every: int


@dataclass
class Clock:
    """How far a run is, over all calls of `train`, and what it has measured but not yet recorded."""

    env_step: int = 0
    updates: int = 0
    seconds: float = 0.0  # of training, without evaluations
    scored: int = 0  # the env_step of the latest evaluation
    metrics: Metrics = field(default_factory=dict)  # of the latest update
    episodes: list[Episode] = field(default_factory=list)  # that ended since the latest record


class Source(Protocol):
    """p(x) as data."""

    env: Env
    collected: int

    def collect(self, act: Callable[[torch.Tensor], torch.Tensor]) -> Collected: ...
    def sample(self, count: int) -> Batch: ...


Update = Callable[[Batch, bool], Metrics]
Scorer = Callable[[Agent], Score]


class Journal:
    """What a run leaves behind: records, evaluations, checkpoints.

    Args:
        trackers: take every record.
        score: measures the agent in environments of its own; None does without.
        keep: called at the end of every round of the loop, when all state is consistent; may save, and may stop the run.
    """

    def __init__(
        self, trackers: Sequence[Tracker] = (), score: Scorer | None = None, keep: Callable[[], None] = lambda: None
    ) -> None:
        self.trackers, self.score, self.keep = trackers, score, keep

    def record(self, clock: Clock, values: Values) -> None:
        for tracker in self.trackers:
            tracker.record(clock.env_step, values)

    def progress(self, clock: Clock) -> None:
        for tracker in self.trackers:
            tracker.progress(clock.env_step, clock.env_step / clock.seconds, clock.episodes[-1] if clock.episodes else None)

    def measure(self, agent: Agent, clock: Clock) -> None:
        """Score the agent, unless there is nothing to score it with or it has just been done."""
        if self.score is not None and clock.scored != clock.env_step:
            self.record(clock, self.score(agent).values())
            clock.scored = clock.env_step


def train(agent: Agent, source: Source, schedule: Schedule, clock: Clock, update: Update, journal: Journal) -> None:
    """Train `agent` for `schedule.steps` environment steps.

    Args:
        agent: what learns.
        source: where its batches come from.
        schedule: how often what happens.
        clock: where the run stands; moved on.
        update: `agent.update`, or a compiled form of it.
        journal: what is left behind.

    Raises:
        Diverged: a loss is no longer finite.
    """
    until = clock.env_step + schedule.steps
    started = time.perf_counter() - clock.seconds

    def play(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return agent.act(x, explore=True)

    def play_at_random(x: torch.Tensor) -> torch.Tensor:
        return source.env.domain.uniform(len(x))

    while clock.env_step < until:
        met = source.collect(play_at_random if source.collected < schedule.warmup_steps else play)
        before, clock.env_step = clock.env_step, clock.env_step + met.transitions
        agent.observe(met.x)
        clock.episodes += met.episodes
        if source.collected > schedule.update_after:
            for _ in range(schedule.utd * met.transitions):
                clock.updates += 1
                improve = clock.updates % agent.improve_every == 0
                clock.metrics |= update(source.sample(schedule.batch_size), improve)
        clock.seconds = time.perf_counter() - started
        journal.progress(clock)
        if crosses(before, clock.env_step, schedule.log_every):
            journal.record(clock, finite(clock) | summary(clock.episodes) | speed(clock))
            clock.episodes.clear()
        if crosses(before, clock.env_step, schedule.eval_every):
            journal.measure(agent, clock)
        journal.keep()
        started = time.perf_counter() - clock.seconds  # neither evaluations nor checkpoints are training


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]: env steps come num_envs at a time."""
    return before // every < after // every


def finite(clock: Clock) -> Values:
    """The latest losses as numbers. Raises Diverged where one is none."""
    values: Values = {name: float(value) for name, value in clock.metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):  # type: ignore[arg-type]
            at = f"update {clock.updates}, environment step {clock.env_step}"
            raise Diverged(f"{name} is {value} at {at}: learning has diverged")
    return values


def summary(episodes: list[Episode]) -> Values:
    """Training returns since the last record: exploring, so not what the agent is worth."""
    if not episodes:
        return {}
    return {
        "train/return": sum(e.total for e in episodes) / len(episodes),
        "train/length": sum(e.length for e in episodes) / len(episodes),
        "train/episodes": len(episodes),
    }


def speed(clock: Clock) -> Values:
    return {
        "time/seconds": clock.seconds,
        "time/steps_per_s": clock.env_step / clock.seconds,
        "time/updates": clock.updates,
    }


def captured(agent: Agent) -> Update:
    """`agent.update` as one compiled graph each with and without `improve`.

    The graph holds forward, backward, optimiser and target update, and draws its noise as the eager update does. Its first
    result is held against the eager one's; where compiling fails, or the two differ, updates go on uncompiled, with a warning.
    """
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad is traced instead of breaking the graph
    graph: Update = torch.compile(agent.update, fullgraph=True, options={"fallback_random": True})
    checked: set[bool] = set()  # the values of `improve` whose graph has proved right
    chosen = graph

    def first(batch: Batch, improve: bool) -> Metrics:
        nonlocal chosen
        twin, devices = copy.deepcopy(agent), [agent.box.scale.device] if agent.box.scale.is_cuda else []
        with torch.random.fork_rng(devices):
            expected = twin.update(batch, improve)
        try:
            metrics = graph(batch, improve)
            differing = [*_differing(metrics, expected), *_differing(agent.state_dict(), twin.state_dict())]
            if not differing:
                checked.add(improve)
                return metrics
            reason = f"its first update differs from the uncompiled one in {', '.join(differing[:3])}"
            agent.load_state_dict(twin.state_dict())
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything has moved: compiling comes first
            reason, expected = str(error).splitlines()[0], agent.update(batch, improve)
        warnings.warn(f"compile: it failed, so updates go on uncompiled ({reason})", stacklevel=3)
        chosen = agent.update
        return expected

    def update(batch: Batch, improve: bool) -> Metrics:
        return chosen(batch, improve) if chosen is not graph or improve in checked else first(batch, improve)

    return update


def _differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are further apart than float32 arithmetic in another order explains.

    By norms, since Adam's first step turns a rounding of a vanishing gradient into a step of full size.
    """
    return [
        name
        for name, tensor in theirs.items()
        if not (ours[name] - tensor).double().norm() <= 1e-2 * tensor.double().norm() + 1e-5
    ]
