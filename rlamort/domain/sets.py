"""Vector sets as domains: boxes, orthants, simplices, spheres, and their products."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.domain.base import (
    LARGEST,
    Bounds,
    Data,
    Domain,
    PerItem,
    at_least_one,
    bounded,
    checked,
    magnitude,
    norm_of,
    number,
)
from rlamort.domain.items import ItemBox
from rlamort.errors import UserError

VECTORS = ("b", "low", "high")  # of `polyhedral`


class Euclid(Domain):
    """R^dim.

    Args:
        dim: n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("Euclid.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return v

    def polyhedral(self) -> dict[str, Tensor]:
        none = torch.zeros(0, self.dim, dtype=torch.float64)
        return {"E": none, "b": none[:, 0], "A": none, "low": none[:, 0], "high": none[:, 0]}

    def nearest(self, y: Tensor) -> Tensor:
        return y


class Box(Domain):
    """{y : low <= y <= high}; `project` is tanh, scaled.

    Args:
        low: lower bounds, one per coordinate, finite: a list, a tensor or an array of numbers, or `PerItem(n)`.
        high: upper bounds, each above its lower bound, finite, or `PerItem(n)`. Of an item whose bounds cross, answers are
            the middle, and `violation` says so.

    Raises:
        UserError: bounds that are not numbers, differ in count, exceed float32's range, or are not in order.
    """

    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, low: Bounds | PerItem, high: Bounds | PerItem) -> None:
        super().__init__()
        if isinstance(low, PerItem) or isinstance(high, PerItem):
            self._declare(low, high)
            return
        ends = [_bounds("Box.low", low), _bounds("Box.high", high)]
        at_least_one("Box.low: its length", len(ends[0]))
        if len(ends[0]) != len(ends[1]):
            raise UserError(f"Box.high: {len(ends[1])} bounds are given; {len(ends[0])}, as in low, are needed")
        for i, (least, most) in enumerate(zip(*ends, strict=True)):
            if not -LARGEST <= least < most <= LARGEST:
                raise UserError(f"Box.low: {least} with high {most} in coordinate {i}; finite bounds, low < high, are needed")
        bounds = np.array(ends)  # halved in float64, so that unit bounds stay exact
        scale, offset = ((bounds[1] - bounds[0]) / 2).astype(np.float32), ((bounds[1] + bounds[0]) / 2).astype(np.float32)
        self.dim = self.inputs = len(ends[0])
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("offset", torch.tensor(offset), persistent=False)
        self.register_buffer("low", torch.tensor(bounds[0]), persistent=False)  # as they were given: offset - scale may round
        self.register_buffer("high", torch.tensor(bounds[1]), persistent=False)
        wide = offset.astype(np.float64)
        self.exact = bool((np.stack([wide - scale, wide + scale]) == bounds).all())  # so agents' need not clamp at every step

    def _declare(self, low: Bounds | PerItem, high: Bounds | PerItem) -> None:
        """With bounds that come with each item."""
        for name, bounds in (("low", low), ("high", high)):
            if isinstance(bounds, PerItem):
                self.needs[name] = bounds.shape
                self.register_buffer(name, None)
            else:
                fixed = torch.tensor(_bounds(f"Box.{name}", bounds), dtype=torch.float64)
                if not fixed.isfinite().all():
                    raise UserError(f"Box.{name}: {fixed.tolist()} is given; finite bounds are needed")
                self.register_buffer(name, fixed, persistent=False)
        sizes = [self.needs[name] if name in self.needs else tuple(self._datum(name).shape) for name in ("low", "high")]
        if sizes[0] != sizes[1] or len(sizes[0]) != 1:
            raise UserError(f"Box.high: shape {sizes[1]} is given and {sizes[0]} of low; a bound a coordinate is needed")
        self.dim = self.inputs = sizes[0][0]
        self.register_buffer("scale", None)
        self.register_buffer("offset", None)
        self.exact = False

    def bind(self, data: Data) -> Domain:
        checked(self, data, "Box")
        if not self.needs:
            return self
        return ItemBox(*(data[name] if name in data else self._datum(name) for name in ("low", "high")))

    def project(self, v: Tensor) -> Tensor:
        return self.act(v.tanh())

    def decode(self, u: Tensor) -> Tensor:
        """[-1, 1]^n -> Y, affine, to the rounding of the largest bound."""
        return self._datum("offset") + self._datum("scale") * u

    def encode(self, y: Tensor) -> Tensor:
        """Y -> [-1, 1]^n, affine."""
        return (y - self._datum("offset")) / self._datum("scale")

    def polyhedral(self) -> dict[str, Tensor] | None:
        return None if self.needs else bounded(self.low, self.high)

    def nearest(self, y: Tensor) -> Tensor:
        return y.clamp(self._datum("low").to(y.dtype), self._datum("high").to(y.dtype))

    def violation(self, y: Tensor) -> Tensor:
        return norm_of((self._datum("low").to(y.dtype) - y).relu() + (y - self._datum("high").to(y.dtype)).relu())

    def linear(self, g: Tensor) -> Tensor:
        return torch.where(g > 0, self._datum("low").to(g.dtype), self._datum("high").to(g.dtype))

    def act(self, u: Tensor) -> Tensor:
        y = self.decode(u)
        return y if self.exact else self.nearest(y)


