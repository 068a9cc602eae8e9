"""Transition models, (x, y) -> (x_next, reward, continues).

x context (B, d) · y action (B, n) in [-1, 1]^n · E members of an ensemble
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlamort.domain import Box
from rlamort.errors import UserError

LARGE = 1e6  # a state or reward of that size has left what any environment's units are for
LAST = 1e9  # the cost where a model has diverged
Act = Callable[[int, Tensor], Tensor]  # a step t from 0 on, and x (B, d), or of several futures (E, B, d) -> y, likewise


class Moved(NamedTuple):
    """The results of an action."""

    x_next: Tensor  # (B, d)
    reward: Tensor  # (B,) for it
    continues: Tensor  # (B,) in [0, 1]: 0 where the task ends there, so that no reward follows


class Transitions(Protocol):
    """What dynamics are learned from: one-step transitions, as of `rlamort.source.Batch`."""

    @property
    def x(self) -> Tensor: ...  # (B, d)
    @property
    def y(self) -> Tensor: ...  # (B, n)
    @property
    def reward(self) -> Tensor: ...  # (B,)
    @property
    def terminated(self) -> Tensor: ...  # (B,) bool
    @property
    def x_next(self) -> Tensor: ...  # (B, d)


class Dynamics(nn.Module):
    """A transition model: (x (B, d), y (B, n)) -> results; items are independent.

    Attributes:
        differentiable: whether results have gradients with respect to actions.
        learned: whether it is fitted to transitions: it then has what `Trained` or `Conditioned` of learning.py name.
    """

    differentiable: bool = True
    learned: bool = False

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        raise NotImplementedError

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        """As `forward`, per member of an ensemble (E, B, .), from x (B, d) or from one per member (E, B, d)."""
        moved: Moved = self(x, y)
        return moved

    def settled(self, steps: int) -> "Dynamics":
        """These dynamics with the noise of so many steps drawn, the same for all items at every call; or these themselves."""
        return self

    def follow(self, x: Tensor, actions: Sequence[Tensor]) -> list[Moved]:
        """What follows from x (B, d) with H actions, each (B, n), one after another: as `futures`, of every step."""
        return self.unfold(x, lambda t, _: actions[t], len(actions))

    def unfold(self, x: Tensor, act: Act, steps: int) -> list[Moved]:
        """As `follow`, where each action follows from what came before it: in every future by itself."""
        path: list[Moved] = []
        for t in range(steps):
            at = path[-1].x_next if path else x
            path.append(self.futures(at, act(t, at)))
        return path


class Known(Dynamics):
    """Known dynamics, written in torch, and differentiable if gradients are needed.

    Args:
        step: x (B, d), u (B, n) -> x_next (B, d), reward (B,), continues (B,); u in the environment's own units.
        actions: where u lies.
        name: of the step, for messages.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], actions: Box, name: str) -> None:
        super().__init__()
        self.step, self.actions, self.name = step, actions, name

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return Moved(*self.step(x, self.actions.decode(y)))

    def require(self, x_dim: int) -> None:
        """Raises UserError if the step does not take contexts of `x_dim` numbers, or returns other shapes than needed."""
        x, y = torch.zeros(2, x_dim), torch.zeros(2, self.actions.dim)
        try:
            shapes: list[Any] = [tuple(part.shape) for part in self(x, y)]
        except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            shapes = [f"{type(error).__name__}: {error}"]
        if shapes != [(2, x_dim), (2,), (2,)]:
            raise UserError(
                f"dynamics={self.name}: for x of shape {tuple(x.shape)} and u of shape {tuple(y.shape)} it gives {shapes}; "
                f"x_next, reward and continues of shapes {tuple(x.shape)}, (2,) and (2,) are needed"
            )
