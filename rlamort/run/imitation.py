"""Sources of an expert's labels: shown beforehand, or asked for while a mixture of expert and policy plays.

N environments side by side · d = x_dim · n = dim of an action
"""

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlamort.config import Count, Fixed, Fraction, Positive, Size
from rlamort.config.fields import Range
from rlamort.env import Env
from rlamort.errors import UserError
from rlamort.run.experts import Advice, Expert, latency
from rlamort.source import Collected, Demonstrations, Labelled, Unattended
from rlamort.source.base import Tree


class Met(NamedTuple):
    """The results of a step in which an expert has given labels."""

    x: Tensor  # (k, d) contexts whose labels are not held out
    transitions: int
    over: np.ndarray  # (N,) bool: an episode ended


LABELS = 5_000  # that an expert is asked for, unless a budget says otherwise
Share = Annotated[float, Range(0, 0.5, below=True)]


class Demonstrated:
    """The expert plays until the budget of labels is spent, or a data set is read; then nobody plays, and steps are counted.

    Args:
        env: where the expert plays.
        expert: a run directory or saved agent, sb3:FILE.zip, planner, FILE.npz, minari:ID, or module:object with `predict`.
        label_budget: labels in total, those that are held out included; null takes 5,000, or all of a data set.
        held_out: share of episodes whose labels are held out, to choose parameters by: with 0.1 the 5th, the 15th, and so on.
        expert_ms: most milliseconds that a decision of the expert may take, as the median of a few; null allows any.

    Raises:
        UserError: there is no expert.
    """

    # what fields of a run mean here, and those that mean nothing: see `rlamort.config.fields` and `unsupported`
    meaning = MappingProxyType({
        "steps": "steps to train for, each of `utd` updates; nobody plays in them.",
        "num_envs": "environments that the expert plays in side by side.",
        "batch_size": "labels in an update.",
    })  # fmt: skip
    unsupported: tuple[str, ...] = ("dtype", "warmup_steps", "update_after", "overlap")
    resumable = True
    written = np.zeros(0, dtype=np.int64)  # it keeps no frames: all labels are in its state

    def __init__(
        self,
        env: Env,
        *,
        expert: Fixed[Expert | None] = None,
        label_budget: Fixed[Count | None] = None,
        held_out: Fixed[Share] = 0.1,
        expert_ms: Positive | None = None,
    ) -> None:
        if expert is None:
            raise UserError(
                "expert: it is missing; a run directory, sb3:FILE.zip, planner, FILE.npz, minari:ID, or module:object with "
                "`predict` is needed"
            )
        self.env, self.expert, self.budget, self.share, self.expert_ms = env, expert, label_budget, held_out, expert_ms
        self.collected, self.round = 0, Unattended()
        self.shown: Demonstrations | None = None  # once there is a place for them
        self.number = np.arange(env.count)  # of the episode that is played in each environment
        self._advice: Advice | None = None
        self._fresh = True  # nobody has seen the contexts of labels that were shown beforehand

    @property
    def labels(self) -> int:
        """How many labels there are. One is given for each state that is met, unless the environment fails there."""
        return 0 if self.shown is None else len(self.shown)

    @property
    def complete(self) -> bool:
        """Whether the budget is spent."""
        return self.shown is not None and self.labels == len(self.shown.x)

    @property
    def waiting(self) -> Tensor | None:
        """The contexts that the agent acts on: none, since it does not play."""
        return None

    @property
    def advice(self) -> Advice:
        """The expert, once it is needed."""
        if self._advice is None:
            self._advice = self.expert.advice(self.env)
            # on its device, whose random generator is then left as it was
            x = self.env.x.to(self.env.device)
            if self.expert_ms is not None and (taken := 1e3 * latency(self._advice, x)) > self.expert_ms:
                raise UserError(
                    f"{self.expert.name}: a decision takes it {taken:.3g} ms; expert_ms={self.expert_ms:g} are allowed"
                )
        return self._advice

    def held_out(self) -> Labelled:
        """The labels that are held out so far."""
        assert self.shown is not None, "it is prepared"
        return self.shown.held_out()

    def sample(self, count: int) -> Labelled:
        """`count` labels with their contexts, of those that are not held out."""
        assert self.shown is not None, "it is prepared"
        return self.shown.sample(count)

    def _room(self, capacity: int) -> Demonstrations:
        return Demonstrations(capacity, self.env.spec.x_dim, self.env.domain, self.share, self.env.device)

    def prepare(self) -> None:
        """Read the data set, or let the expert play, unless that is done."""
        if self.shown is None:
            self._begin()
        while not self.complete:
            self._step(lambda label: label)

    def _begin(self) -> None:
        """Make room, and read a data set. Raises UserError if it has fewer labels than the budget."""
        found = self.expert.recorded(self.env)
        if found is None:
            rows = self.env.count
            count = LABELS // rows * rows if self.budget is None else self.budget
            if count % rows:
                raise UserError(
                    f"label_budget={count}: {rows} environments are labelled at a time; a multiple of {rows} is needed"
                )
            self.shown = self._room(count)
            _ = self.advice  # an error in it comes before any work
            return
        count = self.budget or len(found.y)
        if count > len(found.y):
            raise UserError(f"label_budget={count}: {self.expert.name} has {len(found.y)} labels; at most so many can be taken")
        self.shown = self._room(count)
        x, y = (torch.from_numpy(part[:count]).to(self.env.device) for part in (found.x, found.y))
        self.shown.add(x, y, y, found.episode[:count])

    def _step(self, play: Callable[[Tensor], Tensor]) -> Met:
        """Label what is met, and step with what is played where the labels are y (N, n)."""
        assert self.shown is not None, "it is prepared"
        x, label = self.env.x, self.advice(self.env.x).to(self.env.device)
        played = play(label)
        step = self.env.step(played)
        x = x.to(self.env.device)
        # after faults the budget may end within a step
        rows = np.flatnonzero(step.valid)[: len(self.shown.x) - self.labels]
        at = torch.from_numpy(rows).to(self.env.device)
        self.shown.add(x[at], label[at], played[at], self.number[rows])
        learned = torch.from_numpy(rows[~self.shown.held(self.number[rows])]).to(self.env.device)
        self.number[step.over] = self.number.max() + 1 + np.arange(np.count_nonzero(step.over))
        self.advice.begin(step.over)
        return Met(x[learned], int(np.count_nonzero(step.valid)), step.over)

    def collect(self, choose: Callable[[], Tensor], most: int = 1) -> Collected:
        """Count the steps of a round, at most `most`; the contexts of the first are those of all labels that are learned of."""
        assert self.shown is not None, "it is prepared"
        steps = self.round(most, self.env.device)
        x = self.shown.trained().x if self._fresh else torch.empty(0, self.env.spec.x_dim, device=self.env.device)
        self.collected, self._fresh = self.collected + steps, False
        return Collected(x, steps, self.env.episodes(), np.zeros(self.env.count, dtype=bool))

    def state(self) -> Tree:
        """Everything that `restore` needs."""
        return {
            "collected": self.collected, "fresh": self._fresh, "number": self.number, "env": self.env.state(),
            "capacity": None if self.shown is None else len(self.shown.x),
            "shown": None if self.shown is None else self.shown.state(),
            "advice": None if self._advice is None or self.complete else self._advice.state(),
        }  # fmt: skip

    def restore(self, state: Tree, frames: Iterable[Tree]) -> bool:
        """Restore what `state` returned; the expert is made again if it is still to be asked."""
        self.collected, self._fresh, self.number = int(state["collected"]), bool(state["fresh"]), state["number"]
        exact = self.env.restore(state["env"])
        if state["capacity"] is not None:
            self.shown = self._room(int(state["capacity"]))
            self.shown.restore(state["shown"])
        if not exact:  # the episodes that were going on end here
            self.number = self.number.max() + 1 + np.arange(self.env.count)
        elif state["advice"] is not None:
            self.advice.restore(state["advice"])
        return exact

    def frames_since(self, written: np.ndarray) -> Tree:
        """None."""
        return {"slots": 1, "high": self.written}


