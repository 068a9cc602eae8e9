"""Plans through dynamics as solutions of an objective.

x context (B, d) · H actions in a plan (B, H n), each in [-1, 1]^n
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlamort.dynamics.base import LARGE, LAST, Dynamics, Moved
from rlamort.objective import Metrics, Objective, Oracle


class Trajectory(Objective):
    """f(y; x) = -sum_{t < H} discount^t r_t - discount^H tail(x_H), minus the return of a plan from x (tutorial, section 4.1).

    Nothing counts after an end: continues multiplies what follows it. Of several futures the mean counts. Where a learned model
    diverges in one of them, f is `LAST`, above what any sound plan costs, since what it promises there means nothing.

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

    def oracle(self, x: Tensor) -> Oracle:
        """With the same noise at every query, if the dynamics have some."""
        return Oracle(self.settled(), self.seen(x))

    def settled(self) -> "Trajectory":
        """With noise that is drawn already, if the dynamics have some."""
        held = self.dynamics.settled(self.horizon)
        return self if held is self.dynamics else Trajectory(held, self.horizon, self.discount, self.tail)

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return self.cost(self.dynamics.follow(x, y.reshape(len(y), self.horizon, -1).unbind(1))), {}

    def cost(self, path: Sequence[Moved]) -> Tensor:
        """f (B,) of what followed: `LAST` where one of the futures of learned dynamics has diverged."""
        value = self.total(path)  # (..., B)
        mean = value.view(-1, value.shape[-1]).mean(0)
        if not self.dynamics.learned:
            return -mean
        return torch.where(diverged(path).view(-1, len(mean)).any(0), LAST, -mean)

    def total(self, path: Sequence[Moved]) -> Tensor:
        """The return (..., B) of what followed from H actions, (..., B, d), (..., B), (..., B) of each."""
        after = self.discount * torch.stack([moved.continues for moved in path])  # (H, ..., B)
        weights = [torch.ones_like(path[0].reward)]
        for step in after:
            weights.append(weights[-1] * step)
        value = torch.zeros_like(path[0].reward)
        for part in _weighed(torch.stack(weights[:-1]), torch.stack([moved.reward for moved in path])):
            value = value + part  # in this order, whatever the size of a batch
        if self.tail is not None:
            value = value + _weighed(weights[-1], self.tail(path[-1].x_next.flatten(0, -2)).view_as(value))
        return value


def diverged(path: Sequence[Moved]) -> Tensor:
    """Whether a state or reward (..., B) on the way is none that counts: NaN, or beyond `LARGE`."""
    states, rewards = (torch.stack(parts).detach().abs() for parts in ([m.x_next for m in path], [m.reward for m in path]))
    return ~(states.amax((0, -1)).maximum(rewards.amax(0)) < LARGE)


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; 0 where the weight is 0, since values after a terminal state are arbitrary, and may be NaN."""
    return torch.where(weight > 0, weight * value, 0)
