"""Model predictive path integral control."""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.config import Count, Positive
from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update
from rlamort.update.best import comparable
from rlamort.update.draws import Bounds, Clipped, Noise, White


class Mppi(Update):
    """The mean of samples around y, weighted by exp(-f / temperature) (Williams et al., 2017), without a cost of control.

    The Gaussian keeps its standard deviation. As the temperature goes to 0, the mean becomes the best sample. Samples without
    a finite cost have no weight; an item that has no others keeps its y. Noise is shared as in `Cem`.

    Args:
        domain: Y, where samples are.
        samples: S.
        sigma: standard deviation.
        temperature: in units of f.
        noise: White, or Coloured for plans.
        bounds: Clipped or Truncated; by default Clipped.
    """

    def __init__(
        self,
        domain: Domain,
        samples: Count = 64,
        sigma: Positive = 0.5,
        temperature: Positive = 1.0,
        noise: Noise | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"update.temperature: {temperature} given; above 0 is needed; its limit at 0 is the best sample")
        self.samples, self.sigma, self.temperature = samples, sigma, temperature
        self.noise, self.bounds = noise or White(), bounds or Clipped(domain)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        ys = self.bounds(y, torch.full_like(y, self.sigma), self.noise(self.samples, y), x)  # (S, B, n)
        costs = comparable(oracle.values(ys))  # (S, B)
        least = costs.amin(0)
        sound = least.isfinite()
        weights = (-(costs - torch.where(sound, least, 0)) / self.temperature).softmax(0)
        mean = (torch.where(sound, weights, 0)[..., None] * ys).sum(0)
        return torch.where(sound[:, None], mean, y), h
