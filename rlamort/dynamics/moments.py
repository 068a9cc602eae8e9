"""Moments of functions of Gaussian vectors, in closed form (Deisenroth and Rasmussen, 2011, section 2.2), in float64.

w ~ N(mean (k,), cov (k, k)) an input · D outputs · N data or basis functions
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """A function's output, as a Gaussian vector beside its input."""

    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)
    slope: Tensor  # (k, D): cov(w, output) = cov slope, by Stein's lemma the mean of the derivative


def radial(
    mean: Tensor, cov: Tensor, centres: Tensor, lengths: Tensor, signal: Tensor, weights: Tensor
) -> tuple[Moments, Tensor]:
    """Moments of sums of Gaussian functions, f_a(w) = signal_a sum_i weights_ai exp(-|(w - centres_i) / lengths_a|^2 / 2).

    The product of Gaussian functions, and their integral with a normal density, are Gaussian functions, of which all follows.

    Args:
        mean: (k,).
        cov: (k, k), which may be singular.
        centres: (N, k).
        lengths: (D, k).
        signal: (D,).
        weights: (D, N).

    Returns:
        Moments, and the means (D, N, N) of the products of the functions of each output, without weights.
    """
    away, eye, precision = centres - mean, torch.eye(len(mean)).to(mean), lengths.pow(-2)
    wide = cov + torch.diag_embed(lengths.square())  # (D, k, k)
    solved = torch.linalg.solve(wide, away.mT.expand(len(lengths), -1, -1))  # (D, k, N)
    shrunk = signal * (torch.linalg.det(wide).rsqrt() * lengths.prod(-1))
    q = weights * shrunk[:, None] * (-0.5 * (away.mT * solved).sum(1)).exp()  # (D, N)
    first = q.sum(-1)
    z = away * precision[:, None]  # (D, N, k)
    log = signal.log()[:, None] - 0.5 * (away * z).sum(-1)  # (D, N)
    both = cov * (precision[:, None] + precision)[:, :, None] + eye  # (D, D, k, k)
    inner = torch.linalg.solve(both, cov.expand_as(both))  # (cov^-1 + precision_a + precision_b)^-1
    left = z[:, None] @ inner  # (D, D, N, k)
    of_a, of_b = 0.5 * (left * z[:, None]).sum(-1) + log[:, None], 0.5 * ((z @ inner) * z).sum(-1) + log
    exponent = left @ z.mT + of_a[..., None] + of_b[..., None, :] - 0.5 * torch.linalg.det(both).log()[..., None, None]
    products = exponent.exp()
    second = torch.einsum("an,abnm,bm->ab", weights, products, weights)
    slope = (solved @ q[..., None])[..., 0].mT
    return Moments(first, second - first[:, None] * first, slope), products.diagonal().permute(2, 0, 1)


def sines(mean: Tensor, cov: Tensor, which: Tensor) -> Moments:
    """Moments of w with the coordinates `which` (k,) bool replaced by their sines, in closed form."""
    spread = cov.diagonal()
    shrunk = (-spread / 2).exp()
    first = torch.where(which, shrunk * mean.sin(), mean)
    slope = torch.where(which, shrunk * mean.cos(), 1)
    total, less, more = -(spread[:, None] + spread) / 2, mean[:, None] - mean, mean[:, None] + mean
    second = ((total + cov).exp() * less.cos() - (total - cov).exp() * more.cos()) / 2
    pairs = which[:, None] & which
    return Moments(first, torch.where(pairs, second - first[:, None] * first, cov * slope[:, None] * slope), torch.diag(slope))


def saturated(mean: Tensor, cov: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """E[exp(-(w - target)' W (w - target) / 2)], 0-d, of W = diag(weights) (k,)."""
    away, eye = mean - target, torch.eye(len(mean)).to(mean)
    wide = eye + cov * weights  # I + cov W
    found: Tensor = (-0.5 * (away * weights) @ torch.linalg.solve(wide, away)).exp() * torch.linalg.det(wide).rsqrt()
    return found
