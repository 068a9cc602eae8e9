"""Transition models, (x, y) -> (x_next, reward, continues), and plans through them as solutions of an objective.

x context (B, d) · y action (B, n) in [-1, 1]^n · H actions in a plan (B, H n) · E members of an ensemble
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlamort import nets
from rlamort.domain import Box
from rlamort.errors import UserError
from rlamort.objective import Metrics, Objective


class Moved(NamedTuple):
    """The results of an action."""

    x_next: Tensor  # (B, d)
    reward: Tensor  # (B,) for it
    continues: Tensor  # (B,) in [0, 1]: 0 where the task ends there, so that no reward follows


class Dynamics(nn.Module):
    """A transition model: (x (B, d), y (B, n)) -> results; items are independent.

    Attributes:
        differentiable: whether results have gradients with respect to actions.
    """

    differentiable: bool = True

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        raise NotImplementedError

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        """As `forward`, per member of an ensemble (E, B, .), from x (B, d) or from one per member (E, B, d)."""
        moved: Moved = self(x, y)
        return moved

    def follow(self, x: Tensor, actions: Sequence[Tensor]) -> list[Moved]:
        """What follows from x (B, d) with H actions, each (B, n), one after another: as `futures`, of every step."""
        path: list[Moved] = []
        for action in actions:
            path.append(self.futures(path[-1].x_next if path else x, action))
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


class Squared(nn.Module):
    """The squared error of an ensemble, whose members predict means."""

    outputs = 1  # numbers for each coordinate

    def __init__(self, coordinates: int) -> None:
        super().__init__()

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, k), targets (E, B, k) -> loss of each member (E,)."""
        return (outputs - target).square().mean((1, 2))


class Normal(nn.Module):
    """The negative log-likelihood of normals whose mean and log-variance each member predicts (Chua et al., 2018, eq. 1).

    Log-variances are bounded softly, by bounds that are learned and that a small cost draws together (their appendix A.1).

    Args:
        coordinates: k.
    """

    outputs = 2

    def __init__(self, coordinates: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.full((coordinates,), -10.0))
        self.high = nn.Parameter(torch.full((coordinates,), 0.5))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, 2 k), targets (E, B, k) -> loss of each member (E,)."""
        mean, log = outputs.chunk(2, -1)
        log = self.high - nn.functional.softplus(self.high - log)
        log = self.low + nn.functional.softplus(log - self.low)
        likelihood = ((mean - target).square() * (-log).exp() + log).mean((1, 2))
        return likelihood + 0.01 * (self.high - self.low).mean()


class Ensemble(Dynamics):
    """E networks of the change of state and the reward, learned from transitions; inputs and targets are standardised.

    Each member predicts (x_next - x, reward) from (x, y), and they differ by what the data leave open. What follows is their
    mean; plans are followed through each of them by itself (Chua et al., 2018, section 5: TS-infinity, without noise). Where
    tasks end is not learned: they go on.

    Args:
        x_dim: d.
        y_dim: n.
        hidden: widths of the hidden layers.
        members: E.
        likelihood: `Squared` or `Normal`, what the members' outputs mean and how well they fit.
    """

    scales: Tensor
    shifts: Tensor

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int],
        members: int,
        likelihood: Callable[[int], Squared | Normal] = Normal,
    ) -> None:
        super().__init__()
        self.x_dim, self.members, self.inputs, k = x_dim, members, x_dim + y_dim, x_dim + 1
        self.likelihood = likelihood(k)
        self.net = nets.Ensemble(members, self.inputs, hidden, self.likelihood.outputs * k)
        self.register_buffer("shifts", torch.zeros(self.inputs + k))
        self.register_buffer("scales", torch.ones(self.inputs + k))

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return Moved(*(part.mean(0) for part in self.futures(x, y)))

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        mean = self._outputs(torch.cat([x, y.expand(*x.shape[:-1], -1)], -1))[..., : self.x_dim + 1]
        change = self.shifts[self.inputs :] + self.scales[self.inputs :] * mean  # (E, B, d + 1)
        reward = change[..., -1]
        return Moved(x + change[..., :-1], reward, torch.ones_like(reward))

    def loss(self, pairs: Tensor) -> Tensor:
        """Pairs (E, B, inputs + d + 1) of `pairs`, for each member its own -> the sum of the members' losses."""
        inputs, target = torch.split(pairs, [self.inputs, self.x_dim + 1], -1)
        scaled = (target - self.shifts[self.inputs :]) / self.scales[self.inputs :]
        losses: Tensor = self.likelihood(self._outputs(inputs), scaled)  # (E,)
        return losses.sum()

    @staticmethod
    def pairs(x: Tensor, y: Tensor, x_next: Tensor, reward: Tensor) -> Tensor:
        """Transitions of shapes (B, .) as inputs and targets, concatenated: (B, d + n + d + 1)."""
        return torch.cat([x, y, x_next - x, reward[:, None]], -1)

    @torch.no_grad()
    def standardise(self, pairs: Tensor) -> None:
        """Set the mean and standard deviation of inputs and targets to those of pairs (B, .)."""
        spread = pairs.std(0, correction=0)
        self.shifts.copy_(pairs.mean(0))
        self.scales.copy_(torch.where(spread > 1e-6, spread, 1))  # a coordinate that never moves stays at its mean

    def _outputs(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net((inputs - self.shifts[: self.inputs]) / self.scales[: self.inputs])
        return outputs


class Trajectory(Objective):
    """f(y; x) = -sum_{t < H} discount^t r_t - discount^H tail(x_H), minus the return of a plan from x (tutorial, section 4.1).

    Nothing counts after an end: continues multiplies what follows it. Of several futures the mean counts.

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
        path = self.dynamics.follow(x, y.reshape(len(y), self.horizon, -1).unbind(1))
        return -self.total(path).view(-1, len(y)).mean(0), {}

    def total(self, path: Sequence[Moved]) -> Tensor:
        """The return (..., B) of what followed from H actions, (..., B, d), (..., B), (..., B) of each."""
        value, weight = torch.zeros_like(path[0].reward), torch.ones_like(path[0].reward)
        for _, reward, continues in path:
            value = value + _weighed(weight, reward)
            weight = weight * self.discount * continues
        if self.tail is not None:
            value = value + _weighed(weight, self.tail(path[-1].x_next.flatten(0, -2)).view_as(weight))
        return value


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; 0 where the weight is 0, since values after a terminal state are arbitrary, and may be NaN."""
    return torch.where(weight > 0, weight * value, torch.zeros_like(value))
