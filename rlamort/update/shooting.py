"""Multiple shooting: a plan in segments, each from a state of its own.

x state (B, d) · y plan (B, H n) · M segments of H / M steps
· gap: where a segment ends less where the next begins (B, M - 1, d)
"""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.config import Count, Positive
from rlamort.domain import Domain
from rlamort.dynamics import Moved, Trajectory
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update
from rlamort.update.ilqr import returns_of


class MultipleShooting(Update):
    """Adam over a plan and the states where its segments begin, by the augmented Lagrangian of the gaps (Bock and Plitt, 1984).

    Segments are followed side by side, so that derivatives run through H / M steps one after another instead of H. Multipliers
    rise by a share of the gaps in every step. An iterate is its plan, and costs what follows from the first state alone; where
    dynamics are unstable that is more than the segments cost until the gaps are closed. With one segment it is `Adam`. The
    oracle's f must be a `Trajectory` through differentiable dynamics with one future.

    Args:
        domain: Y, plans.
        segments: M, which divides H.
        rate: Adam's step size, of actions and states.
        weight: of half the squared gaps.
        share: of weight times gap that is added to the multipliers.

    Raises:
        UserError: M is below 1, or H is no multiple of it.
    """

    def __init__(
        self, domain: Domain, segments: Count = 4, rate: Positive = 0.05, weight: Positive = 10.0, share: Positive = 0.1
    ) -> None:
        super().__init__()
        if segments < 1:
            raise UserError(f"update.segments: {segments} given; at least 1 is needed")
        self.domain, self.segments, self.rate, self.weight, self.share = domain, segments, rate, weight, share

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """States between segments, as the plan leads there, multipliers, each (B, M - 1, d), and Adam's moments and steps."""
        f = returns_of(oracle)
        if f.horizon % self.segments:
            raise UserError(f"update.segments: {self.segments} given; a divisor of the {f.horizon} actions of a plan is needed")
        with torch.no_grad():
            path = f.dynamics.follow(oracle.x, y.reshape(len(y), f.horizon, -1).unbind(1))
        every = f.horizon // self.segments
        states = torch.stack([oracle.x, *(moved.x_next for moved in path)], 1)[:, every:-1:every]  # (B, M - 1, d)
        moment = torch.zeros_like(torch.cat([y, states.flatten(1)], -1))
        return states, torch.zeros_like(states), moment, moment.clone(), y.new_zeros(len(y), 1)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        states, prices, mean, square, steps = h
        f, v = returns_of(oracle), torch.cat([y, states.flatten(1)], -1)
        with torch.enable_grad():
            at = v.detach().requires_grad_()
            plan, begun = at[:, : y.shape[-1]], at[:, y.shape[-1] :].view_as(states)
            cost, gaps = self.followed(f, plan, torch.cat([oracle.x[:, None], begun], 1))
            bent = cost + ((prices + self.weight / 2 * gaps) * gaps).sum((1, 2))
            (slope,) = torch.autograd.grad(bent.sum(), at)
        mean, square, steps = mean.lerp(slope, 0.1), square.lerp(slope.square(), 0.001), steps + 1
        v = v - self.rate / (1 + steps / 50) * (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
        y, states = v[:, : y.shape[-1]], v[:, y.shape[-1] :].view_as(states)
        prices = prices + self.share * self.weight * gaps.detach()
        return self.domain.nearest(y), (states, prices, mean, square, steps)

    def followed(self, f: Trajectory, plan: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
        """A plan (B, H n) and where its segments begin (B, M, d) -> f over all segments (B,), and the gaps (B, M - 1, d)."""
        (count, _, d), every = begun.shape, f.horizon // self.segments
        actions = plan.reshape(count * self.segments, every, -1).unbind(1)
        path: list[Moved] = f.dynamics.follow(begun.flatten(0, 1), actions)
        paid = Trajectory(f.dynamics, every, f.discount).total(path).view(count, -1)
        goes_on = torch.stack([f.discount * moved.continues for moved in path]).prod(0).view(count, -1)
        weight = torch.cat([torch.ones_like(goes_on[:, :1]), goes_on], 1).cumprod(1)  # (B, M + 1), before each segment
        ends = path[-1].x_next.view(count, self.segments, d)
        tail = 0 if f.tail is None else weight[:, -1] * f.tail(ends[:, -1])
        return -(weight[:, :-1] * paid).sum(1) - tail, ends[:, :-1] - begun[:, 1:]
