"""Cones as domains: second-order, positive semidefinite, exponential."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlamort.domain.base import Domain, as_matrix, at_least_one, magnitude, norm_of


class SecondOrderCone(Domain):
    """{y = (z, t) : |z| <= t}, t the last coordinate; `project` is Euclidean (Parikh and Boyd, 2014, 6.3.2).

    Args:
        dim: n, t included.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.inputs = at_least_one("SecondOrderCone.dim", dim)

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(v)

    def nearest(self, y: Tensor) -> Tensor:
        size = magnitude(y)  # a projection onto a cone scales with its argument
        z, t, length = self._parts(y / size)
        half = (length + t) / 2
        edge = torch.cat([z * (half / torch.where(length > t.abs(), length, 1.0)), half], dim=-1)
        return torch.where(length <= t, y, torch.where(length <= -t, 0.0, size * edge))

    def violation(self, y: Tensor) -> Tensor:
        size = magnitude(y)
        _, t, length = self._parts(y / size)
        apart = (size * (length - t).relu() / math.sqrt(2))[..., 0]
        return torch.where((length <= -t)[..., 0], norm_of(y), apart)

    @staticmethod
    def _parts(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, n - 1), t (B, 1), and |z| (B, 1)."""
        z, t = y[..., :-1], y[..., -1:]
        return z, t, torch.linalg.vector_norm(z, dim=-1, keepdim=True)


class PSD(Domain):
    """Symmetric positive semidefinite matrices, flattened row by row; `project` clips eigenvalues of the symmetric part.

    That is the Euclidean projection.

    Args:
        size: rows of the matrix; dim is size^2.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = at_least_one("PSD.size", size)
        self.dim = self.inputs = size * size

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(v)

    def nearest(self, y: Tensor) -> Tensor:
        matrix = as_matrix(y, self.size)
        clipped: Tensor = _ClipEigenvalues.apply((matrix + matrix.mT) / 2)  # type: ignore[no-untyped-call]
        return clipped.flatten(-2)

    def violation(self, y: Tensor) -> Tensor:
        matrix = as_matrix(y, self.size)
        even, odd = (matrix + matrix.mT) / 2, (matrix - matrix.mT) / 2
        below = torch.linalg.eigvalsh(_finite_or_zero(even)).clamp(max=0)
        return norm_of(torch.cat([odd.flatten(-2), below], dim=-1))


class _ClipEigenvalues(torch.autograd.Function):
    """A symmetric (B, m, m) -> Q max(w, 0) Q' with A = Q w Q'.

    The derivative of eigh divides by differences of eigenvalues. That of a matrix function needs only divided differences,
    which are finite for repeated ones (Higham, Functions of matrices, theorem 3.11).
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
    """a (B, m, m) with non-finite matrices replaced by 0, since a decomposition that fails for one fails for the batch."""
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
    """The closure of {(r, s, t) : s > 0, s exp(r / s) <= t}; `project` is Euclidean.

    Apart from the closed-form cases, v is a point on a ray of the cone's boundary plus a point on the normal ray of the polar
    cone. Both rays are determined by one number rho, the root of an increasing function (Friberg, 2023, Projection onto the
    exponential cone: a univariate root-finding problem).
    """

    def __init__(self) -> None:
        super().__init__()
        self.dim = self.inputs = 3

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(v)

    def nearest(self, y: Tensor) -> Tensor:
        size = magnitude(y)  # as for the other cones
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
        return torch.stack([norm_of(y - point) for point in known]).amin(0)


def _raised(y: Tensor) -> Tensor:
    """y (B, 3) -> a feasible point: of (r, s, t) with s > 0, t is raised to the boundary."""
    r, s, t = y.unbind(-1)
    boundary = torch.where(s > 0, s * (r / s).exp(), 0.0).clamp(max=torch.finfo(y.dtype).max / 4)
    return torch.stack([torch.where(s > 0, r, r.clamp(max=0)), s.relu(), torch.maximum(t, boundary)], dim=-1)


def _exponential_ray(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r, s, t), each (B,), outside the cone, its polar and the region of its flat face -> their projection.

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
