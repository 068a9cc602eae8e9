"""Whole episodes from fixed start states: what is learned from samples of the same trajectory.

M conditions, one for each environment · N rollouts of a condition in an iteration · T steps · d = x_dim · n = dim of an action
"""

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlamort.config import Fixed, Seed, Size
from rlamort.config.fields import Range
from rlamort.env import Env
from rlamort.errors import Fault, UserError
from rlamort.source.base import Collected, Tree

Several = Annotated[int, Range(2, 10**4)]  # with one sample there is no spread


class Played(NamedTuple):
    """Rollouts, each of T actions."""

    x: Tensor  # (M, T + 1, R, d)
    y: Tensor  # (M, T, R, n)


class Rollouts:
    """Episodes of equal length: environment i begins every one of them in the state that a reset with seed + i gives.

    What an environment draws while it is played is the same each time, too, so its noise is not seen.

    Args:
        env: M environments, each of which is one condition.
        seed: of the conditions.
        rollouts: N, episodes of each condition in an iteration.
        memory: episodes of each condition that are kept, at least N.

    Raises:
        UserError: no time limit is known, or fewer episodes are kept than an iteration has.
    """

    # what fields of a run mean here, and those that mean nothing: see `rlamort.config.fields` and `unsupported`
    meaning = MappingProxyType({
        "num_envs": "conditions, the start states that are learned from, each in an environment of its own.",
        "batch_size": "states in a gradient step of the network.",
        "seed": "of all randomness in training; condition i is the state that a reset with seed + i gives.",
    })  # fmt: skip
    unsupported = ("warmup_steps", "update_after", "utd", "dtype", "overlap", "max_env_faults")
    resumable = True
    written = np.zeros(0, dtype=np.int64)  # it keeps no frames: all that is kept is in its state

    def __init__(self, env: Env, *, seed: Fixed[Seed] = 0, rollouts: Fixed[Several] = 5, memory: Fixed[Size] = 20) -> None:
        if env.spec.longest is None:
            raise UserError(
                f"env={env.name}: it has no time limit, and rollouts of one length are needed; set max_episode_steps"
            )
        if memory < rollouts:
            raise UserError(f"memory={memory}: an iteration has rollouts={rollouts}, which must be kept; at least as many")
        self.env, self.seed, self.rollouts, self.horizon = env, seed, rollouts, env.spec.longest
        shape = (env.count, self.horizon + 1, memory)
        self.x = torch.zeros(*shape, env.spec.x_dim, device=env.device)
        self.y = torch.zeros(*shape, env.domain.dim, device=env.device)  # the last of each is none
        self.collected = self.time = self.episode = 0
        self.prepared = False

    @property
    def waiting(self) -> Tensor:
        """(M, d), the contexts to act on now, on the training device."""
        return self.env.x.to(self.env.device)

    def prepare(self) -> None:
        """Go to the start states. Raises UserError if resets with the same seed give others."""
        if self.prepared:
            return
        first, again = self.env.reset(self.seed).clone(), self.env.reset(self.seed)
        if not torch.equal(first, again):
            raise UserError(
                f"env={self.env.name}: two resets with the same seed give different states, so it cannot be put back into one; "
                "an environment that draws its start from `self.np_random` alone is needed"
            )
        self.prepared = True

    def collect(self, choose: Callable[[], Tensor], most: int = 1) -> Collected:
        """Play one step in every environment. Raises Fault if an episode ends before the others."""
        x, y = self.env.x.to(self.env.device, copy=True), choose()
        step = self.env.step(y)
        last = self.time + 1 == self.horizon
        if not step.valid.all() or (step.over != last).any():
            raise Fault(
                f"env {self.env.name}: an episode has ended after {self.time + 1} steps, and the others have {self.horizon}; "
                "one that no state terminates is needed"
            )
        slot = self.episode % self.x.shape[2]
        self.x[:, self.time, slot], self.y[:, self.time, slot] = x, y
        self.x[:, self.time + 1, slot] = step.x_next.to(self.env.device)
        self.time, self.collected = self.time + 1, self.collected + self.env.count
        episodes = self.env.episodes()
        if last:
            self.time, self.episode = 0, self.episode + 1
            self.env.reset(self.seed)
        return Collected(x, self.env.count, episodes, step.over)

    def latest(self) -> Played:
        """The rollouts of the iteration that has ended."""
        return self._played(np.arange(self.episode - self.rollouts, self.episode))

    def recent(self) -> Played:
        """All rollouts that are kept."""
        return self._played(np.arange(max(0, self.episode - self.x.shape[2]), self.episode))

    def _played(self, episodes: np.ndarray) -> Played:
        at = torch.from_numpy(episodes % self.x.shape[2]).to(self.env.device)
        return Played(self.x[:, :, at], self.y[:, :-1, at])

    def sample(self, count: int) -> Played:
        """The same as `latest`: learning from rollouts is a fit's, which draws from them itself."""
        return self.latest()

    def state(self) -> Tree:
        """Everything that `restore` needs."""
        kept = {name: getattr(self, name) for name in ("x", "y", "collected", "time", "episode", "prepared")}
        return {**kept, "env": self.env.state()}

    def restore(self, state: Tree, frames: Iterable[Tree]) -> bool:
        """Restore what `state` returned; where the environments cannot go on, the episodes that are played begin again.

        Raises:
            ValueError: it has other shapes.
        """
        for name in ("x", "y"):
            ours: Tensor = getattr(self, name)
            if state[name].shape != ours.shape:
                raise ValueError(f"rollouts {name}: shape {tuple(state[name].shape)}; {tuple(ours.shape)} is needed")
            ours.copy_(state[name])
        self.collected, self.time, self.episode = (int(state[name]) for name in ("collected", "time", "episode"))
        exact = self.env.restore(state["env"])
        if not exact:
            self.time = 0
            self.env.reset(self.seed)
        self.prepared = bool(state["prepared"])
        return exact

    def frames_since(self, written: np.ndarray) -> Tree:
        """None."""
        return {"slots": 1, "high": self.written}
