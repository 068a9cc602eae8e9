"""Amortized inference on held-out images: shared parts of the claims of vae, savae and ivae.

x image (B, pixels) · lam = (mean | log_std) of q(z) (B, 2 m) · f = -ELBO (B,) in nats · S draws of z

Every gap is against the best lam that Adam finds for each image, from the prior and from an encoder, under 64 draws common to
all images; it and the encoder are scored under other draws, the same for both. Settings are chosen on images set aside, an
eighth of those for training, on which nothing is trained; images held out are for the claims alone.
"""

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlamort.agents.amortize import Amortize
from rlamort.envs.images import load
from rlamort.envs.vae import VAE, Averaged, Bernoulli
from rlamort.model import Model
from rlamort.objective import Oracle
from rlamort.run.learner import Learner, learner_class

LATENT, DECODER, WARP = 10, (400,), 0.05
UPDATES = 12_000  # of decoder and encoder together, and again of an encoder on the frozen decoder
WIDTH = 100  # of savae's and ivae's encoders, and of the one with which the decoder is trained
ASIDE = 8  # of so many images for training, one is set aside
HELD_OUT, SCORED, BEST_STEPS = 256, 1_000, 100  # images, draws, and Adam's steps that find the best lam
SEED = 1_000_000
ORACLE_DRAWS = 16  # draws of a gradient that a trained model queries
SHARED = {"hidden": (WIDTH,), "batch_size": 64}  # of all that is refined, and of the encoders beside it


def source() -> tuple[str, str]:
    """The images and their name: those of RLAMORT_IMAGES, or scikit-learn's digits."""
    path = os.environ.get("RLAMORT_IMAGES")
    return (path, Path(path).stem) if path else ("digits", "scikit-learn's digits")


def problem(draws: int = 1) -> VAE:
    """A VAE on these images, without the validation images; its decoder is untrained."""
    torch.manual_seed(0)
    vae = VAE(data=source()[0], latent=LATENT, hidden=DECODER, warp=WARP, draws=draws)
    vae.train_images = vae.train_images[len(vae.train_images) // ASIDE :]
    return vae


def aside() -> Tensor:
    """Validation images (N, pixels), with fixed binarisation."""
    images = load(source()[0]).train
    return Bernoulli().pixels(images[: len(images) // ASIDE].flatten(1), torch.Generator().manual_seed(0))


def learner(row: str, vae: VAE, updates: int, **fields: Any) -> tuple[Learner, Amortize]:
    """A learner of a method on these images for that many updates, and its agent."""
    trainer = learner_class(row)(vae, decay_updates=updates, seed=0, **fields)
    assert isinstance(trainer.agent, Amortize)
    return trainer, trainer.agent


def learned(row: str, vae: VAE, updates: int, **fields: Any) -> Model:
    """The model of a method, trained on these images."""
    trainer, agent = learner(row, vae, updates, **fields)
    trainer.learn(updates)
    return agent.model


@functools.cache
def decoder() -> tuple[VAE, Model]:
    """A trained and frozen decoder, and the encoder that was trained with it."""
    vae = problem()
    model = learned("vae", vae, UPDATES, hidden=(WIDTH,))
    return vae.freeze(), model


@functools.cache
def encoder(width: int) -> Model:
    """An encoder of this width, trained on the frozen decoder."""
    return learned("vae", decoder()[0], UPDATES, hidden=(width,))


def score(vae: VAE, lam: Tensor, x: Tensor, samples: int = SCORED) -> float:
    """The mean ELBO, with the same draws for every lam."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return vae.elbo(lam, x, samples).mean().item()


class Tuning(NamedTuple):
    """Settings of Adam: step size rate / (1 + t / pace) at step t, and draws per gradient."""

    rate: float
    pace: float
    draws: int

    def __str__(self) -> str:
        return f"rate {self.rate:g}, pace {self.pace:g}, {self.draws} draws"


def adam(vae: VAE, x: Tensor, tuning: Tuning, start: Tensor | None = None) -> Iterator[Tensor]:
    """lam (B, 2 m) after every step of Adam per image, from the prior by default."""
    f = Averaged(vae.f.f, tuning.draws)
    lam = x.new_zeros(len(x), 2 * vae.latent) if start is None else start.clone()
    lam.requires_grad_()
    optimiser = torch.optim.Adam([lam], lr=tuning.rate, fused=True)
    for t in itertools.count():
        optimiser.param_groups[0]["lr"] = tuning.rate / (1 + t / tuning.pace)
        with torch.enable_grad():
            (lam.grad,) = torch.autograd.grad(f(lam, x).sum(), lam)
        optimiser.step()
        yield lam.detach()


class MeanOracle(Model):
    """A model whose oracle is the mean over ORACLE_DRAWS draws.

    Args:
        model: semi-amortized, or full.
        vae: the problem that it queries.
    """

    def __init__(self, model: Model, vae: VAE) -> None:
        super().__init__()
        self.model, self.f = model, Averaged(vae.f.f, ORACLE_DRAWS)

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.model.iterates(x, self.f.oracle(x))
