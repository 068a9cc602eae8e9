"""Variational inference as amortization (tutorial, section 6.1; Kingma and Welling, 2014; Cremer, Li and Duvenaud, 2018).

x image (B, pixels) in [0, 1] · z latent (B, m) · lam = (mean | log_std) of q(z; lam), (B, 2 m) · f = -ELBO (B,) in nats
S draws of z · N images · log p(x) is that of pixels, which for binary ones is a probability
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from rlamort.config import Count, NonNegative, Positive, Widths
from rlamort.domain import Gaussian
from rlamort.envs.images import load
from rlamort.errors import UserError, nearest
from rlamort.model import Model
from rlamort.nets import mlp
from rlamort.objective import Metrics, Objective, Oracle, Soft, Temperature
from rlamort.problem import Problem
from rlamort.solve.classical import iterates
from rlamort.update import Adam, InChart

ROWS = 2_048  # latents decoded at once: few enough for a processor's cache
T = TypeVar("T")


class Bernoulli(nn.Module):
    """log p(x | z) of binary pixels; the decoder outputs logits."""

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        """(B, pixels) each -> (B,), summed over pixels."""
        return (x * logits - nn.functional.softplus(logits)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """E[x | z], (B, pixels)."""
        return logits.sigmoid()

    def pixels(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Intensities in [0, 1] as probabilities -> binary pixels, sampled at every call (Burda et al., 2016, 5.1)."""
        return torch.bernoulli(images, generator=generator)


