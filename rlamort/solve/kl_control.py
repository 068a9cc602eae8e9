"""Linear-quadratic control within a Kullback-Leibler divergence of another controller (Levine and Abbeel, 2014, section 3).

min_p E_p[sum_t c(x_t, u_t)] subject to sum_t E KL(p(u_t | x_t) || q(u_t | x_t)) <= eps, by dual descent on eta. Conditions are
solved side by side, each with an eta of its own.

M conditions · T steps · N samples · z = (x, u), d + n numbers · eta price of the divergence (M,)
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlamort.dynamics import Dynamics
from rlamort.dynamics.linear_gaussian import LinearGaussian

LEAST, MOST = 1e-8, 1e16  # eta
FACTOR, ROUNDS, TOLERANCE = 10.0, 50, 0.1  # of a step of eta; evaluations at most; of eps, within which the constraint is met


class Quadratic(NamedTuple):
    """The cost of a step, value + slope' z + z' curvature z / 2."""

    value: Tensor  # (M, T)
    slope: Tensor  # (M, T, d + n)
    curvature: Tensor  # (M, T, d + n, d + n)


class Moments(NamedTuple):
    """Mean and covariance of states or pairs."""

    mean: Tensor  # (M, ..., k)
    covariance: Tensor  # (M, ..., k, k)

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Those of samples (M, N, k)."""
        x = x.double()
        away = x - x.mean(1, keepdim=True)
        return cls(x.mean(1), away.mT @ away / x.shape[1])


class Solution(NamedTuple):
    """What the constrained problem was solved by."""

    controller: LinearGaussian
    eta: Tensor  # (M,)
    divergence: Tensor  # (M,) from the other controller, in nats
    met: Tensor  # (M,) bool: eps is met within `TOLERANCE`, or kept where the cost alone asks for no more


@torch.enable_grad()
def expanded(dynamics: Dynamics, x: Tensor, y: Tensor) -> Quadratic:
    """The mean over samples of second-order expansions of minus the reward, around x (M, T, N, d) and y (M, T, N, n).

    The curvature at a sample is without its negative part, which away from the sample would promise more than there is.
    """
    z = torch.cat([x, y], -1).detach()
    flat = z.flatten(0, 2).requires_grad_()  # (M T N, d + n)
    cost = -dynamics(flat[:, : x.shape[-1]], flat[:, x.shape[-1] :]).reward
    (slope,) = torch.autograd.grad(cost.sum(), flat, create_graph=True, materialize_grads=True)
    rows = [_row(part, flat) for part in slope.unbind(-1)]
    z, H = z.double(), torch.stack(rows, -1).double().view(*z.shape, -1)
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    H = (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT
    g, c = slope.detach().double().view_as(z), cost.detach().double().view(z.shape[:-1])
    across = (H @ z[..., None])[..., 0]
    value = c - (g * z).sum(-1) + (across * z).sum(-1) / 2
    return Quadratic(value.mean(2), (g - across).mean(2), H.mean(2))


def _row(part: Tensor, z: Tensor) -> Tensor:
    """d part (P,) / d z (P, k), zero where it does not depend on z."""
    if not part.requires_grad:
        return torch.zeros_like(z)
    (row,) = torch.autograd.grad(part.sum(), z, retain_graph=True, materialize_grads=True, allow_unused=True)
    return row


def follow(dynamics: LinearGaussian, controller: LinearGaussian, start: Moments) -> Moments:
    """The distribution of z at each step, (M, T, .), from that of the first state."""
    mean, covariance = start
    means, covariances = [], []
    for t in range(dynamics.gain.shape[1]):
        K = controller.gain[:, t]
        mean = torch.cat([mean, _times(K, mean) + controller.offset[:, t]], -1)
        beside = covariance @ K.mT  # of x and u
        below = torch.cat([beside.mT, K @ beside + controller.covariance[:, t]], -1)
        covariance = torch.cat([torch.cat([covariance, beside], -1), below], -2)
        means.append(mean)
        covariances.append(covariance)
        F = dynamics.gain[:, t]
        mean = _times(F, mean) + dynamics.offset[:, t]
        covariance = F @ covariance @ F.mT + dynamics.covariance[:, t]
        covariance = (covariance + covariance.mT) / 2
    return Moments(torch.stack(means, 1), torch.stack(covariances, 1))


def expected(cost: Quadratic, along: Moments) -> Tensor:
    """The expected sum of costs (M,) where z is so distributed."""
    second = along.covariance + along.mean[..., :, None] * along.mean[..., None, :]
    return (cost.value + (cost.slope * along.mean).sum(-1) + (cost.curvature * second).sum((-2, -1)) / 2).sum(-1)


def divergence(p: LinearGaussian, q: LinearGaussian, along: Moments) -> Tensor:
    """KL (M,) between the distributions of trajectories of two controllers under the same dynamics; `along` is p's."""
    d = p.gain.shape[-1]
    mean, covariance = along.mean[..., :d], along.covariance[..., :d, :d]
    apart = _times(p.gain - q.gain, mean) + p.offset - q.offset
    K, factor = p.gain - q.gain, torch.linalg.cholesky(q.covariance)
    second = p.covariance + apart[..., :, None] * apart[..., None, :] + K @ covariance @ K.mT
    trace = torch.cholesky_solve(second, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    volume = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(p.covariance)
    nats: Tensor = ((trace - p.offset.shape[-1] + volume) / 2).sum(-1)
    return nats


def regulated(
    cost: Quadratic, dynamics: LinearGaussian, near: LinearGaussian, eta: Tensor, temperature: float
) -> tuple[LinearGaussian, Tensor]:
    """The controller that minimises E[cost] - temperature H(p) + eta KL(p || near), and where there is one, (M,) bool.

    There is none where an action's curvature Q_uu is not positive definite; a larger eta makes it so.
    """
    d, price = near.gain.shape[-1], eta[:, None, None] + temperature
    P = torch.cholesky_inverse(torch.linalg.cholesky(near.covariance))
    # minus log near = (u - K x - k)' P (u - K x - k) / 2 in z, where pull is (-K, 1)
    pull = torch.cat([-near.gain, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)], -1)
    share = (eta / (eta + temperature))[:, None, None, None]
    curvature = cost.curvature / price[..., None] + share * pull.mT @ P @ pull
    slope = cost.slope / price - share[..., 0] * _times(pull.mT @ P, near.offset)
    V, v = torch.zeros_like(cost.curvature[:, 0, :d, :d]), torch.zeros_like(cost.slope[:, 0, :d])
    firm = torch.ones_like(eta, dtype=torch.bool)
    eye, laws = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device), []
    for t in reversed(range(cost.slope.shape[1])):
        F = dynamics.gain[:, t]
        Q = curvature[:, t] + F.mT @ V @ F
        q = slope[:, t] + _times(F.mT, v + _times(V, dynamics.offset[:, t]))
        factor, failed = torch.linalg.cholesky_ex(Q[:, d:, d:])
        firm = firm & (failed == 0)
        factor = torch.where(firm[:, None, None], factor, eye)
        law = -torch.cholesky_solve(torch.cat([Q[:, d:, :d], q[:, d:, None]], -1), factor)  # (K | k)
        K, k = law[..., :d], law[..., d]
        laws.append((K, k, torch.cholesky_inverse(factor)))
        V = Q[:, :d, :d] + Q[:, :d, d:] @ K
        V, v = (V + V.mT) / 2, q[:, :d] + _times(Q[:, :d, d:], k)
    K, k, covariance = (torch.stack(part[::-1], 1) for part in zip(*laws, strict=True))
    return LinearGaussian(K, k, covariance), firm


