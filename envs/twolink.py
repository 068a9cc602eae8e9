"""An arm of two links in a horizontal plane whose hand is to come to rest at a target, as equations in torch.

x (B, 6) = angles of shoulder and elbow in rad, their velocities in rad/s, target in m · u (B, 2) torques in N m
"""

import numpy as np
import torch
from rlamort.envs.equations import Equations, Moved
from torch import Tensor

from rlamort.config import NonNegative, Positive

LENGTH, MASS = (0.5, 0.5), (1.0, 1.0)  # m, kg; links are uniform rods
SECONDS = 0.05  # of a step


class TwoLink(Equations):
    """Reward -(|hand - target|^2 + 0.01 |velocity|^2 + 0.001 |torque|^2), by semi-implicit Euler steps of 0.05 s.

    Args:
        torque: largest, at each joint, in N m.
        damping: of the joints, in N m s.
        length: steps of an episode.
    """

    def __init__(self, torque: Positive = 2.0, damping: NonNegative = 0.1, length: int = 60) -> None:
        super().__init__(6, [torque] * 2, length)
        self.damping = damping

    def begin(self) -> np.ndarray:
        """Any angles at rest, and a target at the hand's place of other angles."""
        shoulder, elbow, *other = self.np_random.uniform(-np.pi, np.pi, 4)
        target = self.hand(torch.tensor([other]))[0].numpy()
        return np.array([shoulder, elbow, 0, 0, *target])

    def dynamics(self, x: Tensor, u: Tensor) -> Moved:
        q, w, target = torch.split(x, 2, -1)
        away = (self.hand(q) - target).square().sum(-1)
        reward = -(away + 0.01 * w.square().sum(-1) + 0.001 * u.square().sum(-1))
        w = w + SECONDS * self.acceleration(q, w, u)
        return torch.cat([q + SECONDS * w, w, target], -1), reward, torch.ones_like(reward)

    def acceleration(self, q: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """Of the joints (B, 2), at angles q, velocities w and torques u (B, 2)."""
        (first, second), (upper, lower) = LENGTH, MASS
        reach = lower * first * second / 2
        elbow = lower * second**2 / 3  # inertia of the lower link about the elbow
        a = upper * first**2 / 3 + lower * first**2 + elbow + 2 * reach * q[:, 1].cos()
        b, c = elbow + reach * q[:, 1].cos(), elbow
        pull = reach * q[:, 1].sin()
        free = u - self.damping * w
        left = free[:, 0] + pull * w[:, 1] * (2 * w[:, 0] + w[:, 1])
        right = free[:, 1] - pull * w[:, 0].square()
        return torch.stack([c * left - b * right, a * right - b * left], -1) / (a * c - b * b)[:, None]

    @staticmethod
    def hand(q: Tensor) -> Tensor:
        """Angles (B, 2) -> place of the hand (B, 2) in m."""
        slope = q.cumsum(-1)
        length = q.new_tensor(LENGTH)
        return torch.stack([(length * slope.cos()).sum(-1), (length * slope.sin()).sum(-1)], -1)