class Mixture(Demonstrated):
    """A mixture of expert and policy plays, and the expert labels every state that is met, until its budget is spent.

    In round i, which counts from 0 and lasts `round_labels` labels, each action is the expert's with probability
    beta beta_decay^i (Ross, Gordon and Bagnell, 2011, section 3.1). After the last label nobody plays, and steps are counted.

    Args:
        env: where they play.
        expert: a run directory or saved agent, sb3:FILE.zip, planner, or module:object with `predict`.
        label_budget: labels in total, those that are held out included; null takes 5,000.
        held_out: share of episodes whose labels are held out, to choose parameters by: with 0.1 the 5th, the 15th, and so on.
        expert_ms: most milliseconds that a decision of the expert may take, as the median of a few; null allows any.
        beta: probability that the expert plays, in the first round.
        beta_decay: its factor from each round to the next; 0 leaves all but the first round to the policy.
        round_labels: labels in a round.
    """

    meaning = MappingProxyType({
        "steps": "steps to train for, each of `utd` updates; in the first `label_budget` of them somebody plays.",
        "batch_size": "labels in an update.",
    })  # fmt: skip
    unsupported = ("dtype", "warmup_steps", "overlap")

    def __init__(
        self,
        env: Env,
        *,
        expert: Fixed[Expert | None] = None,
        label_budget: Fixed[Count | None] = None,
        held_out: Fixed[Share] = 0.1,
        expert_ms: Positive | None = None,
        beta: Fraction = 1.0,
        beta_decay: Fraction = 0.0,
        round_labels: Size = 200,
    ) -> None:
        super().__init__(env, expert=expert, label_budget=label_budget, held_out=held_out, expert_ms=expert_ms)
        self.beta, self.beta_decay, self.round_labels = beta, beta_decay, round_labels

    @property
    def waiting(self) -> Tensor | None:
        """(N, d), the contexts to act on now, on the training device; None once nobody plays any more."""
        return None if self.complete else self.env.x.to(self.env.device)

    def prepare(self) -> None:
        """Make the expert, unless it is not needed any more."""
        if self.shown is None:
            self._begin()
            _ = self.advice  # or it is a data set, which cannot be asked
            self._fresh = False

    def collect(self, choose: Callable[[], Tensor], most: int = 1) -> Collected:
        """Play one step in every environment, or count steps where the budget is spent."""
        if self.complete:
            return super().collect(choose, most)
        share = self.beta * self.beta_decay ** (self.labels // self.round_labels)

        def mixed(label: Tensor) -> Tensor:
            policy = choose()
            if share in (0, 1):  # nothing is drawn where nothing is left to chance
                return label if share else policy
            return torch.where(torch.rand(len(label), 1, device=label.device) < share, label, policy)

        met = self._step(mixed)
        self.collected += met.transitions
        return Collected(met.x, met.transitions, self.env.episodes(), met.over)
