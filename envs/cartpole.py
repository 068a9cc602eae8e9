"""A pole on a cart that is to be swung up and balanced, as equations in torch.

x (B, 5) = position in m, velocity in m/s, cos theta, sin theta, angular velocity in rad/s, with theta = 0 upright
· u (B, 1) force on the cart in N
"""

import math
from typing import Any

import gymnasium
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
WIDTH, HEIGHT, METRE = 600, 400, 120  # of a picture, in pixels


class CartPole(Equations):
    """Reward cos(theta) - 0.1 position^2 - 1e-5 force^2 (Amos and Yarats, 2020), by semi-implicit Euler steps of 0.05 s.

    The equations of motion are those of Barto, Sutton and Anderson (1983) without friction. The track has no end.

    Args:
        force: largest force, in N.
        angle: largest deviation of the pole from hanging at the start of an episode, in radians; pi is any.
        length: steps of an episode.
        render_mode: rgb_array, for pictures; None for none.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": round(1 / SECONDS)}  # noqa: RUF012

    def __init__(
        self, force: Positive = 10.0, angle: Positive = 0.2, length: int = 100, render_mode: str | None = None
    ) -> None:
        super().__init__(5, [force], length)
        self.angle, self.render_mode = angle, render_mode

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

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The cart, its pole and marks of metres on the track (HEIGHT, WIDTH, 3), with the cart near the middle."""
        try:
            from PIL import Image, ImageDraw
        except ImportError as error:
            raise gymnasium.error.DependencyNotInstalled("pictures need pillow: pip install 'rlamort[video]'") from error
        position, _, cos, sin, _ = self.x.astype(float)
        fine = 2  # drawn larger, and reduced, for smooth edges
        metre, middle, track = fine * METRE, fine * WIDTH / 2, fine * HEIGHT / 2
        left = position - np.clip(position, -1.4, 1.4)  # of the picture's middle from the track's, in metres
        image = Image.new("RGB", (fine * WIDTH, fine * HEIGHT), "white")
        draw = ImageDraw.Draw(image)
        draw.line([(0, track), (fine * WIDTH, track)], "black", 2 * fine)
        for mark in range(int(left) - 4, int(left) + 5):
            at = middle + metre * (mark - left)
            draw.line([(at, track), (at, track + 0.1 * metre)], "black", 2 * fine)
        cart = middle + metre * (position - left)
        draw.rectangle([cart - 0.2 * metre, track - 0.1 * metre, cart + 0.2 * metre, track + 0.1 * metre], "#4c72b0")
        tip = (cart + metre * 2 * HALF * sin, track - metre * 2 * HALF * cos)
        draw.line([(cart, track), tip], "#c44e52", 8 * fine)
        return np.asarray(image.resize((WIDTH, HEIGHT)))


class SwingUp(CartPole):
    """The task of PILCO (Deisenroth and Rasmussen, 2011, section 3.1): from rest, hanging, with forces held for 0.1 s.

    Starts are hanging at rest but for normal noise of 0.1 in every coordinate. The reward saturates,
    exp(-(position^2 + (cos theta - 1)^2 + sin theta^2) / 4) - 1: 0 where all is done, and -0.63 where the pole hangs.

    Args:
        force: largest force, in N.
        length: steps of an episode.
        render_mode: as of `CartPole`.
    """

    def __init__(self, force: Positive = 10.0, length: int = 40, render_mode: str | None = None) -> None:
        super().__init__(force, length=length, render_mode=render_mode)

    def begin(self) -> np.ndarray:
        position, speed, angle, turn = 0.1 * self.np_random.standard_normal(4)
        theta = np.pi + angle
        return np.array([position, speed, np.cos(theta), np.sin(theta), turn])

    def dynamics(self, x: Tensor, u: Tensor) -> Moved:
        position, _, cos, sin, _ = x.unbind(-1)
        reward = torch.expm1(-(position.square() + (cos - 1).square() + sin.square()) / 4)
        between, _, _ = super().dynamics(x, u)
        after, _, continues = super().dynamics(between, u)
        return after, reward, continues


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
