"""Samples around a mean, for solvers that ask for values alone: which noise, and what becomes of it at the bounds of Y.

S samples · B batch · n coordinates; of plans H steps of n / H coordinates each
"""

import math

import torch
from torch import Tensor, nn

from rlamort.config import Count, NonNegative
from rlamort.domain import Box, Domain, nearest_each
from rlamort.errors import UserError


class White(nn.Module):
    """Standard normals, of which none depends on another. All items share them, so that none depends on the batch."""

    def forward(self, samples: int, y: Tensor) -> Tensor:
        """y (B, n), whose dtype and device it takes -> (S, 1, n)."""
        return torch.randn(samples, 1, y.shape[-1], dtype=y.dtype, device=y.device)


class Coloured(nn.Module):
    """Standard normals with a power spectrum of 1 / frequency^exponent along a plan (Pinneri et al., 2020).

    White noise of H steps is filtered, the mean of the plan as its lowest frequency, 1 / H. So neighbouring actions are alike,
    the more so the larger the exponent, and a plan moves the system instead of shaking it. Each coordinate has unit variance;
    the noise is periodic in H.

    Args:
        horizon: H.
        exponent: beta; 0 is white.
    """

    filter: Tensor

    def __init__(self, horizon: Count, exponent: NonNegative) -> None:
        super().__init__()
        self.horizon = horizon
        at = torch.arange(horizon, dtype=torch.float64)
        frequency = torch.minimum(at, horizon - at).clamp(min=1) / horizon
        scale = frequency ** (-exponent / 2)
        scale = scale / scale.square().mean().sqrt()
        phase = 2 * math.pi / horizon * (at[:, None] - at)
        self.register_buffer("filter", (scale * (phase[..., None] * at).cos()).mean(-1), persistent=False)  # (H, H), circulant

    def forward(self, samples: int, y: Tensor) -> Tensor:
        """As `White`, of plans y (B, n)."""
        white = torch.randn(samples, self.horizon, y.shape[-1] // self.horizon, dtype=y.dtype, device=y.device)
        return (self.filter.to(y) @ white).flatten(1)[:, None]


class Clipped(nn.Module):
    """Normals projected onto Y, which puts what lies outside on its boundary.

    Args:
        domain: Y.
    """

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain = domain

    def forward(self, mean: Tensor, std: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        """mean, std (B, n), noise (S, 1, n), x (B, d) -> samples in Y (S, B, n)."""
        return nearest_each(self.domain, x, mean + std * noise)


class Truncated(nn.Module):
    """Normals conditioned on a box, by inverting their distribution function.

    Args:
        domain: Y, a box.

    Raises:
        UserError: it is none.
    """

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        if not isinstance(domain, Box):
            raise UserError(f"update.bounds=truncated: a box is needed, not {type(domain).__name__}; clipped fits any")
        self.domain = domain

    def forward(self, mean: Tensor, std: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        """As `Clipped`."""
        box = self.domain.at(x)
        assert isinstance(box, Box)
        low, high = box.low.to(mean), box.high.to(mean)
        below, above = (torch.special.ndtr((end - mean) / std) for end in (low, high))
        quantile = below + torch.special.ndtr(noise) * (above - below)
        return torch.clamp(mean + std * torch.special.ndtri(quantile), low, high)  # ndtri of 0 or 1 is infinite


Noise = White | Coloured
Bounds = Clipped | Truncated