def unit_box(dim: int) -> Box:
    """[-1, 1]^dim, the domain of control actions inside rlamort; an environment's adapter converts to its units."""
    return Box([-1.0] * dim, [1.0] * dim)


class Orthant(Domain):
    """{y : y >= 0}; `project` is softplus, since relu has no gradient for coordinates below zero.

    Args:
        dim: n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("Orthant.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return nn.functional.softplus(v)

    def polyhedral(self) -> dict[str, Tensor]:
        return bounded(torch.zeros(self.dim), torch.full((self.dim,), torch.inf))

    def nearest(self, y: Tensor) -> Tensor:
        return y.relu()

    def violation(self, y: Tensor) -> Tensor:
        return norm_of(y.clamp(max=0))


class Simplex(Domain):
    """{y : y >= 0, sum y = 1}; `project` is softmax.

    Args:
        dim: n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("Simplex.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return v.softmax(-1)

    def polyhedral(self) -> dict[str, Tensor]:
        return bounded(torch.zeros(self.dim), torch.full((self.dim,), torch.inf), 1.0)

    def nearest(self, y: Tensor) -> Tensor:
        return _waterfill(y, 1)

    def violation(self, y: Tensor) -> Tensor:
        return _spilt(y, 1)

    def linear(self, g: Tensor) -> Tensor:
        return torch.zeros_like(g).scatter(-1, g.argmin(-1, keepdim=True), 1.0)


class CappedSimplex(Domain):
    """{y : 0 <= y <= 1, sum y = k}, a soft choice of k out of n; `project` is the limited multi-label projection.

    `project` is argmin_{y in Y} -<v, y> - sum_i H(y_i), H the binary entropy in nats (Amos, Koltun and Kolter, 2019, eq. 3):
    y = sigmoid(v + nu), where nu makes the sum k.

    Args:
        dim: n.
        k: what the coordinates sum to, in (0, dim).
    """

    def __init__(self, dim: int, k: float) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("CappedSimplex.dim", dim)
        self.k = number("CappedSimplex.k", k)
        if not 0 < self.k < dim:
            raise UserError(f"CappedSimplex.k: {k} is given; a number above 0 and below dim = {dim} is needed")

    def project(self, v: Tensor) -> Tensor:
        # halfway between the last entry that k fills and the first that it does not (of a k that is not whole, the same one) is
        # 0 then: entries near it keep their differences in float32, and |nu| is at most `far`, however large v is
        last, after = _kth_largest(v, math.ceil(self.k)), _kth_largest(v, math.floor(self.k) + 1)
        v = (v - last) + (last - after) / 2
        part = self.k % 1 or 1.0
        far = math.log(self.dim / min(part, 1 - part or 1.0))
        rim = far - math.log(torch.finfo(v.dtype).tiny)
        v = v.clamp(-rim, rim)  # beyond, every such nu gives 0 or 1
        with torch.no_grad():
            low, high = (torch.full_like(v[..., :1], end) for end in (-far, far))
            for _ in range(32):
                middle = (low + high) / 2
                below = (v + middle).sigmoid().sum(-1, keepdim=True) < self.k
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            nu = (low + high) / 2
            for _ in range(3):  # Newton's error squares in every step, from any distance below 1
                nu = torch.clamp(self._newton(nu, v), low, high)
        # one step from the root has the derivative that the implicit function theorem gives; two have the second one, too
        nu = self._newton(self._newton(nu, v), v)
        return (v + nu).sigmoid()

    def _newton(self, nu: Tensor, v: Tensor) -> Tensor:
        """nu (B, 1) -> one step (B, 1) towards sum sigmoid(v + nu) = k."""
        y = (v + nu).sigmoid()
        slope = (y * (-v - nu).sigmoid()).sum(-1, keepdim=True)
        # where every coordinate is 0 or 1 to rounding, nu may be anything, and must not follow the rounding
        return nu - (y.sum(-1, keepdim=True) - self.k) / slope.clamp(min=self.dim * torch.finfo(v.dtype).eps)

    def polyhedral(self) -> dict[str, Tensor]:
        return bounded(torch.zeros(self.dim), torch.ones(self.dim), self.k)

    def nearest(self, y: Tensor) -> Tensor:
        return _waterfill(y, self.k)

    def violation(self, y: Tensor) -> Tensor:
        return _spilt(y, self.k)

    def linear(self, g: Tensor) -> Tensor:
        filled = (self.k - torch.arange(self.dim, dtype=g.dtype, device=g.device)).clamp(0, 1)
        return torch.zeros_like(g).scatter(-1, g.argsort(-1), filled.expand_as(g))


class Sphere(Domain):
    """{y : |y| = 1}; `project` is v / |v|, and maps the origin, whose projection is not unique, to the first axis.

    Args:
        dim: n, of the ambient space: 3 for S^2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("Sphere.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        axis = nn.functional.pad(torch.ones_like(v[..., :1]), (0, self.dim - 1))
        v = torch.where((v == 0).all(-1, keepdim=True), axis, v)
        return nn.functional.normalize(v / magnitude(v), dim=-1)

    def nearest(self, y: Tensor) -> Tensor:
        return self.project(y)

    def violation(self, y: Tensor) -> Tensor:
        return (norm_of(y) - 1).abs()

    def linear(self, g: Tensor) -> Tensor:
        return self.project(-g.detach())


class Product(Domain):
    """Y_1 x Y_2 x ..., with inputs and coordinates concatenated.

    Data that come with each item are named after their factor: "0.b" is that of an affine set which stands first.

    Args:
        domains: the factors, in order.
    """

    def __init__(self, domains: Iterable[Domain]) -> None:
        super().__init__()
        if not isinstance(domains, Iterable):
            raise UserError(f"Product.domains: a {type(domains).__name__} is given; a list of domains is needed")
        domains = list(domains)
        at_least_one("Product.domains: their number", len(domains))
        for i, domain in enumerate(domains):
            if not isinstance(domain, Domain):
                raise UserError(f"Product.domains[{i}]: a {type(domain).__name__} is given; a domain, not a density, is needed")
        self.domains = nn.ModuleList(domains)
        self.needs = {f"{i}.{name}": shape for i, part in enumerate(domains) for name, shape in part.needs.items()}
        self.sizes, self.input_sizes = [d.dim for d in domains], [d.inputs for d in domains]
        self.dim, self.inputs = sum(self.sizes), sum(self.input_sizes)

    def bind(self, data: Data) -> Domain:
        checked(self, data, "Product")
        own: list[dict[str, Tensor]] = [{} for _ in self.sizes]
        for name, part in data.items():
            index, _, rest = name.partition(".")
            own[int(index)][rest] = part
        bound = Product([domain.bind(mine) for domain, mine in zip(self.domains, own, strict=True)])  # type: ignore[operator]
        bound.itemwise = bool(data)
        return bound

    def _factors(self, sizes: list[int], row: Tensor) -> Iterable[tuple[Domain, Tensor]]:
        return zip(self.domains, row.split_with_sizes(sizes, dim=-1), strict=True)  # type: ignore[arg-type]

    def project(self, v: Tensor) -> Tensor:
        return torch.cat([domain.project(part) for domain, part in self._factors(self.input_sizes, v)], dim=-1)

    def empty(self) -> Tensor:
        parts: list[Tensor] = [domain.empty() for domain in self.domains]  # type: ignore[operator]
        return functools.reduce(lambda found, part: found.to(part.device) | part, parts)

    def compact(self) -> Tensor:
        return functools.reduce(torch.logical_and, [domain.compact().cpu() for domain in self.domains])  # type: ignore[operator, no-any-return]

    def polyhedral(self) -> dict[str, Tensor] | None:
        parts = [domain.polyhedral() for domain in self.domains]  # type: ignore[operator]
        if any(part is None or part["E"].ndim > 2 or part["A"].ndim > 2 for part in parts):
            return None
        device = next(self.buffers(), torch.empty(0)).device  # sets without data of their own do not know it
        parts = [{name: tensor.to(device) for name, tensor in part.items()} for part in parts]
        rows = {k: torch.block_diag(*(part[k] for part in parts)) for k in "EA"}  # type: ignore[no-untyped-call]
        count = max((len(part[name]) for part in parts for name in VECTORS if part[name].ndim > 1), default=0)
        shape = (count, -1) if count else (-1,)
        return rows | {name: torch.cat([part[name].expand(shape) for part in parts], dim=-1) for name in VECTORS}

    def nearest(self, y: Tensor) -> Tensor:
        return torch.cat([domain.nearest(part) for domain, part in self._factors(self.sizes, y)], dim=-1)

    def violation(self, y: Tensor) -> Tensor:
        return norm_of(torch.stack([domain.violation(part) for domain, part in self._factors(self.sizes, y)], dim=-1))

    def linear(self, g: Tensor) -> Tensor:
        return torch.cat([domain.linear(part) for domain, part in self._factors(self.sizes, g)], dim=-1)

    def act(self, u: Tensor) -> Tensor:
        return torch.cat([domain.act(part) for domain, part in self._factors(self.input_sizes, u)], dim=-1)

    def initial(self) -> Tensor:
        return torch.cat([domain.initial() for domain in self.domains])  # type: ignore[operator]


def _bounds(field: str, given: Any) -> list[float]:
    try:
        bounds = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # by what it is that is no number
        bounds = torch.tensor(math.nan)
    if bounds.ndim != 1:
        raise UserError(f"{field}: {given!r} is given; a list of numbers, one a coordinate, is needed, as in Box([0.0], [1.0])")
    return [float(bound) for bound in bounds.detach()]


def _kth_largest(v: Tensor, k: int) -> Tensor:
    """v (B, n), 1 <= k <= n -> (B, 1): its k-th largest entry, detached."""
    return v.detach().kthvalue(v.shape[-1] - k + 1, dim=-1, keepdim=True)[0]


def _waterfill(v: Tensor, k: float) -> Tensor:
    """v (B, n) -> argmin_{0 <= y <= 1, sum y = k} |y - v| (B, n): y = clamp(v - tau, 0, 1), by sorting.

    As tau decreases, coordinate i leaves 0 at v_i and reaches 1 at v_i - 1; between two such kinks the sum is linear.
    """
    # tau is within [-1, 0] then, so what is beyond [-1, 1] is empty or full; clamped, or v - 1 would be v where v is large
    v, n = (v - _kth_largest(v, math.ceil(k))).clamp(-1, 1), v.shape[-1]
    with torch.no_grad():
        kinks, order = torch.cat([v, v - 1], dim=-1).sort(stable=True, dim=-1, descending=True)
        filling = torch.where(order < n, 1, -1).cumsum(-1)  # how many coordinates are, below each kink
        gained = (filling[..., :-1] * (kinks[..., :-1] - kinks[..., 1:])).cumsum(-1)
        filled = torch.cat([torch.zeros_like(gained[..., :1]), gained], dim=-1)  # their sum at each kink
        last = (filled < k).sum(-1, keepdim=True) - 1
        at, before, rate = (part.gather(-1, last) for part in (kinks, filled, filling))
        tau = at - (k - before) / rate
        full, free = v - tau >= 1, (v - tau > 0) & (v - tau < 1)
        count = free.sum(-1, keepdim=True)
    # tau again, from what is free: now with its derivative
    exact = (torch.where(free, v, 0.0).sum(-1, keepdim=True) + full.sum(-1, keepdim=True) - k) / count.clamp(min=1)
    return torch.where(free, (v - exact).clamp(0, 1), full.to(v.dtype))


def _spilt(y: Tensor, k: float) -> Tensor:
    """y (B, n) -> (B,): the larger of its distances to 0 <= y <= 1 and to sum y = k."""
    return torch.maximum(norm_of(y - y.clamp(0, 1)), (y.sum(-1) - k).abs() / math.sqrt(y.shape[-1]))
