"""Inverse kinematics of a MuJoCo arm: the joint angles that bring its hand to a target.

y joint angles (B, n): turn, then one for each link · x target (B, 3), metres · f cost (B,)
"""

from collections.abc import Sequence

import mujoco
import torch
from torch import Tensor

from rlamort.config import Positive
from rlamort.domain import Box
from rlamort.errors import UserError
from rlamort.problem import Problem

TURN, BEND = 2.6, 2.0  # limits of the joints, in radians: of the turn about the vertical, and of each bend
RADIUS = 0.03  # of the links, in metres


class Arm(Problem[Tensor]):
    """f(y; x) = |hand(y) - x|^2 + comfort mean_i (y_i / limit_i)^2, the squared distance with a penalty on bent joints.

    The base turns about the vertical, and every link bends in the vertical plane of that turn. Targets are the hand's positions
    at joint angles uniform within their limits, so that each is reachable.

    Args:
        lengths: of the links, in metres, from the base outwards.
        comfort: weight of the penalty in square metres, which is the penalty with every joint at its limit.

    Raises:
        UserError: there is no link, or a length or comfort is not positive.
    """

    lengths: Tensor
    limit: Tensor

    def __init__(self, lengths: Sequence[float] = (0.5, 0.4, 0.2), comfort: Positive = 1e-4) -> None:
        super().__init__()
        if not lengths or min(lengths) <= 0:
            raise UserError(f"Arm.lengths={list(lengths)}: at least one link, all of positive length, is needed")
        if not comfort > 0:
            raise UserError(f"Arm.comfort={comfort}: a positive number is needed")
        limit = [TURN] + [BEND] * len(lengths)
        self.domain = Box([-angle for angle in limit], limit)
        self.comfort = comfort
        self.register_buffer("lengths", torch.tensor([float(length) for length in lengths]))
        self.register_buffer("limit", torch.tensor(limit))

    def contexts(self, count: int) -> Tensor:
        share = 2 * torch.rand(count, len(self.limit), device=self.limit.device) - 1
        return self.hand(share * self.limit)

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return (self.hand(y) - x).square().sum(-1) + self.comfort * (y / self.limit).square().mean(-1)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """The distance between hand and target in metres; comfort shifts the optimum by hundredths of a millimetre."""
        distance: Tensor = torch.linalg.vector_norm(self.hand(y) - x, dim=-1)
        return distance

    def hand(self, y: Tensor) -> Tensor:
        """y (B, n) -> position of the hand (B, 3), in metres; z points up."""
        turn, slope = y[:, :1], y[:, 1:].cumsum(-1)  # of each link against the horizontal
        reach = (self.lengths * slope.cos()).sum(-1, keepdim=True)
        height = (self.lengths * slope.sin()).sum(-1, keepdim=True)
        return torch.cat([reach * turn.cos(), reach * turn.sin(), height], dim=-1)

    def joints(self, y: Tensor) -> Tensor:
        """y (B, n) -> positions of both ends of all links (B, links + 1, 3), in metres, from the base to the hand."""
        turn, slope = y[:, :1], y[:, 1:].cumsum(-1)
        reach, height = (self.lengths * slope.cos()).cumsum(-1), (self.lengths * slope.sin()).cumsum(-1)  # (B, links)
        ends = torch.stack([reach * turn.cos(), reach * turn.sin(), height], dim=-1)
        return torch.cat([torch.zeros_like(ends[:, :1]), ends], dim=1)

    def model(self) -> mujoco.MjModel:
        """The same arm in MuJoCo: a hinge for each angle, in order, and the site "hand"."""
        return self.spec().compile()

    def spec(self) -> mujoco.MjSpec:
        """What `model` compiles: capsules "link0", "link1" and so on."""
        spec = mujoco.MjSpec()
        spec.compiler.degree = False
        body, at = spec.worldbody, 0.0
        lengths, limit = self.lengths.tolist(), self.limit.tolist()
        for i, length in enumerate(lengths):
            body = body.add_body(name=f"link{i}", pos=[at, 0, 0])
            if i == 0:
                body.add_joint(name="turn", axis=[0, 0, 1], range=[-limit[0], limit[0]])
            body.add_joint(name=f"bend{i}", axis=[0, -1, 0], range=[-limit[i + 1], limit[i + 1]])
            body.add_geom(
                name=f"link{i}", type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0, length, 0, 0], size=[RADIUS, 0, 0]
            )
            at = length
        body.add_site(name="hand", pos=[at, 0, 0])
        return spec
