"""Y, where solutions live, and P(Y), densities over it.

y solution (B, n) · v unconstrained (B, inputs) · lam density parameters (B, inputs) · logq log-density (B,)

Items of a batch are independent: iterative projections run a fixed number of iterations, per item.
"""

import copy
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.errors import UserError

Bounds = Sequence[float] | np.ndarray | Tensor
Data = Mapping[str, Tensor]  # what comes with each item, with leading axis B
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class PerItem:
    """In place of a set's datum: it comes with each item, from a problem's `domain_data(x)`.

    Args:
        shape: of one item's: `PerItem(5)` for five bounds, `PerItem(5, 3)` for a matrix, `PerItem()` for a number.
    """

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", tuple(at_least_one("PerItem.shape", size) for size in shape))


class Domain(nn.Module):
    """Y: `dim` coordinates, parametrised by `inputs` unconstrained numbers through a differentiable projection.

    Amos, Tutorial on amortized optimization, section 5.1.2.

    Attributes:
        dim: n.
        inputs: unconstrained numbers that `project` takes.
        reach: the value in v that `act` maps an action of 1 to.
        itemwise: whether it holds data of B items, so that its methods take points (..., B, n); others need take (B, n) alone.
        needs: names and shapes of the data that come with each item; none, unless it was made with `PerItem`.
    """

    dim: int
    inputs: int
    reach: float = 3.0
    itemwise: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.needs: dict[str, tuple[int, ...]] = {}

    def at(self, x: Tensor) -> "Domain":
        """x (B, d), contexts as vectors -> Y of these items, C(x): this domain, unless a problem gives its data from x.

        Its methods take points (..., B, n). Repeat x and call `at` again where items are repeated or picked.
        """
        return self

    def bind(self, data: Data) -> "Domain":
        """The set of items with these data (B, ...), as `needs` names them.

        Raises:
            UserError: data are missing, unknown, or of another shape.
        """
        checked(self, data, type(self).__name__)
        return self if not self.needs else self._with(data)

    def _with(self, data: Data) -> "Domain":
        """A copy whose buffers hold the data, which keep their graphs."""
        bound = copy.copy(self)
        bound._buffers, bound.needs, bound.itemwise = {**self._buffers, **data}, {}, True
        return bound

    def _datum(self, name: str) -> Tensor:
        found = self._buffers[name]
        if found is None:
            raise lacking(self)
        return found

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

    def empty(self) -> Tensor:
        """(B,) bool, or (1,) of fixed data: whether it is proven that an item's set has no point."""
        return torch.zeros(1, dtype=torch.bool)

    def polyhedral(self) -> dict[str, Tensor] | None:
        """E, b, A, low and high in float64, of which each may have a leading B, with Y = {y : E y = b, low <= A y <= high};
        None if Y is no polyhedron, or is not known as one."""
        return None

    def compact(self) -> Tensor:
        """(B,) bool, or (1,) of fixed data, on a CPU: whether an item's set is known to be bounded: `linear` has answers."""
        return torch.tensor([type(self).linear is not Domain.linear])

    def around(self) -> tuple[Tensor, Tensor] | None:
        """A box that contains Y, low and high, each (n,) or (B, n), where `linear` is too dear for certificates and bounds are
        at hand; else None."""
        return None

    def act(self, u: Tensor) -> Tensor:
        """u (B, inputs) in [-1, 1] -> y (B, dim) in Y, for agents that act in Y."""
        return self.project(self.reach * u)

    def initial(self) -> Tensor:
        """The initial value of a learned point of Y, v (inputs,): the middle."""
        return torch.zeros(self.inputs)

    def uniform(self, count: int, device: torch.device | None = None) -> Tensor:
        """Points of Y (count, dim), `act` of uniform actions, which is uniform in a box; drawn from torch's generator.

        Args:
            count: how many.
            device: where; None takes that of its data, the CPU if it has none.
        """
        device = device or next(self.buffers(), torch.empty(0)).device
        return self.act(torch.rand(count, self.inputs, device=device) * 2 - 1)


def nearest_each(domain: Domain, x: Tensor, ys: Tensor) -> Tensor:
    """Projections of several points of each item, ys (S, B, n), onto its set C(x), for contexts x (B, d)."""
    at = domain.at(x)
    return at.nearest(ys) if at.itemwise else at.nearest(ys.flatten(0, 1)).view_as(ys)


def project_each(domain: Domain, x: Tensor, vs: Tensor) -> Tensor:
    """As `nearest_each`, of `project`: vs (S, B, inputs) -> (S, B, n)."""
    at = domain.at(x)
    return at.project(vs) if at.itemwise else at.project(vs.flatten(0, 1)).view(*vs.shape[:2], domain.dim)


def within(domain: Domain, y: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """y (B, n) -> (B,) bool: feasibility, to rounding; False for non-finite y.

    Args:
        domain: Y.
        y: points.
        rounded: the dtype that they were rounded to; None if it is theirs.
    """
    whole = y.isfinite().all(-1)
    return whole & (domain.violation(y.where(whole[..., None], 0)) <= slack(y, rounded))


def slack(y: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """y (B, n) -> (B,): the violation that rounding excuses; `rounded` as in `within`."""
    return y.abs().amax(-1).clamp_min(1) * math.sqrt(torch.finfo(rounded or y.dtype).eps)


def bounded(low: Tensor, high: Tensor, total: float | None = None) -> dict[str, Tensor]:
    """`polyhedral` of {y : low <= y <= high}, and sum y = total where that is given; low and high (n,) or (B, n)."""
    low, high = low.double(), high.double()
    n, rows = low.shape[-1], 0 if total is None else 1
    E, b = low.new_ones(rows, n), low.new_full((rows,), total or 0.0)
    return {"E": E, "b": b, "A": torch.eye(n, dtype=low.dtype, device=low.device), "low": low, "high": high}


def lacking(domain: Domain) -> UserError:
    return UserError(
        f"{type(domain).__name__}: {', '.join(domain.needs)} comes with each item, and is not given; "
        "`at(x)` of a problem's domain, or `bind(data)`, gives the set of some items"
    )


def checked(domain: Domain, data: Data, where: str) -> None:
    """Raises UserError, which begins with `where`, unless the data are what the domain needs, of one count."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: a {type(data).__name__} is given; a dict of tensors is needed: {', '.join(domain.needs)}")
    for name in data:
        if name not in domain.needs:
            raise UserError(f"{where}: {name!r} is given; allowed: {', '.join(domain.needs) or 'none'}")
    count: int | str = "B"
    for name, shape in domain.needs.items():
        found = data.get(name)
        needed = f"({', '.join(map(str, (count, *shape)))})"
        if not isinstance(found, Tensor):
            kind = "nothing" if found is None else f"a {type(found).__name__}"
            raise UserError(f"{where}: {name!r}: {kind} is given; a tensor {needed} is needed")
        if not found.ndim or tuple(found.shape[1:]) != shape or count not in ("B", len(found)):
            raise UserError(f"{where}: {name!r}: shape {tuple(found.shape)} is given; {needed} is needed")
        count = len(found)


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
