"""Unfolded sparse coding: proximal gradient steps on the lasso, and those whose matrices, steps and thresholds are learned.

x signal (B, M) · y code (B, N) · A dictionary (M, N) · alpha weight of |y|_1 · L = |A|_2^2 · theta thresholds · W weights (M, N)
· k step

All of them step y -> shrink(y + W'(x - A y), theta); they differ in what of it is learned. Before training Lista, ListaCp and
StepIsta are ISTA, to rounding. Steps and thresholds are softplus of what is learned, hence positive; those of layers beyond the
last are the last's.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rlamort.adjoint import Carry
from rlamort.config import Count, Positive
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.problem import Problem
from rlamort.update import Update


def shrink(v: Tensor, theta: Tensor | float) -> Tensor:
    """sign(v) max(|v| - theta, 0), the proximal map of theta |.|_1."""
    return v - v.clamp(-theta, theta) if isinstance(theta, float) else v - torch.clamp(v, -theta, theta)


class Ista(Update):
    """Proximal gradient, y -> shrink(y + rate / L A'(x - A y), rate alpha / L) (Daubechies, Defrise and De Mol, 2004, eq. 1.8).

    Args:
        dictionary: A; no column is zero.
        alpha: weight of |y|_1.
        rate: step in units of 1 / L; f falls at every step for rates up to 1, and they converge below 2.

    Raises:
        UserError: one of them is out of range.
    """

    dictionary: Tensor
    lipschitz: Tensor

    def __init__(self, dictionary: Tensor, alpha: Positive, rate: Positive = 1.0) -> None:
        super().__init__()
        if dictionary.ndim != 2 or not dictionary.isfinite().all():
            raise UserError(f"dictionary: shape {tuple(dictionary.shape)} given; finite numbers of shape (M, N) are needed")
        if len(zero := (dictionary == 0).all(0).nonzero()[:, 0]):
            raise UserError(f"dictionary: columns {zero.tolist()[:8]} are zero; every atom needs a length")
        if not 0 < alpha < math.inf:
            raise UserError(f"alpha: {alpha} given; above 0 is needed")
        if not 0 < rate < 2:
            raise UserError(f"rate: {rate} given; above 0 and below 2 is needed")
        self.alpha, self.rate = float(alpha), rate
        self.register_buffer("dictionary", dictionary.detach().clone())
        self.register_buffer("lipschitz", torch.linalg.matrix_norm(self.dictionary, 2).square())

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        return self.step(y, x), h

    def step(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, N), x (B, M) -> (B, N)."""
        size = self.rate / self.lipschitz
        return shrink(y + size * self.residual(y, x) @ self.dictionary, size * self.alpha)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """x - A y, (B, M)."""
        return x - y @ self.dictionary.mT

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        """|x - A y|^2 / 2 + alpha |y|_1, (B,)."""
        return 0.5 * self.residual(y, x).square().sum(-1) + self.alpha * y.abs().sum(-1)

    def gap(self, y: Tensor, x: Tensor) -> Tensor:
        """A bound (B,) on f(y; x) - min f, by the dual point to which the residual is scaled (Kim et al., 2007, eq. 11)."""
        y, x, dictionary = y.double(), x.double(), self.dictionary.double()  # or rounding of f would hide a small gap
        left = x - y @ dictionary.mT
        dual = left * (self.alpha / (left @ dictionary).abs().amax(-1, keepdim=True)).clamp(max=1)
        value = 0.5 * left.square().sum(-1) + self.alpha * y.abs().sum(-1)
        bound = value - 0.5 * (x.square() - (x - dual).square()).sum(-1)
        return bound.clamp_min(0).to(self.dictionary.dtype)


class Never(nn.Module):
    """Momentum is never given up."""

    def forward(self, ahead: Tensor, y: Tensor, after: Tensor) -> Tensor:
        """-> (B, 1) bool."""
        return torch.zeros_like(y[:, :1], dtype=torch.bool)


class Uphill(nn.Module):
    """An item's momentum is given up when its step points against it (O'Donoghue and Candes, 2015, section 3.2)."""

    def forward(self, ahead: Tensor, y: Tensor, after: Tensor) -> Tensor:
        """The points (B, N) from which and to which a step leads, and the one before -> (B, 1) bool."""
        return ((ahead - after) * (after - y)).sum(-1, keepdim=True) > 0


class Fista(Update):
    """Ista's step from a point ahead of y (Beck and Teboulle, 2009, eqs. 4.1 to 4.3).

    Args:
        ista: the step.
        restart: Never, or Uphill.
    """

    def __init__(self, ista: Ista, restart: Never | Uphill | None = None) -> None:
        super().__init__()
        self.ista, self.restart = ista, restart or Never()

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return y, torch.ones_like(y[:, :1])

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        ahead, t = h
        after = self.ista.step(ahead, x)
        t_next = torch.where(self.restart(ahead, y, after), 1.0, (1 + (1 + 4 * t.square()).sqrt()) / 2)
        t = torch.where(t_next > 1, t, 1.0)  # without momentum it goes on from where it is
        return after, (after + (t - 1) / t_next * (after - y), t_next)


class Lista(Update):
    """y -> shrink(S y + B x, theta_k), with S and B shared by all layers (Gregor and LeCun, 2010, algorithm 3).

    Args:
        ista: what it is before training.
        layers: how many have thresholds of their own, for each coordinate.
    """

    def __init__(self, ista: Ista, layers: Count) -> None:
        super().__init__()
        a, size = ista.dictionary, ista.rate / ista.lipschitz
        self.read = nn.Parameter(size * a.mT)  # B
        self.mix = nn.Parameter(torch.eye(a.shape[1]).to(a) - size * a.mT @ a)  # S
        self.theta = _positive(size * ista.alpha, layers, a.shape[1])

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return x @ self.read.mT, _first(y)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        read, k = h
        return shrink(y @ self.mix.mT + read, _at(self.theta, k)), (read, k + 1)


class ListaCp(Update):
    """y -> shrink(y + W'(x - A y), theta_k): S and B of Lista are coupled, as recovery needs (Chen et al., 2018, eq. 15).

    Args:
        ista: what it is before training.
        layers: how many have thresholds of their own, for each coordinate.
    """

    def __init__(self, ista: Ista, layers: Count) -> None:
        super().__init__()
        size = ista.rate / ista.lipschitz
        self.register_buffer("dictionary", ista.dictionary.clone())
        self.weight = nn.Parameter(size * ista.dictionary)
        self.theta = _positive(size * ista.alpha, layers, ista.dictionary.shape[1])

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return (_first(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (k,) = h
        left = x - y @ self.dictionary.mT
        return shrink(y + left @ self.weight, _at(self.theta, k)), (k + 1,)


class Alista(Update):
    """y -> shrink(y + gamma_k W'(x - A y), theta_k) with a W that no data has made; gamma and theta are learned.

    Liu et al. (2019, eq. 10): two numbers a layer.

    Args:
        ista: whose A it solves for.
        layers: how many have numbers of their own.
        gamma: before training.
        theta: before training.
    """

    def __init__(self, ista: Ista, layers: Count, gamma: Positive = 1.0, theta: Positive = 0.1) -> None:
        super().__init__()
        self.register_buffer("dictionary", ista.dictionary.clone())
        self.register_buffer("weight", analytic(ista.dictionary))
        self.gamma, self.theta = (_positive(torch.tensor(v).to(ista.dictionary), layers, 1) for v in (gamma, theta))

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return (_first(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (k,) = h
        left = x - y @ self.dictionary.mT
        return shrink(y + _at(self.gamma, k) * (left @ self.weight), _at(self.theta, k)), (k + 1,)


class StepIsta(Update):
    """ISTA with a learned step for each layer, y -> shrink(y + s_k A'(x - A y), s_k alpha) (Ablin et al., 2019, eq. 8).

    Args:
        ista: what it is before training.
        layers: how many have steps of their own.
    """

    def __init__(self, ista: Ista, layers: Count) -> None:
        super().__init__()
        self.register_buffer("dictionary", ista.dictionary.clone())
        self.alpha = ista.alpha
        self.size = _positive(ista.rate / ista.lipschitz, layers, 1)

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return (_first(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (k,) = h
        size = _at(self.size, k)
        left = x - y @ self.dictionary.mT
        return shrink(y + size * (left @ self.dictionary), size * self.alpha), (k + 1,)


class Safeguarded(Update):
    """A learned step wherever it lowers f, and below ISTA's own iterate; elsewhere the better of ISTA's steps.

    So no item is ever above ISTA from the same start, at any layer.

    Args:
        update: the learned step.
        ista: at a rate of at most 1, so that it never raises f.
    """

    def __init__(self, update: Update, ista: Ista) -> None:
        super().__init__()
        if ista.rate > 1:
            raise UserError(f"ista.rate: {ista.rate} given; at most 1 is needed, beyond which a step may raise f")
        self.update, self.ista = update, ista

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return y, *self.update.start(y, x)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        shadow, *rest = h
        learned, carry = self.update(y, tuple(rest), x, oracle)
        plain, shadow = self.ista.step(y, x), self.ista.step(shadow, x)
        with torch.no_grad():
            here, ours, back, theirs = (self.ista.cost(at, x) for at in (y, learned, plain, shadow))
            lower = (ours <= here) & (ours <= theirs)  # False where NaN
        fallback = torch.where((back <= theirs)[:, None], plain, shadow)
        return torch.where(lower[:, None], learned, fallback), (shadow, *carry)


class Psd(nn.Module):
    """The encoder of predictive sparse decomposition, gain * tanh(F x + b), shrunk by theta (Kavukcuoglu et al., 2010, eq. 2).

    A hyperbolic tangent is never zero, and the lasso charges for every number that is not; the paper's is the one of theta = 0.

    Args:
        signal: M.
        atoms: N.
        theta: before training.
    """

    def __init__(self, ista: Ista, theta: Positive = 0.1) -> None:
        super().__init__()
        raise NotImplementedError


def analytic(dictionary: Tensor) -> Tensor:
    """W (M, N) of least |W'A|_F with w_i'a_i = 1 (Liu et al., 2019, eq. 16): columns of (A A')^-1 A, scaled.

    Each column is a problem of its own, min w'A A'w subject to w'a_i = 1, whose solution is (A A')^-1 a_i over a_i'(A A')^-1 a_i.

    Raises:
        UserError: A has fewer atoms than signals have numbers, or does not span them.
    """
    m, n = dictionary.shape
    if torch.linalg.matrix_rank(dictionary) < m:
        raise UserError(f"dictionary: its {n} atoms do not span all signals of {m} numbers, so that there is no W to compute")
    weight = torch.linalg.solve(dictionary @ dictionary.mT, dictionary)
    return weight / (weight * dictionary).sum(0)


def _positive(value: Tensor, layers: int, width: int) -> nn.Parameter:
    """(layers, width), whose softplus is `value`."""
    if layers < 1:
        raise UserError(f"layers: {layers} given; at least 1 is needed")
    return nn.Parameter(torch.special.expm1(value).log().repeat(layers, width))


def _at(raw: Tensor, k: Tensor) -> Tensor:
    """Positive numbers (B, width) of the layers k (B,)."""
    return softplus(raw[k.clamp(max=len(raw) - 1)])


def _first(y: Tensor) -> Tensor:
    return torch.zeros(len(y), dtype=torch.long, device=y.device)