def bounded(
    cost: Quadratic,
    dynamics: LinearGaussian,
    near: LinearGaussian,
    start: Moments,
    eps: Tensor,
    eta: Tensor,
    temperature: float = 0.0,
) -> Solution:
    """Dual descent: eta falls where the divergence is below eps (M,) and rises where it is above, or where Q_uu is not firm.

    It moves to the geometric mean of its bracket, by a factor of 10 at most. Where eps is not met after 50 evaluations, the
    least eta of which the divergence was below it is taken, or else the other controller itself.

    Args:
        cost: the quadratic cost of each step.
        dynamics: of x_next given z.
        near: the controller that the solution keeps near to.
        start: of the first state.
        eps: nats, (M,).
        eta: to begin with, (M,).
        temperature: price of entropy, in units of the cost, below which exploration does not cool; 0 lets it vanish.
    """
    low, high = torch.full_like(eta, LEAST), torch.full_like(eta, MOST)
    eta = eta.clamp(LEAST, MOST)
    best = Solution(near, torch.full_like(eta, MOST), torch.zeros_like(eta), eps <= 0)
    for _ in range(ROUNDS):
        found, firm = regulated(cost, dynamics, near, eta, temperature)
        sound = LinearGaussian(*(torch.where(_wide(firm, one), one, other) for one, other in zip(found, near, strict=True)))
        far = torch.where(firm, divergence(sound, near, follow(dynamics, sound, start)), torch.inf)
        reached = (far - eps).abs() <= TOLERANCE * eps
        free = (far < eps) & (low >= eta / (1 + TOLERANCE))  # the constraint does not bind, or a lower eta is not firm
        better = ~best.met & ((far < eps) | reached)
        best = Solution(
            LinearGaussian(
                *(torch.where(_wide(better, one), one, kept) for one, kept in zip(sound, best.controller, strict=True))
            ),
            torch.where(better, eta, best.eta), torch.where(better, far, best.divergence), best.met | reached | free,
        )  # fmt: skip
        if best.met.all():
            break
        low, high = torch.where(far > eps, eta, low), torch.where(far > eps, high, eta)
        middle = (low * high).sqrt()
        eta = torch.where(far > eps, torch.minimum(middle, FACTOR * eta), torch.maximum(middle, eta / FACTOR))
    return best


def _wide(flag: Tensor, like: Tensor) -> Tensor:
    return flag.view(-1, *[1] * (like.ndim - 1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices (..., a, b) times vectors (..., b)."""
    return (matrix @ vector[..., None])[..., 0]
