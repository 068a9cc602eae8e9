"""Inverse kinematics of a MuJoCo arm beside an obstacle that no link may touch.

y joint angles (B, n) · x target of the hand and centre of the obstacle (B, 3) each, metres · f cost (B,) · L links
"""

from collections.abc import Sequence

import mujoco
import torch
from torch import Tensor

from rlamort.config import Positive
from rlamort.envs.arm import RADIUS, Arm
from rlamort.errors import UserError
from rlamort.problem import Problem

TRIES = 32  # places of the obstacle for a target, of which the first that a known solution clears is taken
ASIDE = 0.2  # metres, largest distance of the obstacle's centre from the straight line to the target


class ObstacleArm(Problem[dict[str, Tensor]]):
    """The inverse kinematics of `Arm`, where every link keeps its distance from a sphere: one nonlinear inequality a link.

    Targets are the hand's positions at joint angles uniform within their limits. The sphere is about the straight line to the
    target, where it does not touch the arm at these angles, so that each target is reachable: often not by the angles that are
    best without the sphere.

    Args:
        lengths: of the links, in metres, from the base outwards.
        comfort: weight of the penalty on bent joints, as in `Arm`.
        radius: of the sphere, in metres.
        margin: least distance between the surfaces of sphere and links, in metres.

    Raises:
        UserError: there is no link, or a number is not positive.
    """

    violation_penalty = 100.0

    def __init__(
        self,
        lengths: Sequence[float] = (0.5, 0.4, 0.2),
        comfort: Positive = 1e-4,
        radius: Positive = 0.15,
        margin: Positive = 0.01,
    ) -> None:
        super().__init__()
        for name, size in {"radius": radius, "margin": margin}.items():
            if not size > 0:
                raise UserError(f"ObstacleArm.{name}={size}: a positive number is needed")
        self.arm = Arm(lengths, comfort)
        self.domain = self.arm.domain
        self.radius, self.margin = radius, margin

    def contexts(self, count: int) -> dict[str, Tensor]:
        limit, lengths = self.arm.limit, self.arm.lengths
        y = (2 * torch.rand(count, len(limit), device=limit.device) - 1) * limit
        joints = self.arm.joints(y)  # (B, L + 1, 3)
        ends = joints.expand(TRIES, *joints.shape)
        along = torch.rand(TRIES, count, 1, device=limit.device)
        direction = torch.nn.functional.normalize(torch.randn(TRIES, count, 3, device=limit.device), dim=-1)
        aside = ASIDE * torch.rand(TRIES, count, 1, device=limit.device)
        tries = along * joints[:, -1] + aside * direction  # (TRIES, B, 3)
        clear = (separation(ends.flatten(0, 1), tries.flatten(0, 1)) >= self.distance).all(-1).view(TRIES, count)
        far = 2 * (lengths.sum() + self.distance) * direction[:1]  # out of reach
        places, clear = torch.cat([tries, far]), torch.cat([clear, torch.ones_like(clear[:1])])
        first = clear.to(torch.uint8).argmax(0)[None, :, None].expand(-1, -1, 3)
        return {"target": joints[:, -1], "obstacle": places.gather(0, first)[0]}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.arm.cost(y, x["target"])

    def constraints(self, y: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """How much of the distance from its centre line to the sphere's centre each link lacks (B, L), in metres."""
        return y[:, :0], self.distance - separation(self.arm.joints(y), x["obstacle"])

    def residual(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        """In metres: the distance between hand and target, or what a link lacks to the obstacle, whichever is larger."""
        lacking = self.constraints(y, x)[1].amax(-1)
        return torch.maximum(self.arm.residual(y, x["target"]), lacking)

    @property
    def distance(self) -> float:
        """From a link's centre line to the sphere's centre, at the least, in metres."""
        return self.radius + self.margin + RADIUS

    def model(self, obstacle: Sequence[float]) -> mujoco.MjModel:
        """The arm in MuJoCo with the sphere "obstacle" at a place (3,), in metres."""
        spec = self.arm.spec()
        spec.worldbody.add_geom(
            name="obstacle", type=mujoco.mjtGeom.mjGEOM_SPHERE, pos=list(obstacle), size=[self.radius, 0, 0]
        )
        return spec.compile()


def separation(joints: Tensor, point: Tensor) -> Tensor:
    """Distances between a point (B, 3) and the segments between consecutive joints (B, L + 1, 3): (B, L)."""
    start, along = joints[:, :-1], joints[:, 1:] - joints[:, :-1]
    to = point[:, None] - start
    share = ((to * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    distance: Tensor = torch.linalg.vector_norm(to - share[..., None] * along, dim=-1)
    return distance
