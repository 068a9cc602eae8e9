"""What follows an action, (x, y) -> (x_next, reward, continues), and plans through it as solutions of an objective.

x context (B, d) · y action (B, n) in [-1, 1]^n · H actions in a plan (B, H n) · E members of an ensemble
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlamort.domain import Box
from rlamort.errors import UserError
from rlamort.objective import Metrics, Objective


class Moved(NamedTuple):
    """What follows an action."""

    x_next: Tensor  # (B, d)
    reward: Tensor  # (B,) for it
    continues: Tensor  # (B,) in [0, 1]: 0 where the task ends there, so that no reward follows


class Dynamics(nn.Module):
    """(x (B, d), y (B, n)) -> what follows; no item depends on another."""

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        raise NotImplementedError


class Known(Dynamics):
    """Dynamics that somebody has written down, in torch and differentiable where derivatives are asked for.

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
        """Raises UserError where the step does not take contexts of `x_dim` numbers, or gives other shapes than it should."""
        x, y = torch.zeros(2, x_dim), torch.zeros(2, self.actions.dim)
        try:
            given: list[Any] = [tuple(part.shape) for part in self(x, y)]
        except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            given = [f"{type(error).__name__}: {error}"]
        if given != [(2, x_dim), (2,), (2,)]:
            raise UserError(
                f"dynamics={self.name}: for x of shape {tuple(x.shape)} and u of shape {tuple(y.shape)} it gives {given}; "
                f"x_next, reward and continues of shapes {tuple(x.shape)}, (2,) and (2,) are needed"
            )


class Trajectory(Objective):
    """f(y; x) = -sum_{t < H} discount^t r_t - discount^H tail(x_H), minus the return of a plan from x (tutorial, section 4.1).

    Nothing counts after an end: continues multiplies what follows it.

    Args:
        dynamics: what follows an action.
        horizon: H.
        discount: per step.
        tail: x (B, d) -> (B,), what the state after the plan is worth; None leaves it out.
    """

    def __init__(
        self, dynamics: Dynamics, horizon: int, discount: float = 1.0, tail: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.dynamics, self.horizon, self.discount, self.tail = dynamics, horizon, discount, tail

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        value, weight = y.new_zeros(len(y)), y.new_ones(len(y))
        for action in y.reshape(len(y), self.horizon, -1).unbind(1):
            x, reward, continues = self.dynamics(x, action)
            value = value + _weighed(weight, reward)
            weight = weight * self.discount * continues
        return -value if self.tail is None else -value - _weighed(weight, self.tail(x)), {}


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; nothing where the weight is 0, since what follows an end may be anything, NaN included."""
    return torch.where(weight > 0, weight * value, torch.zeros_like(value))
