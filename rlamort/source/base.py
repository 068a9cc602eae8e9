"""Batches of fixed shape, as sources return them. N environments side by side · B batch · d = x_dim · n = dim of an action"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

from rlamort.env import Episode

Tree = dict[str, Any]  # plain values, arrays and tensors, nested: what a checkpoint holds


class Batch(NamedTuple):
    """Transitions. An n-step one has m <= n steps: fewer where its episode ended, or has not yet gone on."""

    x: Tensor  # (B, d)
    y: Tensor  # (B, n) in [-1, 1]^n
    reward: Tensor  # (B,) sum_k discount^k r_k over the m steps
    discount: Tensor  # (B,) discount^m
    terminated: Tensor  # (B,) bool: x_next has no future
    x_next: Tensor  # (B, d) the true successor after m steps

    def through(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With its contexts as `function` gives them."""
        return self._replace(x=function(self.x), x_next=function(self.x_next))


class Contexts(NamedTuple):
    """Contexts alone, of a problem whose objective is known."""

    x: Tensor  # (B, d)

    def through(self, function: Callable[[Tensor], Tensor]) -> Self:
        """As `function` gives them."""
        return self._replace(x=function(self.x))


class Labelled(NamedTuple):
    """Contexts with solutions that are computed beforehand."""

    x: Tensor  # (B, d)
    y: Tensor  # (B, n) in Y

    def through(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With its contexts as `function` gives them."""
        return self._replace(x=function(self.x))


class Collected(NamedTuple):
    """The results of one round of collecting."""

    x: Tensor  # (N, d) the contexts acted on
    transitions: int  # how many
    episodes: list[Episode]  # that ended in this round
    over: np.ndarray  # (N,) bool: the context that waits now belongs to another episode