class Normal(nn.Module):
    """log p(x | z) of intensities with one learned noise level for all pixels; the decoder outputs means.

    Args:
        std: initial standard deviation.
    """

    def __init__(self, std: Positive = 0.2) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(math.log(std)))

    def forward(self, mean: Tensor, x: Tensor) -> Tensor:
        """(B, pixels) each -> (B,), summed over pixels; a log-density, which may be positive."""
        scaled = (x - mean) * (-self.log_std).exp()
        return (-0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def mean(self, mean: Tensor) -> Tensor:
        """E[x | z], (B, pixels)."""
        return mean

    def pixels(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniformly dequantised intensities of 256 levels, without which the likelihood is unbounded."""
        spread = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
        return (images * 255 + spread) / 256


class Convolutional(nn.Module):
    """A decoder (B, m) -> (B, h * w): a linear layer, and two transposed convolutions that double each side.

    Args:
        latent: m.
        channels: of the two hidden maps.
        size: h and w, multiples of 4.
    """

    def __init__(self, latent: Count, channels: tuple[Count, Count], size: tuple[int, int]) -> None:
        super().__init__()
        if any(length % 4 for length in size):
            raise UserError(f"decoder=conv: images of {size[0]} x {size[1]} are given; multiples of 4 are needed")
        first, second = channels
        self.net = nn.Sequential(
            nn.Linear(latent, first * size[0] * size[1] // 16), nn.ReLU(),
            nn.Unflatten(1, (first, size[0] // 4, size[1] // 4)),
            nn.ConvTranspose2d(first, second, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(second, 1, 4, 2, 1), nn.Flatten(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.net(z)
        return out


class Relative(Gaussian):
    """q, with the closed form KL(q | N(0, I)) in place of each draw's log q(z) / p(z).

    `Soft` over it has the same mean as over `Gaussian` with -log p(z) in the cost, and less variance
    (Kingma and Welling, 2014, eq. 10).
    """

    def sample(self, lam: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.draw(lam, noise), self.kl(lam)


class FixedNoise(Relative):
    """`Relative` with fixed noise: item i has noise i mod S, so that f is deterministic (common random numbers).

    Args:
        noise: (S, m).
    """

    def __init__(self, noise: Tensor) -> None:
        super().__init__(noise.shape[1])
        self.fixed = noise

    def noise(self, lam: Tensor) -> Tensor:
        return self.fixed.repeat(len(lam) // len(self.fixed), 1)


class Reconstruction(Objective):
    """f(z; x) = -log p(x | z).

    Args:
        problem: whose decoder and likelihood.
    """

    def __init__(self, problem: "VAE") -> None:
        self.problem = problem

    def report(self, z: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return -self.problem.likelihood(self.problem.decoder(z), x), {}


class Joint(Reconstruction):
    """f(z; x) = -log p(x, z), with the prior N(0, I): over `Gaussian`, Soft is the single-sample -ELBO."""

    def report(self, z: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        prior = 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return super().report(z, x)[0] + prior, {}


class Averaged(Objective):
    """The mean of a stochastic f over several draws.

    Args:
        f: a stochastic objective, with one draw per item.
        draws: S.
    """

    def __init__(self, f: Objective, draws: Count) -> None:
        self.f, self.draws = f, draws

    def each(self, lam: Tensor, x: Tensor) -> Tensor:
        """The cost of each draw, (B, S)."""
        repeated = self.f(lam.repeat_interleave(self.draws, 0), x.repeat_interleave(self.draws, 0))
        return repeated.view(len(lam), self.draws)

    def report(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return self.each(lam, x).mean(-1), {}


class Gaps(NamedTuple):
    """Inference gaps of each image, in nats (Cremer, Li and Duvenaud, 2018, eqs. 4-6)."""

    elbo: Tensor  # (B,) of the encoder
    best: Tensor  # (B,) of the best lam found
    log_likelihood: Tensor  # (B,) the importance-weighted bound of log p(x) with the best lam
    lam: Tensor  # (B, 2 m) the best

    @property
    def amortization(self) -> Tensor:
        """The amortization gap (B,), between the best member of the family and the encoder."""
        return self.best - self.elbo

    @property
    def approximation(self) -> Tensor:
        """The approximation gap (B,), between log p(x), up to the tightness of its bound, and the family's best."""
        return self.log_likelihood - self.best


class VAE(Problem[Tensor]):
    """f(lam; x) = -ELBO = E_q[-log p(x | z)] + KL(q(z; lam) | N(0, I)); the decoder is learned together with the encoder.

    Args:
        data: digits, mnist, an .npz file or a folder of IDX files (see `rlamort.envs.images.load`).
        latent: m.
        hidden: widths of the decoder's hidden layers, or the channels of its two maps.
        decoder: mlp, conv, or a network (B, m) -> (B, pixels).
        likelihood: bernoulli, with dynamic binarisation of contexts; gaussian; or one of the user's, as `Normal`.
        warp: size of random affine augmentations of training images; 1 is half the image.
        draws: of z per evaluation of the cost.

    Raises:
        UserError: the data cannot be loaded, or a name is unknown.

    Attributes:
        test_images: held-out images (N, pixels), with fixed binarisation.
    """

    train_images: Tensor
    test_images: Tensor

    def __init__(
        self,
        data: str = "digits",
        latent: Count = 10,
        hidden: Widths = (200,),
        decoder: Literal["mlp", "conv"] | nn.Module = "mlp",
        likelihood: Literal["bernoulli", "gaussian"] | Bernoulli | Normal = "bernoulli",
        warp: NonNegative = 0.0,
        draws: Count = 1,
    ) -> None:
        super().__init__()
        images = load(data)
        self.size = (images.train.shape[1], images.train.shape[2])
        pixels = math.prod(self.size)
        if draws < 1 or warp < 0:
            raise UserError(f"VAE.draws={draws}, warp={warp}: at least 1 and at least 0 are needed")
        self.density = Relative(latent)
        self.domain = self.density.parameters
        decoders: dict[str, Callable[[], nn.Module]] = {
            "mlp": lambda: mlp(latent, hidden, pixels),
            "conv": lambda: Convolutional(latent, _two(hidden), self.size),
        }
        likelihoods: dict[str, type[Bernoulli | Normal]] = {"bernoulli": Bernoulli, "gaussian": Normal}
        self.decoder = _named("decoder", decoder, decoders)() if isinstance(decoder, str) else decoder
        self.likelihood = _named("likelihood", likelihood, likelihoods)() if isinstance(likelihood, str) else likelihood
        self.latent, self.warp = latent, warp
        # not persistent: a checkpoint holds what was learned, not what it was learned from
        self.register_buffer("train_images", images.train[:, None], persistent=False)
        fixed = self.likelihood.pixels(images.test.flatten(1), torch.Generator().manual_seed(0))
        self.register_buffer("test_images", fixed, persistent=False)
        self.alpha = Temperature(1.0).requires_grad_(False)
        self.f = Averaged(Soft(Reconstruction(self), self.density, self.alpha), draws)

    def contexts(self, count: int) -> Tensor:
        images = self.train_images
        chosen = images[torch.randint(len(images), (count,), device=images.device)]  # (count, 1, h, w)
        if self.warp > 0:
            chosen = warped(chosen, self.warp)
        return self.likelihood.pixels(chosen.flatten(1))

    def held_out(self, count: int) -> Tensor:
        """x (count, pixels) of held-out images, without repetition up to their number."""
        images = self.test_images
        order = torch.randperm(len(images), device=images.device)
        return images[order[torch.arange(count, device=images.device) % len(images)]]

    def cost(self, lam: Tensor, x: Tensor) -> Tensor:
        return self.f(lam, x)

    def network(self, hidden: Sequence[int], candidates: int) -> nn.Module:
        return mlp(self.test_images.shape[1], hidden, candidates * self.domain.inputs)  # pixels are on one scale already

    def freeze(self) -> Self:
        """Freeze decoder and likelihood, so that later training minimises a fixed f."""
        return self.requires_grad_(False)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z] (B, pixels) for z (B, m)."""
        return self.likelihood.mean(self.decoder(z))

    def bound(self, noise: Tensor) -> Averaged:
        """-ELBO with fixed noise (S, m), common to all images and calls."""
        return Averaged(Soft(Reconstruction(self), FixedNoise(noise), self.alpha), len(noise))

    @torch.no_grad()
    def elbo(self, lam: Tensor, x: Tensor, samples: Count = 64) -> Tensor:
        """lam (B, 2 m), x (B, pixels) -> the ELBO (B,) in nats; all images share the noise, from torch's generator."""
        noise = torch.randn(samples, self.latent, dtype=lam.dtype, device=lam.device)
        parts = torch.split(noise, max(1, ROWS // len(lam)))
        return -torch.stack([self.bound(part)(lam, x) * len(part) for part in parts]).sum(0) / samples

    @torch.no_grad()
    def iwae(self, lam: Tensor, x: Tensor, samples: Count = 500) -> Tensor:
        """The importance-weighted bound of log p(x) (B,) in nats; more samples raise it (Burda et al., 2016, eq. 8)."""
        f, most = Soft(Joint(self), Gaussian(self.latent), self.alpha), max(1, ROWS // len(lam))
        sizes = [min(most, samples - done) for done in range(0, samples, most)]
        log_weights = torch.cat([-Averaged(f, size).each(lam, x) for size in sizes], dim=-1)  # (B, samples)
        return log_weights.logsumexp(-1) - math.log(samples)

    @torch.no_grad()
    def optimum(self, x: Tensor, starts: Sequence[Tensor], samples: Count = 64, steps: Count = 100) -> Tensor:
        """lam* (B, 2 m): per image the best of Adam from every start, with noise common to all images.

        Args:
            x: (B, pixels).
            starts: (B, 2 m) each, such as the prior and an encoder's prediction; lam* is never worse than any of them.
            samples: S, draws of the common noise, which has its own seed.
            steps: of Adam, with a decreasing step size.
        """
        noise = torch.randn(samples, self.latent, generator=torch.Generator().manual_seed(0)).to(x)
        f, found = self.bound(noise), []
        for rows in torch.split(torch.arange(len(x), device=x.device), max(1, ROWS // samples)):
            candidates = [start[rows] for start in starts]
            for start in starts:
                path = iterates(Oracle(f, x[rows]), start[None, rows], Adam(0.1), InChart(self.domain))
                candidates.append(next(itertools.islice(path, steps - 1, None))[0])
            costs = torch.stack([f(lam, x[rows]) for lam in candidates]).nan_to_num(torch.inf)
            best = costs.argmin(0)
            found.append(torch.stack(candidates)[best, torch.arange(len(best), device=x.device)])
        return torch.cat(found)

    @torch.no_grad()
    def decompose(
        self, encoder: Model, x: Tensor, samples: Count = 1_000, steps: Count = 100, best: Tensor | None = None
    ) -> Gaps:
        """The amortization and the approximation gap of an encoder on images x (B, pixels).

        lam* is the best of two starts, prior and encoder, with 64 draws; it and the encoder are scored with other draws,
        common to both.

        Args:
            encoder: a full model, or one that needs no oracle.
            x: images.
            samples: draws for the bounds, also for the importance-weighted one.
            steps: of Adam, from each start.
            best: lam* (B, 2 m), if it is known.
        """
        lam = encoder(x)
        best = self.optimum(x, [torch.zeros_like(lam), lam], steps=steps) if best is None else best
        both = self.elbo(torch.cat([lam, best]), x.repeat(2, 1), samples)
        return Gaps(both[: len(x)], both[len(x) :], self.iwae(best, x, samples), best)


def _named(field: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise UserError(f"VAE.{field}={name}: there is no such {field}. {nearest(name, known)}")
    return known[name]


def _two(hidden: Sequence[int]) -> tuple[int, int]:
    if len(hidden) != 2:
        raise UserError(f"VAE.hidden={list(hidden)}: the channels of two maps are needed with decoder=conv")
    return hidden[0], hidden[1]


def warped(images: Tensor, size: float) -> Tensor:
    """Images (B, 1, h, w) under independent random affine maps: the identity plus uniform numbers in [-size, size]."""
    change = size * (2 * torch.rand(len(images), 2, 3, dtype=images.dtype, device=images.device) - 1)
    maps = torch.eye(2, 3, dtype=images.dtype, device=images.device) + change
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False).clamp(0, 1)
