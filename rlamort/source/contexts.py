"""Contexts of a problem, whose objective is known, so that no agent acts. B batch · d numbers in a context · n = dim Y"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from rlamort.config import Count, Fixed, Part
from rlamort.env import Env
from rlamort.errors import UserError
from rlamort.problem import Problem, presented
from rlamort.source.base import Collected, Contexts, Labelled, Tree

LONGEST, AT_ONCE = 64, 0.1  # steps in a round, and seconds that it may take: a signal is answered at its end


@dataclass(frozen=True)
class Labels(Part):
    """A source of solutions that are computed once, in bulk: see `rlamort.parts.labels`."""

    def require(self, problem: Problem, dataset_size: int | None) -> None:
        """Raises UserError if these cannot be labels of the problem, as far as that is known without finding any."""
        raise NotImplementedError

    def __call__(self, problem: Problem, dataset_size: int | None, device: torch.device) -> Labelled:
        """Contexts and their labels."""
        raise NotImplementedError


class Unattended:
    """How many steps a round may hold in which nobody waits for an action: 1, 2, 4, ..., as many as take little time.

    These are few numbers, so that a GPU captures few patterns. What is learned does not depend on them.
    """

    def __init__(self) -> None:
        self.steps, self._began = 0, -math.inf  # of the latest round, and when it began

    def __call__(self, most: int, device: torch.device) -> int:
        """Steps of a round that begins now, at most `most`."""
        if device.type == "cuda":  # what the round before has launched, so that a signal is answered soon
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        quick = int(AT_ONCE * self.steps / max(now - self._began, 1e-9))  # at the speed of the round before
        self.steps = 2 ** (max(1, min(most, 2 * self.steps, LONGEST, quick)).bit_length() - 1)
        self._began = now
        return self.steps


class Fresh:
    """Contexts of a problem, new ones at every update or from a data set; no agent acts, since the objective is known.

    Args:
        env: the problem as an environment.
        dataset_size: draw this many once, and batches from among them, each equally often; null draws new ones every time.
        labels: solutions of the data set, found once and kept with it, for loss=regress loss.teacher=labels: solution, the
            problem's own; search, classical solvers'; file, contexts and solutions of a file, labels.path.

    Raises:
        UserError: the environment is no `Problem`.
    """

    # what fields of a run mean here, and those that mean nothing: see `rlamort.config.fields` and `unsupported`
    meaning = MappingProxyType({
        "env": "the problem: a registered id such as rlamort/Sphere-v0, or module:Class from the current folder or a package.",
        "env_kwargs": "keywords of its constructor, e.g. env_kwargs.price=2.",
        "steps": "steps to train for, each of `utd` updates.",
        "seed": "of networks and contexts; evaluation has its own.",
        "max_env_faults": "evaluations that may meet costs which are no numbers; each is said, and means leave these out.",
        "utd": "updates a step, which may be fewer than one.",
        "reset_every": "updates after which networks and optimisers begin anew; 0 never.",
        "batch_size": "contexts in an update.",
        "eval_episodes": "contexts in an evaluation, always the same.",
        "compile": "true captures an update with its contexts as one graph (5-60 s, then faster); auto does so from 15,000 "
        "updates on. What was compiled is kept for later runs.",
    })  # fmt: skip
    unsupported = (
        "max_episode_steps", "num_envs", "vectorization", "num_workers", "env_timeout", "warmup_steps", "update_after", "video",
        "overlap",
    )  # fmt: skip
    resumable = True
    waiting = None
    written = np.zeros(0, dtype=np.int64)  # it keeps no frames

    def __init__(self, env: Env, *, dataset_size: Count | None = None, labels: Fixed[Labels | None] = None) -> None:
        if env.spec.problem is None:
            raise UserError(f"env={env.name}: it is no problem with a known objective; a subclass of rlamort.Problem is needed")
        self.env, self.problem, self.collected = env, env.spec.problem, 0
        self.dataset_size, self.labels = dataset_size, labels
        self.data: Contexts | Labelled | None = None  # the data set, once it is prepared
        self.round = Unattended()
        if labels is not None:
            labels.require(self.problem, dataset_size)

    def prepare(self) -> None:
        """Draw the data set and compute its labels, if there is one and it is not here yet."""
        if self.data is None and self.labels is not None:
            self.data = self.labels(self.problem, self.dataset_size, self.env.device)
        elif self.data is None and self.dataset_size is not None:
            self.data = Contexts(presented(self.problem, self.dataset_size, self.env.device))

    def collect(self, choose: Callable[[], Tensor], most: int = 1) -> Collected:
        """Count the steps of a round, at most `most`; `sample` draws their contexts."""
        steps = self.round(most, self.env.device)
        self.collected += steps
        return Collected(torch.empty(0, self.env.spec.x_dim), steps, [], np.zeros(self.env.count, dtype=bool))

    def sample(self, count: int) -> Contexts | Labelled:
        """x ~ p(x) (count, d), with their labels if the data set has them."""
        if self.data is None:
            return Contexts(presented(self.problem, count, self.env.device))
        index = torch.randint(len(self.data.x), (count,), device=self.data.x.device)
        return type(self.data)(*(part[index] for part in self.data))

    def state(self) -> Tree:
        """Everything that `restore` needs."""
        data = {} if self.data is None else self.data._asdict()
        return {"collected": self.collected, "env": self.env.state(), "data": data.get("x"), "labels": data.get("y")}

    def restore(self, state: Tree, frames: Iterable[Tree]) -> bool:
        """Restore what `state` returned."""
        self.collected = int(state["collected"])
        tensors = [state["data"], state.get("labels")]  # older checkpoints have no labels
        parts = [part.to(self.env.device) for part in tensors if part is not None]
        self.data = (Labelled(*parts) if len(parts) == 2 else Contexts(*parts)) if parts else None
        return self.env.restore(state["env"])

    def frames_since(self, written: np.ndarray) -> Tree:
        """None."""
        return {"slots": 1, "high": self.written}
