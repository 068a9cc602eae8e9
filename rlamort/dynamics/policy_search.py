"""Objectives of a policy's actions that follow dynamics with the policy itself, to the end of an episode.

x start (B, d) · y first action (B, n) · z state with angles as numbers (D,) · w = (x, y) (k,) · H steps
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rlamort.dynamics.base import LARGE, LAST, Dynamics
from rlamort.dynamics.gaussian_process import Motion
from rlamort.dynamics.moments import Moments, sines
from rlamort.objective import Metrics, Objective


class Particles(Objective):
    """f(y; x) = -sum_{t < H} gamma^t r(x_t, y_t), of a particle from each start, with y first and then the policy's actions.

    Of stochastic dynamics each step is one draw, by reparameterised noise of torch's generator (Amadio et al., 2022: MC-PILCO).

    Args:
        dynamics: what follows an action.
        policy: x (B, d) -> y (B, n).
        horizon: H.
        discount: gamma.
        clip: largest norm of the derivative of an item's f in a state, where a loss is the mean of items; longer ones are cut,
            so that few particles near an unstable state do not undo what the others found. None leaves the gradient exact.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        policy: Callable[[Tensor], Tensor],
        horizon: int,
        discount: float = 1.0,
        clip: float | None = None,
    ) -> None:
        self.dynamics, self.policy, self.horizon, self.discount, self.clip = dynamics, policy, horizon, discount, clip

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        paid, goes = [], []
        for step in range(self.horizon):
            y = self.policy(x) if step else y
            moved = self.dynamics(x, y)
            x = moved.x_next.clamp(-LARGE, LARGE)  # what is cut off has no gradient
            if self.clip is not None and x.requires_grad:
                x.register_hook(functools.partial(shortened, most=self.clip / len(x)))  # type: ignore[no-untyped-call]
            paid.append(moved.reward)
            goes.append(moved.continues)
        reward, weight = torch.stack(paid), torch.stack([torch.ones_like(goes[0]), *goes[:-1]])  # (H, B)
        weight[1:] = (self.discount * weight[1:]).cumprod(0)
        value = torch.where(weight > 0, weight * reward, 0).sum(0)
        diverged = ~((x.abs() < LARGE).all(-1) & (value.abs() < LARGE))  # NaN is unsound, too
        return torch.where(diverged, LAST, -value), {"diverged": diverged.to(x).mean()}


def shortened(slope: Tensor, most: float) -> Tensor:
    """Gradients (B, d), those longer than `most` scaled to that length."""
    shorter: Tensor = slope * (most / torch.linalg.vector_norm(slope, dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return shorter


class Reward(Protocol):
    """A reward whose mean is known where w = (x, y) is normal, 0-d, of its mean (k,) and cov (k, k)."""

    def expected(self, mean: Tensor, cov: Tensor) -> Tensor: ...


class Uncertain(Protocol):
    """Dynamics that follow normal inputs w = (x, y)."""

    motion: Motion

    def moments(self, mean: Tensor, cov: Tensor) -> Moments: ...  # of how the state moves (D,)


class Beliefs(Objective):
    """f(y; x) = -sum_{t < H} gamma^t E[r(x_t, y_t)] by moment matching, the same number for every item.

    The starts x with their actions y are the first belief, the normal vector of their mean and covariance; what follows is one
    again, by the moments of policy and dynamics in closed form (Deisenroth and Rasmussen, 2011, sections 2.2 and 2.3).
    Angles are normal as numbers, and their cosines and sines have the moments that follow.

    Args:
        dynamics: what follows an action.
        reward: of a state and an action.
        policy: moments of y, where x is normal, of its mean (d,) and cov (d, d).
        horizon: H.
        discount: gamma.
    """

    def __init__(
        self,
        dynamics: Uncertain,
        reward: Reward,
        policy: Callable[[Tensor, Tensor], Moments],
        horizon: int,
        discount: float = 1.0,
    ) -> None:
        self.dynamics, self.reward, self.policy, self.horizon, self.discount = dynamics, reward, policy, horizon, discount
        adds, cos, _, turns, _ = dynamics.motion.maps
        self.lift, self.phase, self.which = (adds + turns).mT, math.pi / 2 * cos.sum(0), turns.sum(0) > 0  # x by sines of z

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        z, w = self.dynamics.motion.numbers(x.double()), torch.cat([x, y], -1).double()
        m, zc, mean = z.mean(0), z - z.mean(0), w.mean(0)
        S, joint, cov = zc.mT @ zc / len(z), zc.mT @ (w - mean) / len(z), (w - mean).mT @ (w - mean) / len(z)
        value = torch.zeros_like(mean[0])
        for step in range(self.horizon):
            if step:
                mean, cov, joint = self._acted(m, S)
            value = value + self.discount**step * self.reward.expected(mean, cov)
            moved = self.dynamics.moments(mean, cov)
            turned = joint @ moved.slope  # cov(z, how it moves)
            m, S = m + moved.mean, S + moved.cov + turned + turned.mT
        return -value.to(x).expand(len(x)), {"deviation": S.diagonal().clamp_min(0).sum().sqrt().detach()}

    def _acted(self, m: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of z ~ N(m, S): mean and cov of w, with the policy's actions, and the covariance of z and w (D, k)."""
        lift = self.lift.to(m)
        state = sines(lift @ m + self.phase.to(m), lift @ S @ lift.mT, self.which.to(m.device))
        act = self.policy(state.mean, state.cov)
        beside = S @ lift.mT @ state.slope
        across = state.cov @ act.slope
        cov = torch.cat([torch.cat([state.cov, across], 1), torch.cat([across.mT, act.cov], 1)])
        return torch.cat([state.mean, act.mean]), cov, torch.cat([beside, beside @ act.slope], 1)
