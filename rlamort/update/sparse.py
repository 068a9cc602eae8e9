"""Unfolded sparse coding: proximal gradient steps on the lasso, and variants with learned matrices, steps and thresholds.

x signal (B, M) · y code (B, N) · A dictionary (M, N) · alpha weight of |y|_1 · L = |A|_2^2 · theta thresholds · k step

All have the form y -> shrink(y + W'(x - A y), theta) and differ in which parameters are learned. Lista, ListaCp and StepIsta
are initialised as ISTA, to rounding. Steps and thresholds are softplus of parameters, hence positive; steps beyond the last
layer use its parameters.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rlamort.adjoint import Carry
from rlamort.config import Count, Positive
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update import Update


def shrink(v: Tensor, theta: Tensor) -> Tensor:
    """sign(v) max(|v| - theta, 0), the proximal map of theta |.|_1."""
    return v - torch.clamp(v, -theta, theta)


class Ista(Update):
    """Proximal gradient, y -> shrink(y + rate / L A'(x - A y), rate alpha / L) (Daubechies, Defrise and De Mol, 2004, eq. 1.8).

    Args:
        dictionary: A; no column is zero.
        alpha: weight of |y|_1.
        rate: step size in units of 1 / L; f decreases at every step up to 1, and the iteration converges below 2.

    Raises:
        UserError: one of them is out of range.
    """

    dictionary: Tensor
    size: Tensor  # rate / L

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
        self.register_buffer("size", rate / torch.linalg.matrix_norm(dictionary.detach(), 2).square())

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        return self.step(y, x), h

    def step(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, N), x (B, M) -> (B, N)."""
        return shrink(y + self.size * (self.residual(y, x) @ self.dictionary), self.size * self.alpha)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """x - A y, (B, M)."""
        return x - y @ self.dictionary.mT

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        """|x - A y|^2 / 2 + alpha |y|_1, (B,)."""
        return 0.5 * self.residual(y, x).square().sum(-1) + self.alpha * y.abs().sum(-1)

    def gap(self, y: Tensor, x: Tensor) -> Tensor:
        """The duality gap (B,), a bound on f(y; x) - min f; the dual point is a scaled residual (Kim et al., 2007, eq. 11)."""
        y, x, dictionary = y.double(), x.double(), self.dictionary.double()  # or rounding of f would hide a small gap
        left = x - y @ dictionary.mT
        dual = left * (self.alpha / (left @ dictionary).abs().amax(-1, keepdim=True)).clamp(max=1)
        value = 0.5 * left.square().sum(-1) + self.alpha * y.abs().sum(-1)
        bound = value - 0.5 * (x.square() - (x - dual).square()).sum(-1)
        return bound.clamp_min(0).to(self.dictionary.dtype)


class NoRestart(nn.Module):
    """No restarts."""

    def forward(self, ahead: Tensor, y: Tensor, after: Tensor) -> Tensor:
        """-> (B, 1) bool."""
        return torch.zeros_like(y[:, :1], dtype=torch.bool)


class GradientRestart(nn.Module):
    """Adaptive gradient restart, per item (O'Donoghue and Candes, 2015, section 3.2)."""

    def forward(self, ahead: Tensor, y: Tensor, after: Tensor) -> Tensor:
        """Start and end of a step and the iterate before it, (B, N) each -> (B, 1) bool, where to restart."""
        return ((ahead - after) * (after - y)).sum(-1, keepdim=True) > 0


class Fista(Update):
    """ISTA's step from the extrapolated point (Beck and Teboulle, 2009, eqs. 4.1 to 4.3).

    Args:
        ista: the step.
        restart: NoRestart, or GradientRestart.
    """

    def __init__(self, ista: Ista, restart: NoRestart | GradientRestart | None = None) -> None:
        super().__init__()
        self.ista, self.restart = ista, restart or NoRestart()

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return y, torch.ones_like(y[:, :1]), torch.zeros_like(y[:, :1])

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        before, t, momentum = h
        ahead = y + momentum * (y - before)
        after = self.ista.step(ahead, x)
        stop = self.restart(ahead, y, after)
        t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
        return after, (y, torch.where(stop, 1, t_next), torch.where(stop, 0, (t - 1) / t_next))


class Momentum(Update):
    """A learned step from the extrapolated point y + m_k (y - y_before), with learned m_k, initialised as FISTA's.

    Args:
        update: the step, such as StepIsta, which together is initialised as FISTA.
        layers: layers with their own momentum.
    """

    def __init__(self, update: Update, layers: Count) -> None:
        super().__init__()
        self.update = update
        t = [1.0, 1.0]
        for _ in range(layers):
            t.append((1 + math.sqrt(1 + 4 * t[-1] ** 2)) / 2)
        like = next(update.parameters(), None)
        if like is None:
            raise UserError(f"update: {type(update).__name__} learns nothing, so there is no momentum to learn with it")
        self.share = nn.Parameter(torch.tensor([[(a - 1) / b] for a, b in pairwise(t[:-1])]).to(like))  # (layers, 1)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return y, _first(y), *self.update.start(y, x, oracle)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        before, k, *rest = h
        share = self.share[k.clamp(max=len(self.share) - 1)]
        after, carry = self.update(y + share * (y - before), tuple(rest), x, oracle)
        return after, (y, k + 1, *carry)


class Lista(Update):
    """y -> shrink(S y + B x, theta_k), with S and B shared by all layers (Gregor and LeCun, 2010, algorithm 3).

    Args:
        ista: its initialisation.
        layers: layers with their own thresholds, one per coordinate.
    """

    size: Tensor

    def __init__(self, ista: Ista, layers: Count) -> None:
        super().__init__()
        a = ista.dictionary
        self.register_buffer("size", ista.size)
        # B and 1 - S in units of the step: numbers of the size of A's, to which one learning rate applies
        self.read, self.mix = nn.Parameter(a.mT.clone()), nn.Parameter(a.mT @ a)
        self.theta = _positive(ista.size * ista.alpha, layers, a.shape[1])

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return self.size * (x @ self.read.mT), _first(y)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        read, k = h
        return shrink(y - self.size * (y @ self.mix.mT) + read, _at(self.theta, k)), (read, k + 1)


class ListaCp(Update):
    """y -> shrink(y + W'(x - A y), theta_k): S and B of Lista are coupled, as recovery needs (Chen et al., 2018, eq. 15).

    Args:
        ista: its initialisation.
        layers: layers with their own thresholds, one per coordinate.
    """

    size: Tensor
    dictionary: Tensor

    def __init__(self, ista: Ista, layers: Count) -> None:
        super().__init__()
        self.register_buffer("size", ista.size)
        self.register_buffer("dictionary", ista.dictionary.clone())
        self.weight = nn.Parameter(ista.dictionary.clone())  # W in units of the step
        self.theta = _positive(ista.size * ista.alpha, layers, ista.dictionary.shape[1])

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return (_first(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (k,) = h
        left = x - y @ self.dictionary.mT
        return shrink(y + self.size * (left @ self.weight), _at(self.theta, k)), (k + 1,)


class Alista(Update):
    """y -> shrink(y + gamma_k W'(x - A y), theta_k) with an analytic, data-free W; gamma and theta are learned.

    Liu et al. (2019, eq. 10): two parameters per layer.

    Args:
        ista: the lasso's step, for its A.
        layers: layers with their own parameters.
        gamma: initial step size.
        theta: initial threshold.
    """

    dictionary: Tensor
    weight: Tensor

    def __init__(self, ista: Ista, layers: Count, gamma: Positive = 1.0, theta: Positive = 0.1) -> None:
        super().__init__()
        self.register_buffer("dictionary", ista.dictionary.clone())
        self.register_buffer("weight", analytic(ista.dictionary))
        self.gamma, self.theta = (_positive(torch.tensor(v).to(self.weight), layers, 1) for v in (gamma, theta))

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return (_first(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (k,) = h
        left = x - y @ self.dictionary.mT
        return shrink(y + _at(self.gamma, k) * (left @ self.weight), _at(self.theta, k)), (k + 1,)


class StepIsta(Update):
    """ISTA with learned steps, y -> shrink(y + s_k A'(x - A y), s_k alpha), so that y* stays its fixed point.

    With one step size per layer it is that of Ablin et al. (2019, eq. 8); with one per coordinate, a learned diagonal
    preconditioner.

    Args:
        ista: its initialisation.
        layers: layers with their own step sizes.
        coordinates: step sizes per layer: 1 or N.
    """

    dictionary: Tensor

    def __init__(self, ista: Ista, layers: Count, coordinates: Count = 1) -> None:
        super().__init__()
        if coordinates not in (1, ista.dictionary.shape[1]):
            raise UserError(f"coordinates: {coordinates} given; 1 or {ista.dictionary.shape[1]} is needed")
        self.register_buffer("dictionary", ista.dictionary.clone())
        self.alpha = ista.alpha
        self.step = _positive(ista.size, layers, coordinates)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return (_first(y),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (k,) = h
        step = _at(self.step, k)
        left = x - y @ self.dictionary.mT
        return shrink(y + step * (left @ self.dictionary), step * self.alpha), (k + 1,)


class Safeguarded(Update):
    """The learned step where it decreases f and is not worse than ISTA's iterate; elsewhere the better of two ISTA steps.

    So no item is ever worse than ISTA from the same start, at any layer.

    Args:
        update: the learned step.
        ista: with a rate of at most 1, so that it never increases f.
    """

    def __init__(self, update: Update, ista: Ista) -> None:
        super().__init__()
        if ista.rate > 1:
            raise UserError(f"ista.rate: {ista.rate} given; at most 1 is needed, beyond which a step may raise f")
        self.update, self.ista = update, ista

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return y, *self.update.start(y, x, oracle)

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
    """The encoder of predictive sparse decomposition, shrink(gain tanh(F x + b), theta) (Kavukcuoglu et al., 2010, eq. 2).

    The paper's has no theta, without which codes are not sparse.

    Args:
        ista: whose fixed point it predicts. F is initialised as the correlations with its atoms, A'.
    """

    def __init__(self, ista: Ista) -> None:
        super().__init__()
        atoms = ista.dictionary.shape[1]
        self.filters = nn.Parameter(0.5 * ista.dictionary.mT / torch.linalg.vector_norm(ista.dictionary, dim=0)[:, None])
        self.bias = nn.Parameter(ista.dictionary.new_zeros(atoms))
        self.gain = nn.Parameter(ista.dictionary.new_ones(atoms))
        self.theta = _positive(torch.tensor(0.3).to(ista.dictionary), 1, atoms)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M) -> (B, N)."""
        # tanh(u) as 2 sigmoid(2 u) - 1, which takes a sixth of its time on a CPU and no pass of its own
        half = torch.addmm(self.bias, x, self.filters.mT, beta=2, alpha=2).sigmoid()
        return shrink(torch.addcmul(-self.gain, half, 2 * self.gain), softplus(self.theta))


def analytic(dictionary: Tensor) -> Tensor:
    """W (M, N) of least |W'A|_F with w_i'a_i = 1 (Liu et al., 2019, eq. 16): columns of (A A')^-1 A, scaled.

    Columns are independent problems, min w'A A'w subject to w'a_i = 1, solved by (A A')^-1 a_i over a_i'(A A')^-1 a_i.

    Raises:
        UserError: A does not have full row rank.
    """
    m, n = dictionary.shape
    if torch.linalg.matrix_rank(dictionary) < m:
        raise UserError(f"dictionary: its {n} atoms do not span all signals of {m} numbers, so that there is no W to compute")
    weight: Tensor = torch.linalg.solve(dictionary @ dictionary.mT, dictionary)
    return weight / (weight * dictionary).sum(0)


def _positive(value: Tensor, layers: int, width: int) -> nn.Parameter:
    """A parameter (layers, width) whose softplus is `value`."""
    if layers < 1:
        raise UserError(f"layers: {layers} given; at least 1 is needed")
    return nn.Parameter(torch.special.expm1(value).log().repeat(layers, width))


def _at(raw: Tensor, k: Tensor) -> Tensor:
    """Positive parameters (B, width) of the layers k (B,)."""
    return softplus(raw[k.clamp(max=len(raw) - 1)])


def _first(y: Tensor) -> Tensor:
    return torch.zeros(len(y), dtype=torch.long, device=y.device)
