"""Sets in closed form whose data come with each item.

y solution (..., B, n) · v unconstrained (..., B, inputs)
"""

from typing import cast

import torch
from torch import Tensor

from rlamort.domain.base import Data, Domain, PerItem, at_least_one, bounded, magnitude, norm_of, number
from rlamort.errors import UserError


class ItemBox(Domain):
    """{y : low <= y <= high} of B items: what a `Box` with bounds `PerItem` is for some of them.

    Args:
        low: (B, n), or (n,).
        high: (B, n), or (n,). Where bounds cross, answers are the middle, and `violation` says so.
    """

    itemwise = True
    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.dim = self.inputs = low.shape[-1]
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.low.to(like.dtype), self.high.to(like.dtype)
        middle, crossed = low + (high - low) / 2, low > high
        return torch.where(crossed, middle, low), torch.where(crossed, middle, high)

    def project(self, v: Tensor) -> Tensor:
        return self.act(v.tanh())

    def act(self, u: Tensor) -> Tensor:
        low, high = self._ends(u)
        return (low + (high - low) * ((1 + u) / 2)).clamp(low, high)

    def polyhedral(self) -> dict[str, Tensor]:
        return bounded(self.low, self.high)

    def empty(self) -> Tensor:
        return (self.low > self.high).any(-1)

    def nearest(self, y: Tensor) -> Tensor:
        return y.clamp(*self._ends(y))

    def violation(self, y: Tensor) -> Tensor:
        return norm_of((self.low.to(y.dtype) - y).relu() + (y - self.high.to(y.dtype)).relu())

    def linear(self, g: Tensor) -> Tensor:
        low, high = self._ends(g)
        return torch.where(g > 0, low, high)


class Ball(Domain):
    """{y : |y| <= radius}; `project` is v tanh(|v|) radius / |v|.

    Args:
        dim: n.
        radius: above 0, or `PerItem()`. Of an item whose radius is negative, answers are 0, and `violation` says so.

    Raises:
        UserError: the radius is no number above 0.
    """

    def __init__(self, dim: int, radius: float | PerItem) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("Ball.dim", dim)
        if isinstance(radius, PerItem):
            if radius.shape:
                raise UserError(f"Ball.radius: PerItem{radius.shape} is given; PerItem(), a number an item, is needed")
            self.needs["radius"] = ()
            self.register_buffer("radius", None)
            return
        if not 0 < (length := number("Ball.radius", radius)) < torch.inf:
            raise UserError(f"Ball.radius: {radius} is given; a finite number above 0 is needed")
        self.register_buffer("radius", torch.tensor(length, dtype=torch.float64), persistent=False)

    def bind(self, data: Data) -> "Ball":
        return cast(Ball, super().bind(data))

    def _radius(self, like: Tensor) -> Tensor:
        return self._datum("radius").to(like.dtype)

    def _shrunk(self, direction: Tensor, share: Tensor) -> Tensor:
        """direction (..., B, n) of length `share` (..., B) of the radius; of length 0 where it is 0."""
        scaled = direction / magnitude(direction)
        length = torch.linalg.vector_norm(scaled, dim=-1)
        factor = share * self._radius(direction).clamp(min=0) / length.where(length > 0, 1)
        shrunk: Tensor = scaled * factor[..., None]
        return shrunk

    def project(self, v: Tensor) -> Tensor:
        length = norm_of(v)
        small = length < 1e-4  # tanh(t) / t is 1 - t^2 / 3 there, and what follows has no derivative at 0
        at = v.where(small[..., None], 0.0)  # the other branch's squares may overflow
        near = at * ((1 - at.square().sum(-1) / 3) * self._radius(v).clamp(min=0))[..., None]
        return torch.where(small[..., None], near, self._shrunk(v.where(~small[..., None], 1.0), length.tanh()))

    def nearest(self, y: Tensor) -> Tensor:
        inside = norm_of(y) <= self._radius(y)
        return torch.where(inside[..., None], y, self._shrunk(y, torch.ones_like(y[..., 0])))

    def violation(self, y: Tensor) -> Tensor:
        return (norm_of(y) - self._radius(y)).clamp(min=0)

    def empty(self) -> Tensor:
        return self._datum("radius").reshape(-1) < 0

    def linear(self, g: Tensor) -> Tensor:
        return self._shrunk(-g.detach(), torch.ones_like(g[..., 0]))
