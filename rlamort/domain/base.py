"""Y, where solutions live, and P(Y), densities over it.

y solution (B, n) · v unconstrained (B, inputs) · lam density parameters (B, inputs) · logq log-density (B,)

Items of a batch are independent: iterative projections run a fixed number of iterations, per item.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.errors import UserError

Bounds = Sequence[float] | np.ndarray | Tensor
LARGEST = torch.finfo(torch.float32).max


class Domain(nn.Module):
    """Y: `dim` coordinates, parametrised by `inputs` unconstrained numbers through a differentiable projection.

    Amos, Tutorial on amortized optimization, section 5.1.2.

    Attributes:
        dim: n.
        inputs: unconstrained numbers that `project` takes.
        reach: the value in v that `act` maps an action of 1 to.
    """

    dim: int
    inputs: int
    reach: float = 3.0

    def project(self, v: Tensor) -> Tensor:
        """v (B, inputs) -> y (B, dim) in Y."""
        raise NotImplementedError

    def nearest(self, y: Tensor) -> Tensor:
        """y (B, dim) -> argmin_{s in Y} |s - y| (B, dim), the Euclidean projection; differentiable almost everywhere.

        At every scale of y: the result is in Y to rounding, and nearest to within the rounding of y's largest entry.
        """
        raise NotImplementedError

    def violation(self, y: Tensor) -> Tensor:
        """y (B, dim) -> constraint violation (B,) >= 0, which is 0 exactly in Y.

        It decides feasibility, so it should not rely on `nearest`, as this default does, which is the distance to it. Domains
        here measure the conditions that define Y: the distance to Y, or, for an intersection of sets, the largest of the
        distances to each, which is a lower bound of it.
        """
        return norm_of(y - self.nearest(y))

    def linear(self, g: Tensor) -> Tensor:
        """g (B, dim) -> argmin_{s in Y} <g, s> (B, dim), a vertex of Y; not differentiable.

        Raises:
            UserError: Y is unbounded, so the minimum is not attained.
        """
        raise UserError(f"{type(self).__name__}.linear: this set is unbounded; a bounded one (Box, Simplex, ...) is needed")

    def act(self, u: Tensor) -> Tensor:
        """u (B, inputs) in [-1, 1] -> y (B, dim) in Y, for agents that act in Y."""
        return self.project(self.reach * u)

    def initial(self) -> Tensor:
        """The initial value of a learned point of Y, v (inputs,): the middle."""
        return torch.zeros(self.inputs)

    def uniform(self, count: int) -> Tensor:
        """Points of Y (count, dim), `act` of uniform actions, which is uniform in a box; drawn from torch's generator."""
        device = next(self.buffers(), torch.empty(0)).device
        return self.act(torch.rand(count, self.inputs, device=device) * 2 - 1)


def within(domain: Domain, y: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """y (B, n) -> (B,) bool: feasibility, to rounding; False for non-finite y.

    Args:
        domain: Y.
        y: points.
        rounded: the dtype that they were rounded to; None if it is theirs.
    """
    slack = y.abs().amax(-1).clamp_min(1) * math.sqrt(torch.finfo(rounded or y.dtype).eps)
    return y.isfinite().all(-1) & (domain.violation(finite(domain, y)) <= slack)


def finite(domain: Domain, y: Tensor) -> Tensor:
    """y (B, n) with non-finite items replaced by a point of Y."""
    centre = domain.project(y.new_zeros(1, domain.inputs))
    return y.where(y.isfinite().all(-1, keepdim=True), centre)


def at_least_one(field: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, SupportsIndex) or operator.index(given) < 1:
        raise UserError(f"{field}: {given!r} is given; an integer of at least 1 is needed")
    return operator.index(given)


def number(field: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, SupportsFloat):
        raise UserError(f"{field}: {given!r} is given; a number is needed")
    return float(given)


def magnitude(v: Tensor) -> Tensor:
    """v (B, n) -> (B, 1) > 0: its largest absolute value, a scale that keeps squares in range; detached."""
    return v.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)


def norm_of(v: Tensor) -> Tensor:
    """v (B, n) -> |v| (B,), without overflow or underflow of the squares."""
    size = magnitude(v)
    length: Tensor = size[..., 0] * torch.linalg.vector_norm(v / size, dim=-1)
    return length


def as_matrix(y: Tensor, size: int) -> Tensor:
    """(B, size^2) -> (B, size, size)."""
    return y.reshape(*y.shape[:-1], size, size)
