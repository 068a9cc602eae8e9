"""Y, where solutions live, and P(Y), densities over it.

y solution (B, n) · v unconstrained (B, inputs) · lam density parameters (B, inputs) · logq log-density (B,)

No item's answer depends on its neighbours: what iterates does so a fixed number of times, each item on its own.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlamort.errors import UserError

Bounds = Sequence[float] | np.ndarray | Tensor
LARGEST = torch.finfo(torch.float32).max


class Domain(nn.Module):
    """Y: `dim` coordinates, reached from `inputs` unconstrained numbers by a differentiable projection.

    Amos, Tutorial on amortized optimization, section 5.1.2.

    Attributes:
        dim: n.
        inputs: unconstrained numbers that `project` takes.
        reach: how far out, in v, an action at the border of [-1, 1]^inputs lies.
    """

    dim: int
    inputs: int
    reach: float = 3.0

    def project(self, v: Tensor) -> Tensor:
        """v (B, inputs) -> y (B, dim) in Y; for a density, lam (B, inputs) within its bounds."""
        raise NotImplementedError

    def nearest(self, y: Tensor) -> Tensor:
        """y (B, dim) -> argmin_{s in Y} |s - y| (B, dim), the Euclidean projection; differentiable almost everywhere.

        However large y is: the result is in Y to rounding, and as near as any other point to that of y's largest number.
        """
        raise NotImplementedError

    def violation(self, y: Tensor) -> Tensor:
        """y (B, dim) -> (B,) >= 0, how far it is from Y: 0 in Y, and nowhere else.

        It decides what may be an answer, so it should not trust `nearest`, as this default does, the distance to it. Domains
        here measure the conditions that define Y: it is the distance to Y, or, where Y is an intersection of sets, the largest
        of the distances to each, which is no more.
        """
        return _length(y - self.nearest(y))

    def linear(self, g: Tensor) -> Tensor:
        """g (B, dim) -> argmin_{s in Y} <g, s> (B, dim), a corner of Y, without a derivative.

        Raises:
            UserError: Y is unbounded, so that nothing attains the minimum.
        """
        raise UserError(f"{type(self).__name__}.linear: this set is unbounded; a bounded one (Box, Simplex, ...) is needed")

    def act(self, u: Tensor) -> Tensor:
        """u (B, inputs) in [-1, 1] -> y (B, dim) in Y, for agents that act in Y."""
        return self.project(self.reach * u)

    def uniform(self, count: int) -> Tensor:
        """(count, dim): what `act` makes of uniform actions, which in a box is uniform over Y; from torch's generator."""
        device = next(self.buffers(), torch.empty(0)).device
        return self.act(torch.rand(count, self.inputs, device=device) * 2 - 1)


