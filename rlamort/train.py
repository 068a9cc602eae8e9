"""The loop: collect, fit, evaluate, improve, score. No method is named here."""

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, Self

import torch

from rlamort.adjoint import Carry
from rlamort.agent import Agent, Player
from rlamort.env import Env, Episode
from rlamort.errors import Diverged
from rlamort.objective import Metrics
from rlamort.score import Score, finished
from rlamort.source import Batch, Collected, Contexts, Labelled

Values = dict[str, float | list[float]]
WINDOW = 5.0  # seconds of training over which the speed is averaged


class Enough(Exception):  # noqa: N818  # an end, not an error
    """Learning ends here, as if all steps were over: a callback says so, or an agent, in a fit, with its reason."""


class Schedule(NamedTuple):
    """When things happen, in environment steps and updates: see `rlamort.config.Run` for each."""

    steps: int  # of the environment, in this call
    warmup_steps: int
    update_after: int
    utd: Fraction  # updates per step; an exact number, so that no update is lost or gained by rounding
    batch_size: int
    eval_every: int
    log_every: int
    checkpoint_every: int = 0  # 0 never, as below
    reset_every: int = 0  # updates

    def begins(self, before: int, collected: int) -> bool:
        """Whether the first action or update of the agent's own comes next, now that `collected` is no longer `before`."""
        return before < self.first <= collected

    @property
    def first(self) -> int:
        """Steps before the first action or update of the agent's own; 1 at least."""
        return max(1, min(self.warmup_steps, self.update_after))

    def room(self, env_step: int, until: int, fit_every: int) -> int:
        """Steps that a round may hold after `env_step`: up to what comes next, a record, an evaluation, a checkpoint, the end.

        What precedes the updates of a step, a fit or a network reset, comes at the beginning of a round, which then holds one.
        """
        cadences = [every for every in (self.eval_every, self.log_every, self.checkpoint_every) if every]
        return 1 if fit_every or self.reset_every else min(until - env_step, *(every - env_step % every for every in cadences))


