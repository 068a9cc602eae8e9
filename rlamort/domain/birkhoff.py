"""Doubly stochastic matrices as a domain."""

import math

import torch
from torch import Tensor

from rlamort.domain.base import Domain, as_matrix, at_least_one, norm_of


class Birkhoff(Domain):
    """Doubly stochastic matrices, flattened row by row; `project` is Sinkhorn's iteration on exp(v).

    The remaining violation is removed by the rounding of Altschuler, Weed and Rigollet (2017, algorithm 2), so that y is in Y
    after any number of iterations.

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
        self.size = at_least_one("Birkhoff.size", size)
        self.dim = self.inputs = size * size

    def project(self, v: Tensor) -> Tensor:
        log = as_matrix(v, self.size)
        for _ in range(self.sinkhorn):
            log = log - log.logsumexp(-1, keepdim=True)
            log = log - log.logsumexp(-2, keepdim=True)
        return _doubly_stochastic(log.exp()).flatten(-2)

    def nearest(self, y: Tensor) -> Tensor:
        """Newton's method on the dual: Y = max(V + a 1' + 1 b', 0) (Li, Sun and Toh, 2020), in stages of growing scale of V.

        For large V the multipliers are so large that the sums in Y are lost to rounding. So V starts scaled to [-1, 0]; each
        stage adds its multipliers to V, which does not change the projection, and then doubles V up to nine times. Beyond a
        scale of 1 / eps the projection changes less than by the rounding of V.
        """
        matrix, eps = as_matrix(y, self.size), torch.finfo(y.dtype).eps
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
        matrix = as_matrix(y, self.size)
        margins = [norm_of(matrix.sum(axis) - 1) / math.sqrt(self.size) for axis in (-1, -2)]
        return torch.stack([norm_of(y.clamp(max=0)), *margins]).amax(0)

    def linear(self, g: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment  # here, since importing it takes longer than most runs of `linear`

        corner = torch.zeros(*g.shape[:-1], self.size, self.size, dtype=g.dtype, device=g.device)
        # an assignment is solved on the host: this is for certificates, not for updates
        for i, cost in enumerate(as_matrix(g.detach(), self.size).numpy(force=True)):
            corner[i][linear_sum_assignment(cost)] = 1.0
        return corner.flatten(-2)


def _doubly_stochastic(y: Tensor) -> Tensor:
    """y (B, m, m) >= 0 -> sums above 1 scaled down, and the deficit added in proportion to its marginals."""
    y = y / y.sum(-1, keepdim=True).clamp(min=1)
    y = y / y.sum(-2, keepdim=True).clamp(min=1)
    rows, columns = (1 - y.sum(-1, keepdim=True)).relu(), (1 - y.sum(-2, keepdim=True)).relu()
    return y + rows * (columns / columns.sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny))


def _dual_newton(z: Tensor) -> tuple[Tensor, Tensor]:
    """z = V + a 1' + 1 b' (B, m, m) -> residual of the sums of max(z, 0) (B, 2m), and Newton's step of z (B, m, m)."""
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
    """The step length (B,) in [0, 2] that minimises sum max(z + length step, 0)^2 / 2 - sum(a + b), exact from its kinks.

    The derivative of that function is piecewise linear; the sorted kinks are traversed until it is no longer negative. Beyond
    twice Newton's length only rounding is left.
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
