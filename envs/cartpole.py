"""A pole on a cart that is to be swung up and balanced, as equations in torch.

x (B, 5) = position in m, velocity in m/s, cos theta, sin theta, angular velocity in rad/s, with theta = 0 upright
· u (B, 1) force on the cart in N
"""

import math

import numpy as np
import torch
from rlamort.envs.equations import Equations, Moved
from torch import Tensor

from rlamort.config import Positive, Size
from rlamort.domain import Box, unit_box
from rlamort.dynamics import Known, Trajectory
from rlamort.problem import Problem

GRAVITY, CART, POLE, HALF = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m: half of the pole's length
SECONDS = 0.05  # of a step


class CartPole(Equations):
    """Reward cos(theta) - 0.1 position^2 - 1e-5 force^2 (Amos and Yarats, 2020), by semi-implicit Euler steps of 0.05 s.

    The equations of motion are those of Barto, Sutton and Anderson (1983) without friction. The track has no end.

    Args:
        force: largest force, in N.
        angle: largest deviation of the pole from hanging at the start of an episode, in radians; pi is any.
        length: steps of an episode.
    """

    def __init__(self, force: Positive = 10.0, angle: Positive = 0.2, length: int = 100) -> None:
        super().__init__(5, [force], length)
        self.angle = angle

    def begin(self) -> np.ndarray:
        position, speed, share, turn = self.np_random.uniform(-1, 1, 4)
        theta = np.pi + self.angle * share
        return np.array([0.5 * position, 0.5 * speed, np.cos(theta), np.sin(theta), turn])

    def dynamics(self, x: Tensor, u: Tensor) -> Moved:
        position, speed, cos, sin, turn = x.unbind(-1)
        force, total = u[:, 0], CART + POLE
        reward = cos - 0.1 * position.square() - 1e-5 * force.square()
        push = (force + POLE * HALF * turn.square() * sin) / total
        spin = (GRAVITY * sin - cos * push) / (HALF * (4 / 3 - POLE * cos.square() / total))
        pace = push - POLE * HALF * spin * cos / total
        speed, turn = speed + SECONDS * pace, turn + SECONDS * spin
        theta = torch.atan2(sin, cos) + SECONDS * turn
        moved = torch.stack([position + SECONDS * speed, speed, theta.cos(), theta.sin(), turn], -1)
        return moved, reward, torch.ones_like(reward)


class CartPolePlan(Problem[Tensor]):
    """A plan of H forces from a start of any angle: f(y; x) is minus the return (Amos and Yarats, 2020, section 5.2).

    Starts have positions and velocities up to 0.5 and angular velocities up to 1; y is in units of the largest force.

    Args:
        horizon: H.
        force: the largest, in N.
    """

    def __init__(self, horizon: Size = 20, force: Positive = 100.0) -> None:
        super().__init__()
        self.domain = unit_box(horizon)
        self.dynamics = Known(CartPole(force).dynamics, Box([-force], [force]), "CartPole")
        self.trajectory = Trajectory(self.dynamics, horizon)

    def contexts(self, count: int) -> Tensor:
        share = 2 * torch.rand(4, count) - 1
        theta = math.pi * share[2]
        return torch.stack([0.5 * share[0], 0.5 * share[1], theta.cos(), theta.sin(), share[3]], -1)

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return self.trajectory(y, x)