class Density(Domain):
    """P(Y): distributions over Y with parameters lam (B, inputs), sampled by reparameterisation."""

    def sample(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """lam (B, inputs) -> one draw y (B, dim), differentiable in lam, and log q(y; lam) (B,) in nats."""
        raise NotImplementedError

    def draw(self, lam: Tensor) -> Tensor:
        """lam (B, inputs) -> one draw y (B, dim), the one that `sample` would have given, without its density."""
        return self.sample(lam)[0]

    def median(self, lam: Tensor) -> Tensor:
        """lam (B, inputs) -> y (B, dim): the coordinate-wise median, which is what a deterministic agent plays."""
        raise NotImplementedError

    def nearest(self, y: Tensor) -> Tensor:
        """lam (B, inputs) -> lam within its bounds; they are a box, and `project` clamps to it."""
        return self.project(y)


class Euclid(Domain):
    """R^dim.

    Args:
        dim: n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = _at_least_one("Euclid.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return v

    def nearest(self, y: Tensor) -> Tensor:
        return y


class Box(Domain):
    """{y : low <= y <= high}, reached by tanh.

    Args:
        low: lower bounds, one per coordinate, finite: a list, a tensor or an array of numbers.
        high: upper bounds, each above its lower bound, finite.

    Raises:
        UserError: bounds that are no numbers, of unequal number, beyond what float32 holds, or not in order.
    """

    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, low: Bounds, high: Bounds) -> None:
        super().__init__()
        ends = [_bounds("Box.low", low), _bounds("Box.high", high)]
        _at_least_one("Box.low: its length", len(ends[0]))
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

    def project(self, v: Tensor) -> Tensor:
        return self.act(v.tanh())

    def decode(self, u: Tensor) -> Tensor:
        """[-1, 1]^n -> Y, affine, to the rounding of the largest bound."""
        return self.offset + self.scale * u

    def encode(self, y: Tensor) -> Tensor:
        """Y -> [-1, 1]^n, affine."""
        return (y - self.offset) / self.scale

    def nearest(self, y: Tensor) -> Tensor:
        return y.clamp(self.low.to(y.dtype), self.high.to(y.dtype))

    def violation(self, y: Tensor) -> Tensor:
        return _length((self.low.to(y.dtype) - y).relu() + (y - self.high.to(y.dtype)).relu())

    def linear(self, g: Tensor) -> Tensor:
        return torch.where(g > 0, self.low.to(g.dtype), self.high.to(g.dtype))

    def act(self, u: Tensor) -> Tensor:
        y = self.decode(u)
        return y if self.exact else self.nearest(y)


def unit_box(dim: int) -> Box:
    """[-1, 1]^dim: every action inside rlamort lives here; the units of an environment begin at its adapter."""
    return Box([-1.0] * dim, [1.0] * dim)


class Orthant(Domain):
    """{y : y >= 0}, reached by softplus.

    relu would leave a coordinate that once fell below zero without a gradient, and so there for good.

    Args:
        dim: n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = _at_least_one("Orthant.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return nn.functional.softplus(v)

    def nearest(self, y: Tensor) -> Tensor:
        return y.relu()

    def violation(self, y: Tensor) -> Tensor:
        return _length(y.clamp(max=0))


class Simplex(Domain):
    """{y : y >= 0, sum y = 1}, reached by softmax.

    Args:
        dim: n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = _at_least_one("Simplex.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return v.softmax(-1)

    def nearest(self, y: Tensor) -> Tensor:
        return _waterfill(y, 1)

    def violation(self, y: Tensor) -> Tensor:
        return _spilt(y, 1)

    def linear(self, g: Tensor) -> Tensor:
        return torch.zeros_like(g).scatter(-1, g.argmin(-1, keepdim=True), 1.0)


class CappedSimplex(Domain):
    """{y : 0 <= y <= 1, sum y = k}, a soft choice of k out of n, reached by the limited multi-label projection.

    `project` is argmin_{y in Y} -<v, y> - sum_i H(y_i), H the binary entropy in nats (Amos, Koltun and Kolter, 2019, eq. 3):
    y = sigmoid(v + nu), where nu makes the sum k.

    Args:
        dim: n.
        k: what the coordinates sum to, in (0, dim).
    """

    def __init__(self, dim: int, k: float) -> None:
        super().__init__()
        self.dim = self.inputs = _at_least_one("CappedSimplex.dim", dim)
        self.k = _number("CappedSimplex.k", k)
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
            high = torch.full_like(v[..., :1], far)
            low = -high
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

    def nearest(self, y: Tensor) -> Tensor:
        return _waterfill(y, self.k)

    def violation(self, y: Tensor) -> Tensor:
        return _spilt(y, self.k)

    def linear(self, g: Tensor) -> Tensor:
        filled = (self.k - torch.arange(self.dim, dtype=g.dtype, device=g.device)).clamp(0, 1)
        return torch.zeros_like(g).scatter(-1, g.argsort(-1), filled.expand_as(g))


class Sphere(Domain):
    """{y : |y| = 1}, reached by v / |v|; the origin, from which every point is as near, goes to the first axis.

    Args:
        dim: n, of the space around it: 3 for the globe.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = _at_least_one("Sphere.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        axis = torch.zeros_like(v[..., :1])
        axis = torch.cat([axis + 1, axis.expand(*v.shape[:-1], self.dim - 1)], dim=-1)
        v = torch.where((v == 0).all(-1, keepdim=True), axis, v)
        v = v / _size(v)
        length: Tensor = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return v / length

    def nearest(self, y: Tensor) -> Tensor:
        return self.project(y)

    def violation(self, y: Tensor) -> Tensor:
        return (_length(y) - 1).abs()

    def linear(self, g: Tensor) -> Tensor:
        return self.project(-g.detach())


class SecondOrderCone(Domain):
    """{y = (z, t) : |z| <= t}, t the last coordinate, reached by its Euclidean projection (Parikh and Boyd, 2014, 6.3.2).

    Args:
        dim: n, t included.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = _at_least_one("SecondOrderCone.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(v)

    def nearest(self, y: Tensor) -> Tensor:
        size = _size(y)  # a projection onto a cone scales with its argument
        z, t, length = self._parts(y / size)
        half = (length + t) / 2
        edge = torch.cat([z * (half / torch.where(length > t.abs(), length, 1.0)), half], dim=-1)
        return torch.where(length <= t, y, torch.where(length <= -t, 0.0, size * edge))

    def violation(self, y: Tensor) -> Tensor:
        size = _size(y)
        _, t, length = self._parts(y / size)
        apart = (size * (length - t).relu() / math.sqrt(2))[..., 0]
        return torch.where((length <= -t)[..., 0], _length(y), apart)

    @staticmethod
    def _parts(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, n - 1), t (B, 1), and |z| (B, 1)."""
        z, t = y[..., :-1], y[..., -1:]
        return z, t, torch.linalg.vector_norm(z, dim=-1, keepdim=True)


class PSD(Domain):
    """Symmetric positive semidefinite matrices, flattened row by row, reached by clipping eigenvalues at 0.

    That is the Euclidean projection; of a matrix that is not symmetric, the symmetric part is taken.

    Args:
        size: rows of the matrix; dim is size^2.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = _at_least_one("PSD.size", size)
        self.dim = self.inputs = size * size

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(v)

    def nearest(self, y: Tensor) -> Tensor:
        matrix = _matrix(y, self.size)
        clipped: Tensor = _ClipEigenvalues.apply((matrix + matrix.mT) / 2)  # type: ignore[no-untyped-call]
        return clipped.flatten(-2)

    def violation(self, y: Tensor) -> Tensor:
        matrix = _matrix(y, self.size)
        even, odd = (matrix + matrix.mT) / 2, (matrix - matrix.mT) / 2
        below = torch.linalg.eigvalsh(_finite_or_zero(even)).clamp(max=0)
        return _length(torch.cat([odd.flatten(-2), below], dim=-1))


class _ClipEigenvalues(torch.autograd.Function):
    """A symmetric (B, m, m) -> Q max(w, 0) Q' with A = Q w Q'.

    eigh's own derivative divides by differences of eigenvalues. That of a matrix function needs divided differences alone,
    which stay finite for repeated ones (Higham, Functions of matrices, theorem 3.11).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        w, q = torch.linalg.eigh(_finite_or_zero(a))
        w = torch.where(a.isfinite().all(-1).all(-1, keepdim=True), w, torch.nan)
        ctx.save_for_backward(a, w, q)
        clipped: Tensor = (q * w.relu()[..., None, :]) @ q.mT
        return clipped

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope: Tensor = _ClipSlope.apply(*ctx.saved_tensors, g)  # type: ignore[no-untyped-call]
        return slope


class _ClipSlope(torch.autograd.Function):
    """The derivative of `_ClipEigenvalues` at A = Q w Q', applied to G (B, m, m); differentiable once, in A and in G."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, q: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(w, q, g)
        return _clip_slope(w, q, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None, None, Tensor]:
        w, q, g = ctx.saved_tensors
        inverse, rise, fall = _clip_differences(w)
        x, y = q.mT @ g.mT @ q, q.mT @ h @ q
        bent = torch.zeros_like(x)
        for left, right in ((x, y), (y, x)):  # (i, j) -> sum_k f[w_i, w_k, w_j] left_ik right_kj
            # where f = max(., 0), two of the three must lie on one side; each line is for one that may be the other
            bent = bent + fall * (left @ (inverse * right)) + rise.mT * (left @ (inverse.mT * right))
            bent = bent + (fall * left) @ (inverse.mT * right) + (rise.mT * left) @ (inverse * right)
            bent = bent + fall.mT * ((inverse.mT * left) @ right) + rise * ((inverse * left) @ right)
        return q @ bent @ q.mT, None, None, _clip_slope(w, q, h)


def _finite_or_zero(a: Tensor) -> Tensor:
    """a (B, m, m), 0 for those that are not finite: a decomposition fails for the batch where it fails for one."""
    return torch.where(a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), a, 0.0)


def _clip_slope(w: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """Q (F o Q' G Q) Q' (B, m, m), F_ij = (max(w_i, 0) - max(w_j, 0)) / (w_i - w_j): 1 and 0 where the signs are equal."""
    _, rise, _ = _clip_differences(w)
    above = (w > 0).to(w.dtype)
    return q @ ((above[..., :, None] * above[..., None, :] + rise + rise.mT) * (q.mT @ g @ q)) @ q.mT


def _clip_differences(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 / (w_i - w_j), w_i / (w_i - w_j) and -w_j / (w_i - w_j), each (B, m, m), where w_i > 0 >= w_j, and 0 elsewhere."""
    apart = (w[..., :, None] > 0) & (w[..., None, :] <= 0)  # so that the difference is a sum, and nothing cancels
    inverse = torch.where(apart, 1 / (w[..., :, None] - w[..., None, :]), 0.0)
    return inverse, inverse * w[..., :, None], -inverse * w[..., None, :]


class ExponentialCone(Domain):
    """The closure of {(r, s, t) : s > 0, s exp(r / s) <= t}, reached by its Euclidean projection.

    Off the easy cases, v is a point of a ray of the cone's boundary plus one of the ray of the polar cone that is normal to
    it. Both rays are known by one number rho, the root of a function that rises (Friberg, 2023, Projection onto the
    exponential cone: a univariate root-finding problem).
    """

    def __init__(self) -> None:
        super().__init__()
        self.dim = self.inputs = 3

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(v)

    def nearest(self, y: Tensor) -> Tensor:
        size = _size(y)  # as for the other cones
        r, s, t = v = (y / size).unbind(-1)
        with torch.no_grad():
            inside = torch.where(s > 0, s * (r / s).exp() <= t, (s == 0) & (r <= 0) & (t >= 0))
            polar = (r > 0) & (r * (s / r - 1).exp() <= -t)
            face = (r <= 0) & (s <= 0)
            boundary = ~(inside | polar | face)
        apex = torch.zeros_like(r)
        on_ray = _exponential_ray(*(torch.where(boundary, part, 1.0 if i < 2 else 0.0) for i, part in enumerate(v)))
        cases = [
            torch.where(inside, kept, torch.where(polar, 0.0, torch.where(face, flat, ray)))
            for kept, flat, ray in zip(v, (r, apex, t.relu()), on_ray, strict=True)
        ]
        return size * torch.stack(cases, dim=-1)

    def violation(self, y: Tensor) -> Tensor:
        with torch.no_grad():  # where `nearest` is right, what moves it is at a right angle to y - nearest(y)
            known = [_raised(y), _raised(self.nearest(y))]
        return torch.stack([_length(y - point) for point in known]).amin(0)


def _raised(y: Tensor) -> Tensor:
    """y (B, 3) -> a point of the cone beyond doubt: of (r, s, t) with s > 0, t is raised to the boundary."""
    r, s, t = y.unbind(-1)
    boundary = torch.where(s > 0, s * (r / s).exp(), 0.0).clamp(max=torch.finfo(y.dtype).max / 4)
    return torch.stack([torch.where(s > 0, r, r.clamp(max=0)), s.relu(), torch.maximum(t, boundary)], dim=-1)


def _exponential_ray(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r, s, t), each (B,), neither in the cone, nor in its polar, nor over its flat face -> their projection.

    (r, s, t) = a (rho, 1, e^rho) + b (1, 1 - rho, -e^-rho) with a, b > 0. The first two rows give a = A / q and b = B / q with
    A = (rho - 1) r + s, B = r - rho s, q = rho^2 - rho + 1; the third, times q, is what rho is the root of.
    """
    with torch.no_grad():
        # A > 0 and B > 0 bound rho by r and s alone on one side or both; `room` is how much further the root can lie
        first, last, far = 1 - s / r, r / s, 1 / torch.finfo(r.dtype).eps
        over, under = (2 + 2 * part.relu().log1p() for part in (t / r, -t / s))
        high = torch.minimum(torch.where(s > 0, last, far), torch.where(r > 0, first.clamp(min=1) + over, far))
        low = torch.maximum(torch.where(r > 0, first, -far), torch.where(s > 0, last.clamp(max=0) - under, -far))
        low, high = low.clamp(-far, far), high.clamp(-far, far)
        for _ in range(64):
            middle = (low + high) / 2
            below = _exponential_root(middle, r, s, t)[0] < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        rho = (low + high) / 2
    for _ in range(2):  # as in CappedSimplex: exact first and second derivatives
        value, slope = _exponential_root(rho, r, s, t)
        # where the slope is lost in rounding, so is the step
        rho = rho - (value / slope.clamp(min=torch.finfo(r.dtype).tiny)).clamp(-1e-3, 1e-3)
    q = rho.square() - rho + 1
    a, b = ((rho - 1) * r + s) / q, (r - rho * s) / q
    # whichever of a e^rho and b e^-rho would blow rounding up is not used
    steep, shrink = rho > 0, (-rho.abs()).exp()
    height = torch.where(steep, (t + b * shrink).relu(), a * shrink)
    a = torch.where(steep, height * shrink, a)
    return a * rho, a, height


def _exponential_root(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """rho (B,) -> A e^rho - B e^-rho - t q and its slope in rho, both (B,), over e^|rho| so that neither overflows."""
    scale = rho.detach().abs()
    up, down, one = (rho - scale).exp(), (-rho - scale).exp(), (-scale).exp()
    a, b = (rho - 1) * r + s, r - rho * s
    value = a * up - b * down - t * (rho.square() - rho + 1) * one
    return value, (r + a) * up + (s + b) * down - t * (2 * rho - 1) * one


class Birkhoff(Domain):
    """Doubly stochastic matrices, flattened row by row, reached by Sinkhorn's iteration on exp(v).

    What the iterations leave undone is mended by the rounding of Altschuler, Weed and Rigollet (2017, algorithm 2), so that
    y is in Y after any number of them.

    Args:
        size: rows of the matrix; dim is size^2.

    Attributes:
        sinkhorn: iterations of `project`.
        newton: iterations of `nearest`, in each of its stages.
    """

    sinkhorn = 20
    newton = 26

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = _at_least_one("Birkhoff.size", size)
        self.dim = self.inputs = size * size

    def project(self, v: Tensor) -> Tensor:
        log = _matrix(v, self.size)
        for _ in range(self.sinkhorn):
            log = log - log.logsumexp(-1, keepdim=True)
            log = log - log.logsumexp(-2, keepdim=True)
        return _doubly_stochastic(log.exp()).flatten(-2)

    def nearest(self, y: Tensor) -> Tensor:
        """Newton's method on the dual: Y = max(V + a 1' + 1 b', 0) (Li, Sun and Toh, 2020), in stages, V's scale growing.

        For large V the multipliers are so large that the sums in Y are lost in their rounding. So V begins within [-1, 0],
        what a stage finds is taken into V, which changes no projection, and only then V is doubled, up to nine times. Beyond
        the scale 1 / eps, projections move less than they do by the rounding of V.
        """
        matrix, eps = _matrix(y, self.size), torch.finfo(y.dtype).eps
        last = math.ceil(math.log2(self.size / eps))
        stages = math.ceil(last / 9)
        with torch.no_grad():
            z = matrix - matrix.amax(-1, keepdim=True)
            z = z - z.amax(-2, keepdim=True)
            size = z.abs().amax((-1, -2), keepdim=True).clamp(min=1).log2().ceil()  # as a power of 2
            power = size.clamp(max=last)
            z = torch.ldexp(z, -size)
            for stage in range(stages):
                z = torch.ldexp(z, (power * (stage + 1) / stages).floor() - (power * stage / stages).floor())
                z = z + 1 - z.amax(-1, keepdim=True)
                for _ in range(self.newton):
                    off, step = _dual_newton(z)
                    length = _line_search(z, step)
                    # at the solution only rounding is left, and following it would lead away
                    moves = off.abs().amax(-1) > 4 * self.size * eps
                    z = z + torch.where(moves, length, 0.0)[..., None, None] * step
        # a step from the solution has the derivative that the implicit function theorem gives; what is 0 stays 0 in it
        z = z + torch.ldexp(matrix - matrix.detach(), power - size)
        return _doubly_stochastic(torch.where(z > 0, z + _dual_newton(z)[1], 0.0).relu()).flatten(-2)

    def violation(self, y: Tensor) -> Tensor:
        matrix = _matrix(y, self.size)
        margins = [_length(matrix.sum(axis) - 1) / math.sqrt(self.size) for axis in (-1, -2)]
        return torch.stack([_length(y.clamp(max=0)), *margins]).amax(0)

    def linear(self, g: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment  # here, since importing it takes longer than most runs of `linear`

        corner = torch.zeros(*g.shape[:-1], self.size, self.size, dtype=g.dtype, device=g.device)
        # an assignment is solved on the host: this is for certificates, not for updates
        for i, cost in enumerate(_matrix(g.detach(), self.size).numpy(force=True)):
            corner[i][linear_sum_assignment(cost)] = 1.0
        return corner.flatten(-2)


def _doubly_stochastic(y: Tensor) -> Tensor:
    """y (B, m, m) >= 0 -> rows and columns above 1 scaled down to it, and what is missing spread by its margins."""
    y = y / y.sum(-1, keepdim=True).clamp(min=1)
    y = y / y.sum(-2, keepdim=True).clamp(min=1)
    rows, columns = (1 - y.sum(-1, keepdim=True)).relu(), (1 - y.sum(-2, keepdim=True)).relu()
    return y + rows * (columns / columns.sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny))


def _dual_newton(z: Tensor) -> tuple[Tensor, Tensor]:
    """z = V + a 1' + 1 b' (B, m, m) -> how far the sums of max(z, 0) are off (B, 2m), and the step of a 1' + 1 b' (B, m, m)."""
    y, m = z.relu(), z.shape[-1]
    off = torch.cat([y.sum(-1), y.sum(-2)], dim=-1) - 1
    with torch.no_grad():
        active = (z > 0).to(z.dtype)
        # a + c, b - c changes nothing, so the matrix is singular: 1 added along that line, and a little where parts fall apart
        curvature = torch.cat([torch.cat([active.sum(-1).diag_embed() + 1, active - 1], -1),
                               torch.cat([active.mT - 1, active.sum(-2).diag_embed() + 1], -1)], -2)  # fmt: skip
        damping = 1e-6 * off.abs().amax(-1, keepdim=True).clamp(max=1) + torch.finfo(z.dtype).eps ** (2 / 3)
        curvature = curvature + damping.expand_as(off).diag_embed()
    move = -torch.linalg.solve_ex(curvature, off)[0]
    return off, move[..., :m, None] + move[..., None, m:]


def _line_search(z: Tensor, step: Tensor) -> Tensor:
    """The length (B,) in [0, 2] at which sum max(z + length step, 0)^2 / 2 - sum(a + b) is least: exact, from its kinks.

    The slope of that function is piecewise linear; it is followed over its sorted kinks until it is no longer negative. Beyond
    twice Newton's length it would only follow its rounding.
    """
    m = z.shape[-1]
    z, step = z.flatten(-2), step.flatten(-2)
    slope = (z.relu() * step).sum(-1, keepdim=True) - step.sum(-1, keepdim=True) / m
    curve = ((z > 0) * step.square()).sum(-1, keepdim=True)
    kinks = torch.where(torch.where(z > 0, step < 0, step > 0), -z / step, torch.inf)
    kinks, order = kinks.sort(-1)
    # a coordinate adds its part of the curve from where it begins to be positive, and takes it away from where it ends
    curve = torch.cat([curve, curve + (step * step.abs()).gather(-1, order).cumsum(-1)], dim=-1)
    at = torch.cat([torch.zeros_like(slope), kinks], dim=-1)
    gaps = torch.where(kinks.isinf(), 0.0, kinks - at[..., :-1])
    slopes = torch.cat([slope, slope + (curve[..., :-1] * gaps).cumsum(-1)], dim=-1)
    last = (((slopes < 0) & at.isfinite()).sum(-1, keepdim=True) - 1).clamp(min=0)
    at, slope, curve = (part.gather(-1, last)[..., 0] for part in (at, slopes, curve))
    further = torch.where(curve > torch.finfo(z.dtype).tiny, -slope / curve, 0.0)
    return (at + further.clamp(min=0)).clamp(max=2)


class Product(Domain):
    """Y_1 x Y_2 x ...: inputs and coordinates one after the other.

    Args:
        domains: the factors, in order; none of them a density.
    """

    def __init__(self, domains: Iterable[Domain]) -> None:
        super().__init__()
        if not isinstance(domains, Iterable):
            raise UserError(f"Product.domains: a {type(domains).__name__} is given; a list of domains is needed")
        domains = list(domains)
        _at_least_one("Product.domains: their number", len(domains))
        for i, domain in enumerate(domains):
            if not isinstance(domain, Domain) or isinstance(domain, Density):
                raise UserError(f"Product.domains[{i}]: a {type(domain).__name__} is given; a domain, not a density, is needed")
        self.domains = nn.ModuleList(domains)
        self.sizes, self.input_sizes = [d.dim for d in domains], [d.inputs for d in domains]
        self.dim, self.inputs = sum(self.sizes), sum(self.input_sizes)

    def _factors(self, sizes: list[int], row: Tensor) -> Iterable[tuple[Domain, Tensor]]:
        return zip(self.domains, row.split_with_sizes(sizes, dim=-1), strict=True)  # type: ignore[arg-type]

    def project(self, v: Tensor) -> Tensor:
        return torch.cat([domain.project(part) for domain, part in self._factors(self.input_sizes, v)], dim=-1)

    def nearest(self, y: Tensor) -> Tensor:
        return torch.cat([domain.nearest(part) for domain, part in self._factors(self.sizes, y)], dim=-1)

    def violation(self, y: Tensor) -> Tensor:
        return _length(torch.stack([domain.violation(part) for domain, part in self._factors(self.sizes, y)], dim=-1))

    def linear(self, g: Tensor) -> Tensor:
        return torch.cat([domain.linear(part) for domain, part in self._factors(self.sizes, g)], dim=-1)

    def act(self, u: Tensor) -> Tensor:
        return torch.cat([domain.act(part) for domain, part in self._factors(self.input_sizes, u)], dim=-1)


class Gaussian(Density):
    """y ~ N(mean, exp(log_std)^2) per coordinate, on R^dim; lam = (mean | log_std).

    Args:
        dim: coordinates of y.
        log_std_low: lower bound of log_std.
        log_std_high: upper bound of log_std.
    """

    def __init__(self, dim: int, log_std_low: float = -20.0, log_std_high: float = 2.0) -> None:
        super().__init__()
        self.dim = _at_least_one("Gaussian.dim", dim)
        self.inputs = 2 * dim
        self.bounds = _spread_bounds("Gaussian", log_std_low, log_std_high)

    def project(self, v: Tensor) -> Tensor:
        mean, log_std = v.chunk(2, dim=-1)
        return torch.cat([mean, log_std.clamp(*self.bounds)], dim=-1)

    def sample(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = lam.chunk(2, dim=-1)
        noise = torch.randn_like(mean)
        logq = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return mean + log_std.exp() * noise, logq.sum(-1)

    def median(self, lam: Tensor) -> Tensor:
        return lam.chunk(2, dim=-1)[0]

    def kl(self, lam: Tensor) -> Tensor:
        """lam (B, inputs) -> KL(q(.; lam) | N(0, I)) (B,), in nats (Kingma and Welling, 2014, appendix B)."""
        mean, log_std = lam.chunk(2, dim=-1)
        return 0.5 * (mean.square() + (2 * log_std).expm1() - 2 * log_std).sum(-1)


class SquashedGaussian(Density):
    """y = tanh(v) with v ~ N(mean, exp(log_std)^2) per coordinate, on [-1, 1]^dim; lam = (mean | log_std).

    Haarnoja et al. (2018), appendix C. The density is that of y in [-1, 1]^dim, whatever units an environment uses.

    Args:
        dim: coordinates of y.
        log_std_low: lower bound of log_std.
        log_std_high: upper bound of log_std.
    """

    def __init__(self, dim: int, log_std_low: float = -20.0, log_std_high: float = 2.0) -> None:
        super().__init__()
        self.dim = _at_least_one("SquashedGaussian.dim", dim)
        self.inputs = 2 * dim
        self.bounds = _spread_bounds("SquashedGaussian", log_std_low, log_std_high)

    def project(self, v: Tensor) -> Tensor:
        mean, log_std = v.chunk(2, dim=-1)
        return torch.cat([mean, log_std.clamp(*self.bounds)], dim=-1)

    def sample(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = lam.chunk(2, dim=-1)
        noise = torch.randn_like(mean)
        v = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log |d tanh(v) / dv| = log(1 - tanh(v)^2), in the form that neither overflows nor cancels for large |v|
        log_slope = 2 * (math.log(2) - v - nn.functional.softplus(-2 * v))
        return v.tanh(), (log_normal - log_slope).sum(-1)

    def draw(self, lam: Tensor) -> Tensor:
        mean, log_std = lam.chunk(2, dim=-1)
        return (mean + log_std.exp() * torch.randn_like(mean)).tanh()

    def median(self, lam: Tensor) -> Tensor:
        return lam.chunk(2, dim=-1)[0].tanh()


def _at_least_one(field: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, SupportsIndex) or operator.index(given) < 1:
        raise UserError(f"{field}: {given!r} is given; an integer of at least 1 is needed")
    return operator.index(given)


def _number(field: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, SupportsFloat):
        raise UserError(f"{field}: {given!r} is given; a number is needed")
    return float(given)


def _bounds(field: str, given: Any) -> list[float]:
    try:
        bounds = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # by what it is that is no number
        bounds = torch.tensor(math.nan)
    if bounds.ndim != 1:
        raise UserError(f"{field}: {given!r} is given; a list of numbers, one a coordinate, is needed, as in Box([0.0], [1.0])")
    return [float(bound) for bound in bounds.detach()]


def _spread_bounds(name: str, low: Any, high: Any) -> tuple[float, float]:
    bounds = _number(f"{name}.log_std_low", low), _number(f"{name}.log_std_high", high)
    if not bounds[0] < bounds[1]:
        raise UserError(f"{name}.log_std_low: {low} is given; one below log_std_high = {high} is needed")
    return bounds


def _size(v: Tensor) -> Tensor:
    """v (B, n) -> (B, 1) > 0: its largest absolute value, by which it is divided before it is squared; detached."""
    return v.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)


def _length(v: Tensor) -> Tensor:
    """v (B, n) -> |v| (B,), also where the squares would leave the range of floats."""
    size = _size(v)
    length: Tensor = size[..., 0] * torch.linalg.vector_norm(v / size, dim=-1)
    return length


def _kth_largest(v: Tensor, k: int) -> Tensor:
    """v (B, n), 1 <= k <= n -> (B, 1): its k-th largest entry, detached."""
    return v.detach().kthvalue(v.shape[-1] - k + 1, dim=-1, keepdim=True)[0]


def _waterfill(v: Tensor, k: float) -> Tensor:
    """v (B, n) -> argmin_{0 <= y <= 1, sum y = k} |y - v| (B, n): y = clamp(v - tau, 0, 1), by sorting.

    As tau falls, coordinate i begins to fill at v_i and is full at v_i - 1; between two such kinks the sum is linear.
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
    """y (B, n) -> (B,): its distance to 0 <= y <= 1, or to sum y = k where that is larger."""
    return torch.maximum(_length(y - y.clamp(0, 1)), (y.sum(-1) - k).abs() / math.sqrt(y.shape[-1]))


def _matrix(y: Tensor, size: int) -> Tensor:
    """(B, size^2) -> (B, size, size)."""
    return y.reshape(*y.shape[:-1], size, size)
