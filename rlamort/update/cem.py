"""The cross-entropy method."""

import math

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.config import Count, Fraction, Positive
from rlamort.domain import CappedSimplex, Domain
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update
from rlamort.update.best import comparable
from rlamort.update.draws import Bounds, Clipped, Noise, White


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
        domain: Y, where samples are.
        samples: S.
        elites: number of elite samples.
        sigma: initial standard deviation.
        smoothing: weight of the previous mean and spread.
        power: the spread that is smoothed is the standard deviation to this power: 1 itself, 2 the variance.
        floor: added in quadrature to the standard deviation, so that it stays positive.
        selection: HardTop or SoftTop.
        noise: White, or Coloured for plans.
        bounds: Clipped or Truncated; by default Clipped.
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
        noise: Noise | None = None,
        bounds: Bounds | None = None,
        power: Positive = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= elites < samples:
            raise UserError(f"update.elites: {elites} given; at least 1 and fewer than the {samples} samples are needed")
        self.samples, self.elites, self.sigma = samples, elites, sigma
        self.smoothing, self.floor, self.power, self.selection = smoothing, floor, power, selection or HardTop()
        self.noise, self.bounds = noise or White(), bounds or Clipped(domain)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return (torch.full_like(y, self.sigma),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (std,) = h
        ys = self.draw(y, std, x)  # (S, B, n)
        weights = self.selection(_finite(oracle.values(ys).mT), self.elites).mT[..., None] / self.elites  # (S, B, 1)
        y, std = self.refit(ys, weights, y, std)
        return y, (std,)

    def draw(self, mean: Tensor, std: Tensor, x: Tensor, samples: int | None = None) -> Tensor:
        """mean, std (B, n) -> samples in Y (S, B, n); of another number if `samples` says so."""
        drawn: Tensor = self.bounds(mean, std, self.noise(samples or self.samples, mean), x)
        return drawn

    def refit(self, ys: Tensor, weights: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Samples (S, B, n), weights (S, B, 1) of sum 1, and mean and std (B, n) before -> both after."""
        found = (weights * ys).sum(0)
        spread = ((weights * (ys - found).square()).sum(0) + self.floor**2).sqrt()
        smooth = torch.lerp(spread**self.power, std**self.power, self.smoothing) ** (1 / self.power)
        return torch.lerp(found, mean, self.smoothing), smooth


class Icem(Update):
    """The cross-entropy method whose iterate is the best point that it has met (iCEM; Pinneri et al., 2020).

    The Gaussian is around a mean of its own. Elites compete with the samples of later iterations, and so does the mean. The
    start is one of them, so no iterate costs more than the one before. Costs of what is kept are not asked again: f must be
    deterministic. What has no finite cost is never kept.

    Args:
        cem: how samples are drawn, and how mean and standard deviation are fitted to the elites.
        keep: elites that compete with later samples; the first is the iterate.
        shrink: what the number of samples is divided by from one iteration to the next, down to twice the elites.
        remember: whether a next problem, such as the plan one step later, goes on from all that is kept.

    Raises:
        UserError: more are kept than there are elites, or none; it selects softly; or it is to grow.
    """

    def __init__(self, cem: Cem, keep: Count = 2, shrink: Positive = 1.0, remember: bool = False) -> None:
        super().__init__()
        if not 1 <= keep <= cem.elites:
            raise UserError(f"update.keep: {keep} given; at least 1 and at most the {cem.elites} elites are needed")
        if not isinstance(cem.selection, HardTop):
            raise UserError("update.cem: Icem keeps elites as they are; a selection by HardTop is needed")
        if shrink < 1:
            raise UserError(f"update.shrink: {shrink} given; at least 1 is needed")
        self.cem, self.keep, self.shrink, self.keeps = cem, keep, shrink, keep - 1 if remember else 0

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return self.resume(y, y[:, None][:, :0], x, oracle)

    def resume(self, y: Tensor, kept: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """The mean, the standard deviation, what is kept (B, keep, n), best first, its costs (B, keep), and (B, steps, 0)."""
        points = torch.cat([y[None], kept.transpose(0, 1)])  # (k, B, n)
        costs = comparable(oracle.values(points))  # (k, B)
        missing = self.keep - len(points)
        costs = torch.cat([costs, costs.new_full((missing, len(y)), math.inf)]).mT  # (B, keep)
        points = torch.cat([points, y.expand(missing, *y.shape)]).transpose(0, 1)
        known, order = costs.sort(dim=-1, stable=True)
        best = points.gather(1, order[..., None].expand_as(points))
        return (y, *self.cem.start(y, x, oracle), best, known, y.new_empty(len(y), 0, 0))

    def kept(self, y: Tensor, h: Carry) -> Tensor:
        return h[2][:, 1 : 1 + self.keeps]  # the first is y

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        mean, std, kept, known, done = h
        samples = max(math.ceil(self.cem.samples / self.shrink ** done.shape[1]), min(2 * self.cem.elites, self.cem.samples))
        fresh = torch.cat([self.cem.draw(mean, std, x, samples), mean[None]])  # (S + 1, B, n)
        ys = torch.cat([kept.transpose(0, 1), fresh])
        costs, order = torch.cat([known, comparable(oracle.values(fresh)).mT], -1).sort(dim=-1, stable=True)
        best = order[:, : self.cem.elites].mT[..., None].expand(-1, -1, ys.shape[-1])  # (E, B, n)
        elites, costs = ys.gather(0, best), costs[:, : self.cem.elites]
        sound = costs.isfinite().mT[..., None]  # (E, B, 1)
        refitted = self.cem.refit(elites, sound / sound.sum(0).clamp(min=1), mean, std)
        mean, std = (torch.where(sound.any(0), new, old) for new, old in zip(refitted, (mean, std), strict=True))
        done = y.new_empty(len(y), done.shape[1] + 1, 0)  # steps are counted by a shape, since shapes follow from them
        return elites[0], (mean, std, elites[: self.keep].transpose(0, 1), costs[:, : self.keep], done)

    def value(self, y: Tensor, h: Carry, oracle: Oracle) -> Tensor:
        return h[3][:, 0]


def _finite(costs: Tensor) -> Tensor:
    """costs (B, S), with non-finite ones replaced by the item's largest finite one."""
    finite = costs.isfinite()
    worst = torch.where(finite, costs, -math.inf).amax(-1, keepdim=True)
    return torch.where(finite, costs, torch.where(worst.isfinite(), worst, 0))
