"""Pendulum-v1's equations of motion in torch, for planners: what `gymnasium.envs.classic_control.PendulumEnv` computes.

x (B, 3) = cos theta, sin theta, angular velocity in rad/s, with theta = 0 upright · u (B, 1) torque in N m
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Moved = tuple[Tensor, Tensor, Tensor]  # x_next (B, 3), reward (B,), continues (B,)


def dynamics(env: Any) -> Callable[[Tensor, Tensor], Moved]:
    """The step of such an environment, with its constants of the moment; gradients stop where speed or torque are clipped."""

    def step(x: Tensor, u: Tensor) -> Moved:
        pull, push = 3 * env.g / (2 * env.l), 3 / (env.m * env.l**2)
        theta, velocity = torch.atan2(x[:, 1], x[:, 0]), x[:, 2]
        torque = u[:, 0].clamp(-env.max_torque, env.max_torque)
        reward = -(theta.square() + 0.1 * velocity.square() + 0.001 * torque.square())
        velocity = velocity + (pull * theta.sin() + push * torque) * env.dt
        velocity = velocity.clamp(-env.max_speed, env.max_speed)
        theta = theta + velocity * env.dt  # by the new velocity: semi-implicit Euler
        return torch.stack([theta.cos(), theta.sin(), velocity], -1), reward, torch.ones_like(reward)

    return step
