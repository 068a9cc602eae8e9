"""The cross-entropy method."""

import math

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.config import Count, Fraction, Positive
from rlamort.domain import CappedSimplex, Domain, nearest_each
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update


class HardTop(nn.Module):
    """Uniform weights on the k elites. Losses do not differentiate through the selection."""

    def forward(self, costs: Tensor, k: int) -> Tensor:
        """costs (B, S) -> weights (B, S), of sum k."""
        return torch.zeros_like(costs).scatter(-1, costs.topk(k, largest=False).indices, 1.0)


class SoftTop(nn.Module):
    """Soft weights on k elites: -costs / temperature projected onto the capped simplex (Amos and Yarats, 2020).

    Costs are standardised per item first, so that one temperature applies to all.

    Args:
        temperature: of the selection; in the limit of 0 it is HardTop.
    """

    def __init__(self, temperature: Positive = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"selection.temperature: {temperature} given; above 0 is needed; HardTop() is its limit at 0")
        self.temperature = temperature

    def forward(self, costs: Tensor, k: int) -> Tensor:
        """costs (B, S) -> weights (B, S) in [0, 1], of sum k."""
        centred = costs - costs.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return CappedSimplex(costs.shape[-1], k).project(-centred / scale / self.temperature)


class Cem(Update):
    """The cross-entropy method: a Gaussian around y, refitted to its elite samples (Rubinstein and Kroese, 2004).

    With a SoftTop selection it is DCEM, which is differentiable (Amos and Yarats, 2020). Noise comes from torch's
    generator and is shared by all items, so that no item depends on the batch size. A non-finite cost is replaced by the item's
    largest finite one.

    Args:
        domain: Y, onto which samples are projected.
        samples: S.
        elites: number of elite samples.
        sigma: initial standard deviation.
        smoothing: weight of the previous mean and standard deviation.
        floor: added in quadrature to the standard deviation, so that it stays positive.
        selection: HardTop or SoftTop.
    """

    def __init__(
        self,
        domain: Domain,
        samples: Count = 64,
        elites: Count = 8,
        sigma: Positive = 1.0,
        smoothing: Fraction = 0.0,
        floor: Positive = 1e-6,
        selection: HardTop | SoftTop | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= elites < samples:
            raise UserError(f"update.elites: {elites} given; at least 1 and fewer than the {samples} samples are needed")
        self.domain, self.samples, self.elites, self.sigma = domain, samples, elites, sigma
        self.smoothing, self.floor, self.selection = smoothing, floor, selection or HardTop()

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return (torch.full_like(y, self.sigma),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (std,) = h
        noise = torch.randn(self.samples, 1, y.shape[-1], dtype=y.dtype, device=y.device)
        ys = nearest_each(self.domain, x, y + std * noise)  # (S, B, n)
        weights = self.selection(_finite(oracle.values(ys).mT), self.elites).mT[..., None] / self.elites  # (S, B, 1)
        mean = (weights * ys).sum(0)
        spread = ((weights * (ys - mean).square()).sum(0) + self.floor**2).sqrt()
        return torch.lerp(mean, y, self.smoothing), (torch.lerp(spread, std, self.smoothing),)


def _finite(costs: Tensor) -> Tensor:
    """costs (B, S), with non-finite ones replaced by the item's largest finite one."""
    finite = costs.isfinite()
    worst = torch.where(finite, costs, -math.inf).amax(-1, keepdim=True)
    return torch.where(finite, costs, torch.where(worst.isfinite(), worst, 0))
