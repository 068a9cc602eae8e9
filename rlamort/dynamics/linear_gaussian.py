"""Time-varying linear-Gaussian models from few samples, by a prior that a mixture of Gaussians gives (Levine and Abbeel, 2014).

Dynamics and controllers are the same conditional: of x' given z = (x, u), and of u given x. Everything is in float64.

M conditions · T steps · N samples of a step · z inputs (i numbers) · w outputs (o numbers) · k = i + o · C clusters · P points
"""

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-6  # of variances, where coordinates have the spread 1: what is below is rounding of samples in float32
ROUNDS = 30  # of expectation and maximisation


class LinearGaussian(NamedTuple):
    """w ~ N(gain z + offset, covariance), at each step of each condition."""

    gain: Tensor  # (M, T, o, i)
    offset: Tensor  # (M, T, o)
    covariance: Tensor  # (M, T, o, o)

    def mean(self, z: Tensor) -> Tensor:
        """z (M, T, N, i) -> the mean of w (M, T, N, o)."""
        return z @ self.gain.mT + self.offset[..., None, :]


class Mixture(NamedTuple):
    """Gaussians, and the spread of the points that they were fitted to, in units of which they are."""

    weight: Tensor  # (C,)
    mean: Tensor  # (C, k)
    covariance: Tensor  # (C, k, k)
    spread: Tensor  # (k,)


class Prior:
    """A normal-inverse-Wishart prior of the joint distribution of (z, w) at a step, from a mixture fitted to all steps.

    Its mean and covariance are the moments of the clusters, weighed by how probable they made the step's samples. With one
    cluster all steps are pooled.

    Args:
        clusters: C, at most.
        least: points for a cluster, below which there are fewer clusters.
        strength: samples that the prior counts for.
    """

    def __init__(self, clusters: int, least: int, strength: float) -> None:
        self.clusters, self.least, self.strength = clusters, least, strength

    @torch.no_grad()
    def mixture(self, points: Tensor) -> Mixture:
        """Fit the mixture to points (P, k) by expectation-maximisation, from random points of them as centres."""
        points, spread = points.double(), points.double().std(0, correction=0)
        spread = torch.where(spread > 1e-9, spread, 1)
        points = points / spread
        count = max(1, min(self.clusters, len(points) // self.least))
        centres = points[torch.randperm(len(points), device=points.device)[:count]]
        nearest = torch.cdist(points, centres).argmin(1)
        shares = torch.nn.functional.one_hot(nearest, count).to(points)  # (P, C)
        for _ in range(ROUNDS if count > 1 else 0):
            shares = _responsibilities(points, *_moments(points, shares))
        return Mixture(*_moments(points, shares), spread)

    @torch.no_grad()
    def fitted(self, z: Tensor, w: Tensor, mixture: Mixture) -> LinearGaussian:
        """Condition the posterior joint Gaussian of each step: z (M, T, N, i), w (M, T, N, o) -> w given z.

        Where data have no noise, every cluster of the mixture satisfies w = A z + b, and so does the posterior.
        """
        points = torch.cat([z, w], -1).double() / mixture.spread  # (M, T, N, k)
        count, i = points.shape[-2], z.shape[-1]
        weight, means, covariances, _ = mixture
        seen = _responsibilities(points.flatten(0, 2), weight, means, covariances).view(*points.shape[:-1], -1).mean(2)
        prior = seen @ means  # (M, T, k)
        apart = means - prior[..., None, :]  # (M, T, C, k)
        within = torch.einsum("mtc,cij->mtij", seen, covariances)
        wide = within + torch.einsum("mtc,mtci,mtcj->mtij", seen, apart, apart)
        mean = points.mean(2)
        off, centred = mean - prior, points - mean[..., None, :]
        s = self.strength
        joint = centred.mT @ centred + s * wide + (count * s / (count + s)) * off[..., :, None] * off[..., None, :]
        joint = joint / (count + s)
        inputs = joint[..., :i, :i] + RIDGE * torch.eye(i, dtype=joint.dtype, device=joint.device)
        gain = torch.linalg.solve(inputs, joint[..., :i, i:]).mT  # (M, T, o, i)
        pull = torch.cat(
            [-gain, torch.eye(gain.shape[-2], dtype=gain.dtype, device=gain.device).expand(*gain.shape[:-1], -1)], -1
        )
        left = pull @ joint @ pull.mT  # what w has beside gain z
        offset = mean[..., i:] - (gain @ mean[..., :i, None])[..., 0]
        into, out = mixture.spread[:i], mixture.spread[i:]
        return LinearGaussian(out[:, None] * gain / into, out * offset, out[:, None] * (left + left.mT) / 2 * out)


def _moments(points: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (C,), means (C, k) and covariances (C, k, k) of points (P, k), of which each cluster has shares (P, C)."""
    mass = shares.sum(0).clamp(min=1e-9)
    means = shares.mT @ points / mass[:, None]
    second = torch.einsum("pc,pi,pj->cij", shares, points, points) / mass[:, None, None]
    return mass / mass.sum(), means, second - means[:, :, None] * means[:, None, :]


def _responsibilities(points: Tensor, weight: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """The probability of each cluster (P, C) given a point; covariances are firm by the ridge, here alone."""
    firm = covariances + RIDGE * torch.eye(points.shape[-1], dtype=points.dtype, device=points.device)
    values, vectors = torch.linalg.eigh(firm)
    values = values.clamp(min=RIDGE / 2)  # of a difference of moments, which rounds below 0
    away = torch.einsum("pck,ckj->pcj", points[:, None] - means, vectors)
    logs: Tensor = -0.5 * (away.square() / values).sum(-1) - 0.5 * values.log().sum(-1) + weight.log()
    return logs.softmax(-1)
