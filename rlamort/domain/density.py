"""P(Y), densities over solutions, whose parameters a model predicts.

y solution (B, n) · lam parameters (B, 2 n) · noise (B, n) · logq log-density (B,)
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlamort.domain.base import Domain, at_least_one, number
from rlamort.errors import UserError


class Density:
    """P(Y): distributions over Y with parameters lam, sampled by reparameterisation.

    Attributes:
        dim: n.
        parameters: the domain of lam, in which a model over densities predicts and iterates.
    """

    dim: int
    parameters: Domain

    def noise(self, lam: Tensor) -> Tensor:
        """lam (B, parameters.dim) -> standard noise (B, n) for one draw per item; from torch's generator."""
        raise NotImplementedError

    def sample(self, lam: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """lam (B, parameters.dim) -> one draw y (B, n), differentiable in lam, and log q(y; lam) (B,) in nats.

        Args:
            lam: parameters.
            noise: (B, n), as `noise` returns it; None draws it.
        """
        raise NotImplementedError

    def draw(self, lam: Tensor, noise: Tensor | None = None) -> Tensor:
        """The y (B, n) of `sample`, without its log-density."""
        return self.sample(lam, noise)[0]

    def inferred(self, lam: Tensor, y: Tensor) -> Tensor:
        """lam, y (B, n) -> the noise (B, n) of which `draw` makes y; on a boundary, which none reaches, of a point near it."""
        raise NotImplementedError

    def median(self, lam: Tensor) -> Tensor:
        """lam -> y (B, n): the coordinate-wise median, the action of a deterministic agent."""
        raise NotImplementedError


class Point(Density):
    """All mass at one point y of Y, which is lam itself: what a deterministic policy predicts. It has no log-density.

    Args:
        domain: Y.
    """

    def __init__(self, domain: Domain) -> None:
        self.dim, self.parameters = domain.dim, domain

    def draw(self, lam: Tensor, noise: Tensor | None = None) -> Tensor:
        return lam

    def median(self, lam: Tensor) -> Tensor:
        return lam


class MeanLogStd(Domain):
    """Parameters (mean | log_std) of a Gaussian, (B, 2 n): R^n and a box, to which `project` clamps log_std.

    Args:
        dim: n, coordinates of y.
        low: lower bound of log_std.
        high: upper bound of log_std.
    """

    def __init__(self, dim: int, low: float, high: float) -> None:
        super().__init__()
        self.dim = self.inputs = 2 * dim
        self.bounds = low, high

    def project(self, v: Tensor) -> Tensor:
        mean, log_std = v.chunk(2, dim=-1)
        return torch.cat([mean, log_std.clamp(*self.bounds)], dim=-1)

    def nearest(self, y: Tensor) -> Tensor:
        return self.project(y)


class Gaussian(Density):
    """y ~ N(mean, exp(log_std)^2) per coordinate, on R^dim; lam = (mean | log_std).

    Args:
        dim: coordinates of y.
        log_std_low: lower bound of log_std.
        log_std_high: upper bound of log_std.
    """

    def __init__(self, dim: int, log_std_low: float = -20.0, log_std_high: float = 2.0) -> None:
        self.dim = at_least_one("Gaussian.dim", dim)
        self.parameters = MeanLogStd(self.dim, *_spread_bounds("Gaussian", log_std_low, log_std_high))

    def noise(self, lam: Tensor) -> Tensor:
        return torch.randn_like(lam.chunk(2, dim=-1)[0])

    def sample(self, lam: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_std = lam.chunk(2, dim=-1)
        noise = self.noise(lam) if noise is None else noise
        logq = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return mean + log_std.exp() * noise, logq.sum(-1)

    def draw(self, lam: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_std = lam.chunk(2, dim=-1)
        return mean + log_std.exp() * (self.noise(lam) if noise is None else noise)

    def inferred(self, lam: Tensor, y: Tensor) -> Tensor:
        mean, log_std = lam.chunk(2, dim=-1)
        return (y - mean) * (-log_std).exp()

    def median(self, lam: Tensor) -> Tensor:
        return lam.chunk(2, dim=-1)[0]

    def kl(self, lam: Tensor) -> Tensor:
        """lam -> KL(q(.; lam) | N(0, I)) (B,), in nats (Kingma and Welling, 2014, appendix B)."""
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
        self.dim = at_least_one("SquashedGaussian.dim", dim)
        self.parameters = MeanLogStd(self.dim, *_spread_bounds("SquashedGaussian", log_std_low, log_std_high))

    def noise(self, lam: Tensor) -> Tensor:
        return torch.randn_like(lam.chunk(2, dim=-1)[0])

    def sample(self, lam: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_std = lam.chunk(2, dim=-1)
        noise = self.noise(lam) if noise is None else noise
        v = mean + log_std.exp() * noise
        return v.tanh(), self._log_density(v, noise, log_std)

    def log_density(self, lam: Tensor, y: Tensor) -> Tensor:
        """lam (B, 2 n), y (B, n) inside (-1, 1)^n -> log q(y; lam) (B,) in nats; at the bounds it is not finite."""
        mean, log_std = lam.chunk(2, dim=-1)
        v = y.atanh()
        return self._log_density(v, (v - mean) * (-log_std).exp(), log_std)

    @staticmethod
    def _log_density(v: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
        """Of y = tanh(v) with v = mean + exp(log_std) noise, all (B, n) -> (B,)."""
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log |d tanh(v) / dv| = log(1 - tanh(v)^2), in the form that neither overflows nor cancels for large |v|
        log_slope = 2 * (math.log(2) - v - nn.functional.softplus(-2 * v))
        return (log_normal - log_slope).sum(-1)

    def draw(self, lam: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_std = lam.chunk(2, dim=-1)
        return (mean + log_std.exp() * (self.noise(lam) if noise is None else noise)).tanh()

    def inferred(self, lam: Tensor, y: Tensor) -> Tensor:
        mean, log_std = lam.chunk(2, dim=-1)
        return (y.clamp(-1 + 1e-6, 1 - 1e-6).atanh() - mean) * (-log_std).exp()

    def median(self, lam: Tensor) -> Tensor:
        return lam.chunk(2, dim=-1)[0].tanh()


def _spread_bounds(name: str, low: Any, high: Any) -> tuple[float, float]:
    bounds = number(f"{name}.log_std_low", low), number(f"{name}.log_std_high", high)
    if not bounds[0] < bounds[1]:
        raise UserError(f"{name}.log_std_low: {low} is given; one below log_std_high = {high} is needed")
    return bounds
