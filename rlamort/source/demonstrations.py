"""What experts have shown: contexts, their labels, and what was played there.

C capacity · B batch · d = x_dim · n = dim of an action
"""

import numpy as np
import torch
from torch import Tensor

from rlamort.domain import Domain
from rlamort.source.base import Labelled, Tree


class Demonstrations:
    """A growing set of labels on the training device. Every so many episodes one is held out, and never sampled.

    Whole episodes are held out, since the states of one resemble each other.

    Args:
        capacity: C, how many it can hold.
        x_dim: d.
        domain: Y, where labels lie.
        held_out: share of episodes that are held out, below a half; the first is not.
        device: of the tensors.

    Attributes:
        count: how many there are.
    """

    def __init__(self, capacity: int, x_dim: int, domain: Domain, held_out: float, device: torch.device) -> None:
        self.share, self.count, self.device = held_out, 0, device
        self.x = torch.empty(capacity, x_dim, device=device)
        self.y = torch.empty(capacity, domain.dim, device=device)
        self.played = torch.empty(capacity, domain.dim, device=device)
        self.episode = np.empty(capacity, dtype=np.int64)  # on the host, where it is decided what is held out
        self._trained = torch.empty(capacity, dtype=torch.int64, device=device)  # indices of those that are sampled
        self._many = 0  # of those; also where `sample` reads it, which may be captured
        self._many_there = torch.zeros((), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return self.count

    def held(self, episode: np.ndarray) -> np.ndarray:
        """Which of these episodes (k,), counted from 0, are held out."""
        before, after = (np.floor((episode + more) * self.share + 0.5) for more in (0, 1))
        kept: np.ndarray = after > before
        return kept

    def add(self, x: Tensor, y: Tensor, played: Tensor, episode: np.ndarray) -> None:
        """k labels y (k, n) of contexts x (k, d), the actions that were played there (k, n), and their episodes (k,)."""
        at = slice(self.count, self.count + len(x))
        self.x[at], self.y[at], self.played[at], self.episode[at] = x, y, played, episode
        fresh = np.arange(at.start, at.stop)[~self.held(episode)]
        self._trained[self._many : self._many + len(fresh)] = torch.from_numpy(fresh).to(self.device)
        self.count, self._many = at.stop, self._many + len(fresh)
        self._many_there.fill_(self._many)

    def sample(self, count: int) -> Labelled:
        """`count` labels, uniformly and with replacement, from those that are not held out."""
        # one in 2^62 over the number of labels: no bias that anything could notice, and no bound read from the host
        index = self._trained[torch.randint(2**62, (count,), device=self.device) % self._many_there]
        return Labelled(self.x[index], self.y[index])

    def trained(self) -> Labelled:
        """All that may be sampled."""
        index = self._trained[: self._many]
        return Labelled(self.x[index], self.y[index])

    def held_out(self) -> Labelled:
        """All that are held out, perhaps none."""
        index = torch.from_numpy(np.flatnonzero(self.held(self.episode[: self.count]))).to(self.device)
        return Labelled(self.x[index], self.y[index])

    def state(self) -> Tree:
        """Everything that `restore` needs."""
        tensors = {name: getattr(self, name)[: self.count] for name in ("x", "y", "played", "episode")}
        return {**tensors, "count": self.count}

    def restore(self, state: Tree) -> None:
        """Restore what `state` returned. Raises ValueError if it does not fit."""
        if state["count"] > len(self.x):
            raise ValueError(f"{state['count']} labels; at most {len(self.x)} are allowed")
        self.count = self._many = 0
        x, y, played = (state[name].to(self.device) for name in ("x", "y", "played"))
        self.add(x, y, played, state["episode"])
