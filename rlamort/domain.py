"""Y, where solutions live, and P(Y), densities over it.

y solution (B, n) · v unconstrained (B, inputs) · lam density parameters (B, inputs) · logq log-density (B,)
"""

import math

import torch
from torch import Tensor, nn


class Domain(nn.Module):
    """Y: `dim` coordinates, reached from `inputs` unconstrained numbers by a differentiable projection.

    Amos, Tutorial on amortized optimization, section 5.1.2.
    """

    dim: int
    inputs: int

    def project(self, v: Tensor) -> Tensor:
        """v (B, inputs) -> y (B, dim) in Y; for a density, lam (B, inputs) within its bounds."""
        raise NotImplementedError


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


class Box(Domain):
    """{y : low <= y <= high}, reached by tanh.

    Args:
        low: lower bounds, one per coordinate, finite.
        high: upper bounds, each above its lower bound.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, low: list[float], high: list[float]) -> None:
        super().__init__()
        bounds = torch.tensor([low, high], dtype=torch.float64)  # halved in float64, so that unit bounds stay exact
        self.dim = self.inputs = len(low)
        self.register_buffer("scale", ((bounds[1] - bounds[0]) / 2).float(), persistent=False)
        self.register_buffer("offset", ((bounds[1] + bounds[0]) / 2).float(), persistent=False)

    def project(self, v: Tensor) -> Tensor:
        return self.decode(v.tanh())

    def decode(self, u: Tensor) -> Tensor:
        """[-1, 1]^n -> Y, affine."""
        return self.offset + self.scale * u

    def encode(self, y: Tensor) -> Tensor:
        """Y -> [-1, 1]^n, affine."""
        return (y - self.offset) / self.scale

    def uniform(self, count: int) -> Tensor:
        """(count, dim): uniform over Y, from torch's generator."""
        return self.decode(torch.rand(count, self.dim, device=self.scale.device) * 2 - 1)


def unit_box(dim: int) -> Box:
    """[-1, 1]^dim: every action inside rlamort lives here; the units of an environment begin at its adapter."""
    return Box([-1.0] * dim, [1.0] * dim)


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
        self.dim, self.inputs = dim, 2 * dim
        self.bounds = (log_std_low, log_std_high)

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