@dataclass
class Clock:
    """The progress of a run over all calls of `train`, and measurements that are not recorded yet."""

    env_step: int = 0
    updates: int = 0
    seconds: float = 0.0  # of training, without evaluations
    scored: int = 0  # the env_step of the latest evaluation
    metrics: Metrics = field(default_factory=dict)  # of the latest update
    episodes: list[Episode] = field(default_factory=list)  # that ended since the latest record
    y: torch.Tensor | None = None  # the next actions, if they are chosen already
    h: Carry | None = None  # the agent's carry then; None where all episodes begin
    learning_steps: int = 0  # environment steps since updates began

    def advance(self, utd: Fraction, steps: int) -> range:
        """Count `steps` more environment steps; returns the numbers, from 1, of the updates that are due then."""
        before, self.learning_steps = self.learning_steps, self.learning_steps + steps
        upto, done = (steps * utd.numerator // utd.denominator for steps in (self.learning_steps, before))
        return range(self.updates + 1, self.updates + upto - done + 1)

    def state(self) -> dict[str, Any]:
        """As plain values and tensors, for a checkpoint."""
        return vars(self) | {"episodes": [list(episode) for episode in self.episodes]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """As `state` returned it, without y and h, which hold only where the environments go on exactly.

        Older checkpoints have no `learning_steps`: utd was whole then, and it did not matter.
        """
        kept = {name: value for name, value in state.items() if name not in ("episodes", "y", "h")}
        return cls(**kept, episodes=[Episode(total, length) for total, length in state["episodes"]])


class Source(Protocol):
    """p(x) as data."""

    env: Env
    collected: int

    @property
    def waiting(self) -> torch.Tensor | None: ...  # the contexts to act on; None if no agent acts
    def prepare(self) -> None: ...  # slow work that a restored state makes unnecessary
    def collect(
        self, choose: Callable[[], torch.Tensor], most: int
    ) -> Collected: ...  # a step, or up to `most` if no agent acts
    def sample(self, count: int) -> Batch | Contexts | Labelled: ...


Updates = Callable[
    [Sequence[bool], torch.Tensor | None, Carry], tuple[Metrics, torch.Tensor | None, Carry]
]  # see rlamort.run.capture
Scorer = Callable[[Agent], Score]


class Pace:
    """Steps per second over the last `WINDOW` seconds of training, from the first update on.

    Of an agent that fits, it is over no fewer steps than from one fit to the next: a fit counts once, however long it takes.

    A slow round, such as one that compiles, does not count once there is another.

    Attributes:
        learning: whether there are updates; before, the pace does not predict the time left.
    """

    def __init__(self) -> None:
        self.learning = False
        self._points: deque[tuple[float, int]] = deque()

    def note(self, seconds: float, env_step: int, updates: int, fit_every: int = 0) -> None:
        """Take the present step into the average, of an agent that fits every so many."""
        if updates and not self.learning:
            self.learning = True
            self._points.clear()
        self._points.append((seconds, env_step))
        while len(self._points) > 2 and seconds - self._points[0][0] > WINDOW and env_step - self._points[1][1] >= fit_every:
            self._points.popleft()

    @property
    def steps_per_s(self) -> float | None:
        """None until two rounds can be compared."""
        (then, first), (now, last) = (self._points[0], self._points[-1]) if self._points else ((0.0, 0), (0.0, 0))
        return (last - first) / (now - then) if now > then else None

    def left(self, steps: int) -> float | None:
        """Seconds that so many steps will take; None if unknown."""
        return steps / self.steps_per_s if self.learning and self.steps_per_s else None


class Tracker(Protocol):
    """A sink of a run's records."""

    def record(self, env_step: int, values: Values) -> None:
        """Take one record."""

    def progress(self, env_step: int, pace: Pace, episode: Episode | None) -> None:
        """Called after every step of the loop, with the latest finished episode; must be fast."""


class Journal:
    """Records, evaluations and checkpoints of a run.

    Args:
        trackers: receive every record.
        score: evaluates the agent in separate environments; None skips evaluations.
        keep: called at the end of every round of the loop, when all state is consistent; may save, and may stop the run.
    """

    def __init__(
        self, trackers: Sequence[Tracker] = (), score: Scorer | None = None, keep: Callable[[], None] = lambda: None
    ) -> None:
        self.trackers, self.score, self.keep = trackers, score, keep
        self.pace = Pace()

    def record(self, clock: Clock, values: Values) -> None:
        for tracker in self.trackers:
            tracker.record(clock.env_step, values)

    def progress(self, clock: Clock, fit_every: int) -> None:
        self.pace.note(clock.seconds, clock.env_step, clock.updates, fit_every)
        for tracker in self.trackers:
            tracker.progress(clock.env_step, self.pace, clock.episodes[-1] if clock.episodes else None)

    def measure(self, agent: Agent, clock: Clock) -> None:
        """Evaluate the agent and record the result, unless there is no scorer or this step is evaluated already."""
        if self.score is not None and clock.scored != clock.env_step:
            found = self.score(agent)
            returns = finished(found.returns)
            if not returns:
                warnings.warn(
                    f"step {clock.env_step:,}: the evaluation is undefined, since all of its {found.failed} episodes failed; "
                    "it is recorded without a return, and training goes on",
                    stacklevel=2,
                )
            # a problem's return is minus its cost, and the cost is what it is about
            cost: Values = {"eval/cost": -sum(returns) / len(returns)} if returns and agent.spec.problem is not None else {}
            self.record(clock, found.values() | cost)
            clock.scored = clock.env_step


def train(agent: Agent, source: Source, schedule: Schedule, clock: Clock, updates: Updates, journal: Journal) -> None:
    """Train `agent` for `schedule.steps` environment steps.

    Args:
        agent: to train.
        source: of its batches.
        schedule: of warm-up, updates, evaluations and records.
        clock: where the run stands; moved on.
        updates: updates the agent on batches of the source, and then acts: see `rlamort.run.capture`.
        journal: what is left behind.

    Raises:
        Diverged: a loss is no longer finite.
        Enough: whoever may end learning has.
    """
    until = clock.env_step + schedule.steps
    started = time.perf_counter() - clock.seconds
    player = Player(agent, source.env.count, clock.h)

    def choose() -> torch.Tensor:
        if source.collected < schedule.warmup_steps:
            return source.env.domain.uniform(source.env.count, source.env.device)
        return player(source.env.x, explore=True) if clock.y is None else clock.y

    while clock.env_step < until:
        had, met = source.collected, source.collect(choose, schedule.room(clock.env_step, until, agent.fit_every))
        before, clock.env_step = clock.env_step, clock.env_step + met.transitions
        player.begin(met.over)
        agent.observe(met.x)
        clock.episodes += met.episodes
        asked = agent.needs_fit and agent.fit_every and schedule.begins(had, source.collected)
        if asked or crosses(before, clock.env_step, agent.fit_every):
            clock.metrics |= agent.fit(source)
        if source.collected > schedule.update_after:
            due = clock.advance(schedule.utd, met.transitions)
            improves = [number % agent.improve_every == 0 for number in due]
            fresh, clock.y, player.h = updates(improves, source.waiting, player.h)
            clock.metrics |= fresh
            clock.updates += len(due)
        clock.h, clock.seconds = player.h, time.perf_counter() - started
        journal.progress(clock, agent.fit_every)
        if crosses(before, clock.env_step, schedule.log_every):
            losses = finite(clock)
            agent.notice(losses)
            journal.record(clock, losses | summary(clock.episodes) | speed(clock, journal.pace))
            clock.episodes.clear()
        if crosses(before, clock.env_step, schedule.eval_every):
            journal.measure(agent, clock)
        journal.keep()
        started = time.perf_counter() - clock.seconds  # neither evaluations nor checkpoints are training


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]: env steps come num_envs at a time. False for `every` = 0."""
    return every > 0 and before // every < after // every


def finite(clock: Clock) -> Values:
    """The latest losses as numbers. Raises Diverged if one is not finite."""
    values: Values = {name: float(value) for name, value in clock.metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):  # type: ignore[arg-type]
            at = f"update {clock.updates}, environment step {clock.env_step}"
            raise Diverged(f"{name} is {value} at {at}: learning has diverged")
    return values


def summary(episodes: list[Episode]) -> Values:
    """Training returns since the last record, with exploration."""
    if not episodes:
        return {}
    return {
        "train/return": sum(e.total for e in episodes) / len(episodes),
        "train/length": sum(e.length for e in episodes) / len(episodes),
        "train/episodes": len(episodes),
    }


def speed(clock: Clock, pace: Pace) -> Values:
    """Seconds of training in total, and the present steps per second, if known: see `Pace`."""
    lately: Values = {} if pace.steps_per_s is None else {"time/steps_per_s": pace.steps_per_s}
    return {"time/seconds": clock.seconds, **lately, "time/updates": clock.updates}
