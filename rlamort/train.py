"""The loop: collect, evaluate, improve, score. No method is named here."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from rlamort.agent import Agent
from rlamort.env import Env, Episode
from rlamort.errors import Fault
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
    """How far a run is: it goes on over several calls of `train`."""

    env_step: int = 0
    updates: int = 0
    seconds: float = 0.0  # of training, without evaluations
    scored: int = 0  # the env_step of the latest evaluation


class Source(Protocol):
    """p(x) as data."""

    env: Env
    collected: int

    def collect(self, act: Callable[[torch.Tensor], torch.Tensor]) -> Collected: ...
    def sample(self, count: int) -> Batch: ...


Update = Callable[[Batch, bool], Metrics]
Scorer = Callable[[Agent], Score]


def train(
    agent: Agent,
    source: Source,
    score: Scorer | None,
    schedule: Schedule,
    tracker: Tracker,
    clock: Clock,
    update: Update,
) -> None:
    """Train `agent` for `schedule.steps` environment steps.

    Args:
        agent: what learns.
        source: where its batches come from.
        score: measures the agent in environments of its own; None does without.
        schedule: how often what happens.
        tracker: takes the records.
        clock: where the run stands; moved on.
        update: `agent.update`, or a compiled form of it.

    Raises:
        Fault: a loss is no longer finite.
    """
    until = clock.env_step + schedule.steps
    metrics: Metrics = {}
    episodes: list[Episode] = []
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
        episodes += met.episodes
        if source.collected > schedule.update_after:
            for _ in range(schedule.utd * met.transitions):
                clock.updates += 1
                improve = clock.updates % agent.improve_every == 0
                metrics = metrics | update(source.sample(schedule.batch_size), improve)
        clock.seconds = time.perf_counter() - started
        tracker.progress(clock.env_step, clock.env_step / clock.seconds, episodes[-1] if episodes else None)
        if crosses(before, clock.env_step, schedule.log_every):
            tracker.record(clock.env_step, finite(metrics, clock) | summary(episodes) | speed(clock))
            episodes.clear()
        if score is not None and crosses(before, clock.env_step, schedule.eval_every):
            measure(agent, score, tracker, clock)
            started = time.perf_counter() - clock.seconds


def measure(agent: Agent, score: Scorer, tracker: Tracker, clock: Clock) -> None:
    """Score the agent, and record it."""
    tracker.record(clock.env_step, score(agent).values())
    clock.scored = clock.env_step


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]: env steps come num_envs at a time."""
    return before // every < after // every


def finite(metrics: Metrics, clock: Clock) -> Values:
    """Losses as numbers. Raises Fault where one is none."""
    values: Values = {}
    for name, value in metrics.items():
        values[name] = number = float(value)
        if not torch.isfinite(value):
            raise Fault(
                f"{name} is {number} at update {clock.updates}, environment step {clock.env_step}: learning has diverged"
            )
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
    """`agent.update` as one compiled graph each with and without `improve`; the eager one, with a warning, where that fails.

    The graph holds forward, backward, optimiser and target update. Noise is drawn as the eager update draws it.
    """
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad is traced instead of breaking the graph
    options: dict[str, str | int | bool | Callable[..., Any]] = {} if agent.box.scale.is_cuda else {"fallback_random": True}
    chosen: Update = torch.compile(agent.update, fullgraph=True, options=options)

    def update(batch: Batch, improve: bool) -> Metrics:
        nonlocal chosen
        try:
            return chosen(batch, improve)
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything has moved: compiling comes first
            reason = str(error).splitlines()[0]
            warnings.warn(f"compile: it failed, so updates go on uncompiled ({reason})", stacklevel=2)
            chosen = agent.update
            return chosen(batch, improve)

    return update
