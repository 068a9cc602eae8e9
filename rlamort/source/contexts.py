"""Contexts of a problem, whose objective is known, so that nobody acts. B batch · d numbers in a context · n = dim Y"""

from collections.abc import Callable, Iterable
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from rlamort.config import Count
from rlamort.env import Env
from rlamort.errors import UserError
from rlamort.problem import presented
from rlamort.source.base import Collected, Contexts, Tree


class Fresh:
    """New contexts of a problem at every update; nobody acts, since its objective is known.

    Args:
        env: the problem as an environment.
        dataset_size: draw this many once, and batches from among them, each equally often; null draws new ones every time.

    Raises:
        UserError: the environment is no `Problem`.
    """

    # what fields of a run mean here, and those that mean nothing: see `rlamort.config.fields` and `unsupported`
    meaning = MappingProxyType({
        "env": "the problem: a registered id such as rlamort/Sphere-v0, or module:Class from the current folder or a package.",
        "env_kwargs": "keywords of its constructor, e.g. env_kwargs.price=2.",
        "steps": "steps to train for, each of `utd` updates.",
        "seed": "of networks and contexts; evaluation has its own.",
        "max_env_faults": "evaluations that may meet costs which are no numbers; each is said.",
        "utd": "updates a step.",
        "reset_every": "updates after which networks and optimisers begin anew; 0 never.",
        "batch_size": "contexts in an update.",
        "eval_episodes": "contexts in an evaluation, always the same.",
        "compile": "true captures an update with its contexts as one graph (5-60 s, then faster); auto does so from 15,000 "
        "updates on. What was compiled is kept for later runs.",
    })  # fmt: skip
    unsupported = ("max_episode_steps", "num_envs", "vectorization", "env_timeout", "warmup_steps", "update_after", "video")
    resumable = True
    waiting = None
    written = np.zeros(0, dtype=np.int64)  # it keeps no frames

    def __init__(self, env: Env, *, dataset_size: Count | None = None) -> None:
        if env.spec.problem is None:
            raise UserError(f"env={env.name}: it is no problem with a known objective; a subclass of rlamort.Problem is needed")
        self.env, self.problem, self.collected = env, env.spec.problem, 0
        self.data = None if dataset_size is None else presented(self.problem, dataset_size, env.device)

    def collect(self, choose: Callable[[], Tensor]) -> Collected:
        """One update's worth of contexts is due; they are drawn where they are needed, in `sample`."""
        self.collected += 1
        return Collected(torch.empty(0, self.env.spec.x_dim), 1, [], np.zeros(self.env.count, dtype=bool))

    def sample(self, count: int) -> Contexts:
        """x ~ p(x) (count, d)."""
        if self.data is None:
            return Contexts(presented(self.problem, count, self.env.device))
        return Contexts(self.data[torch.randint(len(self.data), (count,), device=self.data.device)])

    def state(self) -> Tree:
        """Everything that `restore` needs."""
        return {"collected": self.collected, "env": self.env.state(), "data": self.data}

    def restore(self, state: Tree, frames: Iterable[Tree]) -> bool:
        """Put back what `state` gave."""
        self.collected = int(state["collected"])
        self.data = None if state["data"] is None else state["data"].to(self.env.device)
        return self.env.restore(state["env"])

    def frames_since(self, written: np.ndarray) -> Tree:
        """None."""
        return {"slots": 1, "high": self.written}
