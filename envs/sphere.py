"""Soft minima of c-convex functions on the sphere (tutorial, section 7; Cohen, Amos and Lipman, 2021).

y point (B, 3) of S^2 · z centres (B, m, 3) on S^2 · alpha offsets (B, m)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlamort import domain
from rlamort.config import Positive
from rlamort.errors import UserError
from rlamort.nets import mlp
from rlamort.problem import Problem

CLOSE = 1e-12  # radians squared: below, the angle's derivative is not that of its definition, but finite


class Sphere(Problem[dict[str, Tensor]]):
    """f(y; z, alpha) = -gamma log sum_i exp(-(d(y, z_i)^power / 2 + alpha_i) / gamma), d the angle between two points.

    Centres are uniform on the sphere, offsets uniform on [0, spread].

    Args:
        components: m.
        power: exponent of the distance: 2 makes every component c-convex, 1 is the formula in the tutorial's text.
        gamma: temperature of the soft minimum, which is up to gamma log m below the smallest component.
        spread: upper bound of the offsets.
    """

    domain = domain.Sphere(3)

    def __init__(self, components: int = 4, power: int = 2, gamma: Positive = 0.5, spread: Positive = 0.7) -> None:
        super().__init__()
        for name, value, allowed in (("components", components, components >= 1), ("power", power, power in (1, 2))):
            if not allowed:
                raise UserError(f"Sphere.{name}={value}: {'1 or 2' if name == 'power' else 'at least 1'} is needed")
        self.components, self.power, self.gamma, self.spread = components, power, gamma, spread

    def contexts(self, count: int) -> dict[str, Tensor]:
        z = torch.nn.functional.normalize(torch.randn(count, self.components, 3), dim=-1)
        return {"z": z, "alpha": self.spread * torch.rand(count, self.components)}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        parts = self.distance(y[:, None], x["z"]) ** self.power / 2 + x["alpha"]  # (B, m)
        return -self.gamma * (-parts / self.gamma).logsumexp(-1)

    def network(self, hidden: Sequence[int], candidates: int) -> nn.Module:
        return Equivariant(self, hidden, candidates)

    @staticmethod
    def distance(y: Tensor, z: Tensor) -> Tensor:
        """(..., 3), (..., 3) -> angle (...,), by atan2, since arccos has no derivative at 0 and pi."""
        sine = (torch.linalg.cross(y.expand_as(z), z).square().sum(-1) + CLOSE).sqrt()
        return torch.atan2(sine, (y * z).sum(-1))


class Equivariant(nn.Module):
    """v_k = z_k + sum_i w_ki z_i for candidate k; weights are a function of offsets and inner products, sorted by offset.

    So predictions are equivariant to rotations and reflections and invariant to permutations of the components (Villar et al.,
    2021, proposition 4).

    Args:
        problem: the problem, for the layout of its contexts.
        hidden: widths of the hidden layers.
        candidates: predictions v per context.
    """

    pairs: Tensor

    def __init__(self, problem: Sphere, hidden: Sequence[int], candidates: int) -> None:
        super().__init__()
        m = problem.components
        self.shape = (candidates, m)
        self.begin = nn.Parameter(torch.eye(m).repeat(-(-candidates // m), 1)[:candidates])  # each starts at another centre
        self.layout = problem.layout
        self.register_buffer("pairs", torch.triu_indices(m, m, offset=1), persistent=False)
        self.weigh = mlp(m * (m + 1) // 2, hidden, candidates * m)

    def forward(self, row: Tensor) -> Tensor:
        """(B, d) -> (B, candidates * 3)."""
        x = self.layout.unpack(row)
        assert isinstance(x, dict)
        alpha, order = x["alpha"].sort(dim=-1)
        z = x["z"].gather(1, order[..., None].expand_as(x["z"]))  # (B, m, 3)
        inner = (z @ z.mT)[:, self.pairs[0], self.pairs[1]]
        weights = self.begin + self.weigh(torch.cat([alpha, inner], dim=-1)).view(len(row), *self.shape)
        v: Tensor = weights @ z  # (B, candidates, 3)
        return v.flatten(1)
