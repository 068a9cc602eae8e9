"""Normalisations of the hidden units of ensembles. E ensemble members · B batch · h hidden units"""

from typing import Literal

import torch
from torch import Tensor, nn


class NoNorm(nn.Module):
    """The identity, for networks without normalisation."""

    of_batch = False

    def __init__(self, members: int, width: int, shifted: bool = True) -> None:
        super().__init__()

    def forward(self, h: Tensor, members: int, training: bool = False) -> Tensor:
        return h


class EnsembleLayerNorm(nn.Module):
    """E layer norms (Ba, Kiros and Hinton, 2016, eq. 4), each with its own gain and bias, which begin at 1 and 0.

    Args:
        members: E.
        width: h.
    """

    of_batch = False

    def __init__(self, members: int, width: int, shifted: bool = True) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, h: Tensor, members: int, training: bool = False) -> Tensor:
        """h (members, B, h) -> the same shape, each row with mean 0 and variance 1 before gain and bias."""
        return torch.addcmul(self.bias[:members], nn.functional.layer_norm(h, h.shape[-1:]), self.gain[:members])


class EnsembleBatchNorm(nn.Module):
    """E batch normalisations (Ioffe and Szegedy, 2015, algorithms 1 and 2), each with statistics, gain and bias of its own.

    A pass with `training` normalises by the batch, and moves the running statistics, in place; one without normalises by
    these. Which of both it is is an argument, so that one graph may hold both.

    Args:
        members: E.
        width: h.
        shifted: whether there is a bias. One that is followed by a linear layer and another batch norm would be cancelled: its
            gradient is rounding, which Adam would make into steps of full size.

    Attributes:
        of_batch: whether rows of a batch depend on each other: then layers before it have no bias, which it would cancel, and
            inputs are normalised, too.
    """

    of_batch = True
    momentum, epsilon = 0.01, 1e-3  # weight of the newest batch; added to variances (Bhatt et al., 2024: CrossQ)

    mean: Tensor
    variance: Tensor
    bias: nn.Parameter | None

    def __init__(self, members: int, width: int, shifted: bool = True) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(members, 1, width))
        bias = torch.zeros(members, 1, width)
        self.register_parameter("bias", nn.Parameter(bias) if shifted else None)
        self.register_buffer("mean", torch.zeros(members, 1, width))
        self.register_buffer("variance", torch.ones(members, 1, width))

    def forward(self, h: Tensor, members: int, training: bool = False) -> Tensor:
        """h (members, B, h) -> the same shape."""
        if training:
            variance, mean = torch.var_mean(h, 1, correction=0, keepdim=True)
            h = self.whitened(h, mean, variance)
            self.mean[:members].lerp_(mean.detach(), self.momentum)
            self.variance[:members].lerp_(variance.detach(), self.momentum)
        else:
            h = (h - self.mean[:members]) * (self.variance[:members] + self.epsilon).rsqrt()
        scaled = h * self.gain[:members]
        return scaled if self.bias is None else scaled + self.bias[:members]

    def whitened(self, h: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """h (members, B, h), by the statistics of the batch, (members, 1, h) each."""
        return (h - mean) * (variance + self.epsilon).rsqrt()


class EnsembleBatchRenorm(EnsembleBatchNorm):
    """Batch renormalisation (Ioffe, 2017, algorithm 1): training passes are corrected towards the running statistics.

    As in CrossQ (Bhatt et al., 2024), the corrections are full from the `warm_up`th training pass on, and none before.
    """

    warm_up = 100_000
    largest_ratio, largest_shift = 3.0, 5.0

    passes: Tensor

    def __init__(self, members: int, width: int, shifted: bool = True) -> None:
        super().__init__(members, width, shifted)
        self.register_buffer("passes", torch.zeros(()))

    def whitened(self, h: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        running, std = ((of + self.epsilon).sqrt() for of in (self.variance[: len(h)], variance))
        warm = self.passes >= self.warm_up
        ratio = (std / running).detach().clamp(1 / self.largest_ratio, self.largest_ratio)
        shift = ((mean - self.mean[: len(h)]) / running).detach().clamp(-self.largest_shift, self.largest_shift)
        self.passes += 1
        return (h - mean) / std * torch.where(warm, ratio, 1.0) + torch.where(warm, shift, 0.0)


Norm = type[NoNorm] | type[EnsembleLayerNorm] | type[EnsembleBatchNorm]
NORMS: dict[str, Norm] = {
    "none": NoNorm, "layer": EnsembleLayerNorm, "batch": EnsembleBatchNorm, "renorm": EnsembleBatchRenorm,
}  # fmt: skip
Normed = Literal["none", "layer", "batch", "renorm"]


def copy_statistics(target: nn.Module, source: nn.Module) -> None:
    """Give the batch norms of `target` the running statistics of those of `source`, of the same shape."""
    for ours, theirs in zip(target.modules(), source.modules(), strict=True):
        if isinstance(ours, EnsembleBatchNorm) and isinstance(theirs, EnsembleBatchNorm):
            ours.mean.copy_(theirs.mean)
            ours.variance.copy_(theirs.variance)
