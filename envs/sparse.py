"""Sparse coding: the lasso on patches of natural images, and the recovery of known sparse codes.

x signal (B, M) · y code (B, N) · A dictionary (M, N) of columns of unit length · alpha weight of |y|_1
"""

import copy
import functools
import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.config import Count, Fraction, NonNegative, Positive
from rlamort.domain import Euclid
from rlamort.errors import UserError
from rlamort.objective import nothing
from rlamort.problem import Parts, Problem
from rlamort.update.sparse import Fista, GradientRestart, Ista

HELD_OUT = 0.2  # fraction of each image, on its right, that is held out
FLOOR = 3.16 / 255  # least contrast by which patches are divided, so that noise in flat regions is not amplified
DIM = 0.1  # likewise, after whitening
SAMPLE = 10_000  # patches for dictionary learning
PRECISION = 1e-7  # duality gap, relative to f, of a solution
LIMIT, CHECK_EVERY = 5_000, 25  # iterations


class Lasso(Problem[Tensor]):
    """f(y; x) = |x - A y|^2 / 2 + alpha |y|_1 over patches x of natural images, of mean 0, variance about 1, and whitened.

    Args:
        alpha: weight of |y|_1.
        side: of a patch; M = side^2.
        atoms: N.
        whitening: regularisation of the whitening, relative to a variance of 1; 0 for none.
        dictionary: A (side^2, N), whose columns are scaled to unit length; by default it is learned from patches (Mairal et
            al., 2009), deterministically.

    Raises:
        UserError: one of them is out of range, or a column is zero.
    """

    convex = True

    def __init__(
        self,
        alpha: Positive = 0.4,
        side: Count = 10,
        atoms: Count = 128,
        whitening: NonNegative = 0.3,
        dictionary: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.patches = Patches(side, whitening)
        if dictionary is None:
            if not 0 < alpha < math.inf:
                raise UserError(f"Lasso.alpha={alpha}: above 0 is needed")
            if atoms < 1:
                raise UserError(f"Lasso.atoms={atoms}: at least 1 is needed")
            dictionary = learned(side, atoms, whitening)
        elif len(dictionary) != side**2:
            raise UserError(f"Lasso.dictionary: shape {tuple(dictionary.shape)} given; ({side**2}, N) is needed")
        self.ista = Ista(unit(dictionary).to(torch.get_default_dtype()), alpha)
        self.domain = Euclid(self.ista.dictionary.shape[1])

    def contexts(self, count: int) -> Tensor:
        return self.patches.draw(count, 0, 1 - HELD_OUT)

    def held_out(self, count: int) -> Tensor:
        """x (count, M) from the held-out parts of the images."""
        return self.patches.draw(count, 1 - HELD_OUT, 1)

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return self.ista.cost(y, _signal(x))

    def map(self, y: Tensor, x: Tensor) -> Tensor:
        """A step of ISTA."""
        return self.ista.step(y, _signal(x))

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """The duality gap, a bound on f(y; x) - min f."""
        return self.ista.gap(y, _signal(x))

    def solution(self, x: Tensor) -> Tensor:
        return solve(self.ista, _signal(x))


class SparseRecovery(Problem[dict[str, Tensor]]):
    """The lasso of x = A y + noise with Bernoulli-Gaussian codes y: compressed sensing, with fewer measurements than atoms.

    Contexts are {signals, codes}; the true codes are hidden from models, for supervised losses and scores.

    Args:
        measurements: M.
        atoms: N.
        density: probability that a coordinate of y is nonzero; then it is N(0, 1).
        noise: standard deviation of the noise on x.
        alpha: weight of |y|_1.
        seed: of A, which is Gaussian with columns of unit length.

    Raises:
        UserError: one of them is out of range.
    """

    convex = True
    hidden = ("codes",)

    def __init__(
        self,
        measurements: Count = 100,
        atoms: Count = 200,
        density: Fraction = 0.1,
        noise: float = 0.0,
        alpha: Positive = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed, need in (
            ("measurements", measurements, measurements >= 1, "at least 1"),
            ("atoms", atoms, atoms >= 1, "at least 1"),
            ("density", density, 0 < density <= 1, "above 0 and at most 1"),
            ("noise", noise, 0 <= noise < math.inf, "0 or more"),
        ):
            if not allowed:
                raise UserError(f"SparseRecovery.{name}={value}: {need} is needed")
        self.density, self.noise = density, noise
        dictionary = torch.randn(measurements, atoms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.ista = Ista(unit(dictionary).to(torch.get_default_dtype()), alpha)
        self.domain = Euclid(atoms)

    def contexts(self, count: int) -> dict[str, Tensor]:
        """Signals (count, M) and their true codes (count, N); from torch's generator."""
        a = self.ista.dictionary
        y = torch.randn(count, a.shape[1]).to(a) * (torch.rand(count, a.shape[1]) < self.density).to(a)
        return {"signals": y @ a.mT + self.noise * torch.randn(count, len(a)).to(a), "codes": y}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.ista.cost(y, _signal(x))

    def map(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        """A step of ISTA."""
        return self.ista.step(y, _signal(x))

    def residual(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The duality gap, a bound on f(y; x) - min f."""
        return self.ista.gap(y, _signal(x))

    def solution(self, x: dict[str, Tensor]) -> Tensor:
        return solve(self.ista, _signal(x))


def nmse(y: Tensor, truth: Tensor) -> Tensor:
    """sum |y - truth|^2 / sum |truth|^2 of codes (B, N), in decibels; 0-d."""
    return 10 * ((y - truth).square().sum() / truth.square().sum()).log10()


class Patches(nn.Module):
    """Patches of scikit-learn's two photographs, in grey, with mean 0 and normalised contrast, optionally whitened.

    Whitening is x -> (C + whitening)^(-1/2) x with the covariance C of training patches (as in Olshausen and Field, 1996), and
    then contrast normalisation again.

    Args:
        side: of a square patch.
        whitening: added to the eigenvalues of C; 0 for no whitening.

    Raises:
        UserError: no such patch fits into the held-out part, or whitening is negative.
    """

    images: Tensor
    filter: Tensor | None

    def __init__(self, side: int, whitening: float) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("images", photographs(), persistent=False)
        most = int(min(self.images.shape[1], HELD_OUT * self.images.shape[2]))
        if not 2 <= side <= most:
            raise UserError(f"side={side}: patches of 2 to {most} pixels fit")
        if not 0 <= whitening < math.inf:
            raise UserError(f"whitening={whitening}: 0 or more is needed")
        self.register_buffer("filter", None, persistent=False)
        if whitening:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                x = self.draw(SAMPLE, 0, 1 - HELD_OUT).double()
            values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
            self.filter = (vectors * (values + whitening).rsqrt()) @ vectors.mT

    def draw(self, count: int, left: float, right: float) -> Tensor:
        """Patches (count, side^2) from between two fractions of the images' width; from torch's generator."""
        images, height, width = self.images.shape
        begin, end = (round(share * width) for share in (left, right))
        device = self.images.device
        at = torch.arange(self.side, device=device)
        image = torch.randint(images, (count, 1, 1), device=device)
        row = torch.randint(height - self.side + 1, (count, 1, 1), device=device) + at[:, None]
        column = torch.randint(begin, end - self.side + 1, (count, 1, 1), device=device) + at
        x = self.images[image, row, column].flatten(1)
        x = contrast(x - x.mean(-1, keepdim=True), FLOOR)
        if self.filter is not None:
            x = contrast(x @ self.filter, DIM)
        return x.to(torch.get_default_dtype())


def contrast(x: Tensor, floor: float) -> Tensor:
    """x (B, M) divided by its root mean square, with `floor` added in quadrature."""
    return x / (x.square().mean(-1, keepdim=True) + floor**2).sqrt()


@functools.cache
def photographs() -> Tensor:
    """(2, 427, 640) in [0, 1]."""
    from sklearn.datasets import load_sample_images  # takes a second to import, and no other problem needs it

    return torch.from_numpy(np.stack([image.mean(-1) / 255 for image in load_sample_images().images]))


@functools.cache
def learned(side: int, atoms: int, whitening: float) -> Tensor:
    """A dictionary (side^2, atoms) of patches, learned at alpha = 1; torch's generator state is unchanged."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of codes on the way that are not exact, which they need not be
        torch.default_generator.manual_seed(0)
        x = Patches(side, whitening).draw(SAMPLE, 0, 1 - HELD_OUT).double().numpy()
        learner = MiniBatchDictionaryLearning(atoms, alpha=1, batch_size=256, max_iter=5, fit_algorithm="cd", random_state=0)
        atoms_found = learner.fit(x).components_
    return torch.from_numpy(atoms_found.T)


def unit(dictionary: Tensor) -> Tensor:
    """The dictionary with columns of unit length; zero columns stay zero."""
    norm = torch.linalg.vector_norm(dictionary, dim=0)
    return dictionary / torch.where(norm > 0, norm, 1)


@torch.no_grad()
def solve(ista: Ista, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The lasso's solution (B, N) for x (B, M), from y (B, N) or zero, by FISTA with restarts, in float64.

    An item stops when its duality gap is at most 1e-7 of f, so its solution does not depend on the batch.
    """
    exact = copy.deepcopy(ista).double()
    found = x.new_zeros(len(x), ista.dictionary.shape[1]) if y is None else y.clone()
    fista, oracle, left = Fista(exact, GradientRestart()), nothing(x), torch.arange(len(x), device=x.device)
    y, x = found.double(), x.double()
    h = fista.start(y, x, oracle)
    for count in range(1, LIMIT + 1):
        y, h = fista(y, h, x, oracle)
        if count % CHECK_EVERY == 0:
            going = exact.gap(y, x) > PRECISION * exact.cost(y, x)
            found[left] = y.to(found.dtype)
            y, x, left, h = y[going], x[going], left[going], tuple(part[going] for part in h)
            if not len(left):
                break
    return found


def _signal(x: Parts) -> Tensor:
    return x if isinstance(x, Tensor) else x["signals"]
