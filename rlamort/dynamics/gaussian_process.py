"""Gaussian processes as transition models (Deisenroth and Rasmussen, 2011, section 2.1), and which data they hold.

x context (B, d) · y action (B, n) in [-1, 1]^n · w = (x, y) an input (k = d + n) · D outputs, how a state moves · N data held
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlamort.dynamics.base import Dynamics, Moved, Transitions
from rlamort.dynamics.moments import Moments, radial
from rlamort.dynamics.rewards import Rewards
from rlamort.errors import UserError
from rlamort.nets import spread

JITTER = 1e-6  # of the signal's variance, on the diagonal: with N data no condition number is above N / JITTER
LARGEST_RATIO = 1000.0  # signal to noise, in standard deviations, from which on a fit is penalised
CIRCLE = 1e-3  # how far cos^2 + sin^2 may be from 1


class Motion:
    """How a state moves: coordinates by adding their change, and pairs (cos, sin) of an angle by turning.

    So a model that predicts D numbers, the change of each plain coordinate and then of each angle, never leaves the circle, and
    is the same whichever turn it is in. It needs no angle of its own: states as they are observed are what a process compares.

    Args:
        x_dim: d.
        angles: the coordinates that are the cosine and the sine of an angle, one pair after another.

    Raises:
        UserError: they are no pairs of different coordinates.
    """

    def __init__(self, x_dim: int, angles: Sequence[int] = ()) -> None:
        if len(angles) % 2 or len(set(angles)) < len(angles) or any(i >= x_dim for i in angles):
            raise UserError(
                f"dynamics.angles={list(angles)}: pairs of different coordinates below {x_dim} are needed, cosine before sine"
            )
        self.plain = [i for i in range(x_dim) if i not in angles]
        self.cos, self.sin = list(angles[::2]), list(angles[1::2])
        self.x_dim, self.outputs = x_dim, len(self.plain) + len(self.cos)
        # coordinates are picked by products, which are faster. Of outputs: adds, plain ones; cos and sin, those of an angle
        adds, cos, sin = (torch.zeros(self.outputs, x_dim, dtype=torch.float64) for _ in range(3))
        for row, i in enumerate(self.plain):
            adds[row, i] = 1
        for row, (c, s) in enumerate(zip(self.cos, self.sin, strict=True), len(self.plain)):
            cos[row, c] = sin[row, s] = 1
        self.maps = adds, cos, sin, cos + sin, sin.mT @ cos * -1 + cos.mT @ sin  # the last: (cos, sin) -> (-sin, cos)

    def change(self, x: Tensor, x_next: Tensor) -> Tensor:
        """x, x_next (B, d) -> (B, D); angles change by at most half a turn."""
        adds, cos, sin = (part.to(x).mT for part in self.maps[:3])
        c, s, after_c, after_s = x @ cos, x @ sin, x_next @ cos, x_next @ sin
        return (x_next - x) @ adds + torch.atan2(after_s * c - after_c * s, after_c * c + after_s * s)

    def numbers(self, x: Tensor) -> Tensor:
        """x (B, d) -> (B, D), angles as numbers, within half a turn of their mean direction."""
        mean = x.mean(0, keepdim=True)
        adds, cos, sin = (part.to(x).mT for part in self.maps[:3])
        return x @ adds + torch.atan2(mean @ sin, mean @ cos) + self.change(mean, x) * adds.mT.sum(-1).eq(0)

    def after(self, x: Tensor, change: Tensor) -> Tensor:
        """x (B, d), change (B, D) -> x_next (B, d)."""
        if not self.cos:
            return x + change
        adds, _, _, turns, quarter = (part.to(x) for part in self.maps)
        angle = change @ turns
        return torch.addcmul(torch.addcmul(change @ adds, x, angle.cos()), x @ quarter, angle.sin())

    def circle(self, device: torch.device) -> Tensor:
        """Which coordinates are cosines or sines (d,), bool."""
        return self.maps[3].to(device).sum(0) > 0

    def require(self, x: Tensor) -> None:
        """Raises UserError unless what is called an angle lies on the circle, in x (B, d)."""
        off = ((x.square() @ self.maps[3].to(x).mT)[:, len(self.plain) :] - 1).abs().amax(0)
        for c, s, far in zip(self.cos, self.sin, off.tolist(), strict=True):
            if far > CIRCLE:
                raise UserError(
                    f"dynamics.angles: coordinates {c} and {s} are off the unit circle by {far:.3g}; the cosine and the sine "
                    "of an angle are needed, as the environment observes them"
                )


class Everything:
    """All data are held.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs (B, k) in lengthscales -> indices of those to hold (N,). Raises UserError if there are too many."""
        if len(inputs) > self.most:
            raise UserError(
                f"dynamics.points: {len(inputs)} transitions are met, and the process holds dynamics.points.most={self.most}; "
                "more are needed, or dynamics.points=spread, which holds the most different of them"
            )
        return torch.arange(len(inputs), device=inputs.device)


class Spread(Everything):
    """Of more data than may be held, the most different: each has the largest variance given those before it.

    The pivots of a Cholesky factorisation (Fine and Scheinberg, 2001; Foster et al., 2009).

    Args:
        most: N.
    """

    def __call__(self, inputs: Tensor) -> Tensor:
        if len(inputs) <= self.most:
            return super().__call__(inputs)
        left, rows, chosen = inputs.new_ones(len(inputs)), inputs.new_zeros(self.most, len(inputs)), []
        for number in range(self.most):
            pivot = left.argmax()
            near = (-(inputs - inputs[pivot]).square().sum(-1) / 2).exp()
            row = (near - rows[:number].T @ rows[:number, pivot]) / left[pivot].clamp_min(JITTER).sqrt()
            rows[number], left = row, left - row.square()
            left[pivot] = -torch.inf
            chosen.append(pivot)
        return torch.stack(chosen).sort().values


class GaussianProcess(Dynamics):
    """One Gaussian process for each number by which a state moves, learned from transitions, all in float64.

    The prior of each is squared exponential with a lengthscale for every coordinate of (x, y), over inputs and targets that are
    standardised. Kernel, likelihood and marginal likelihood are gpytorch's. What follows is drawn from predictive normals by
    reparameterised noise of torch's generator, with the same seed the same. The reward is known, and no task ends.

    Args:
        x_dim: d.
        y_dim: n.
        rewards: the known function.
        angles: see `Motion`.
        points: which data are held, and at most how many.
        members: particles that follow a state in `futures`.

    Raises:
        UserError: gpytorch is not installed, or angles are no pairs.
    """

    learned = True
    least = 3  # data in a fit
    count: Tensor  # N
    inputs: Tensor  # (most, k), standardised
    held: Tensor  # (D, most, k), centred, in lengthscales
    shifts: Tensor  # (k + D,)
    scales: Tensor  # (k + D,)
    lengths: Tensor  # (D, k), in units of x and y
    signal: Tensor  # (D,) variances of the processes, of standardised targets
    noise: Tensor  # (D,) of the noise, with the jitter
    alpha: Tensor  # (D, most)
    inverse: Tensor  # (D, most, most), of their covariance

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        rewards: Rewards,
        angles: Sequence[int] = (),
        points: Everything | None = None,
        members: int = 20,
    ) -> None:
        super().__init__()
        gp = _gpytorch()
        self.motion, self.rewards, self.members = Motion(x_dim, angles), rewards, members
        self.points = points or Everything(400)
        self.k, D, most = x_dim + y_dim, self.motion.outputs, self.points.most
        batch = torch.Size([D])
        shape = gp.kernels.RBFKernel(ard_num_dims=self.k, batch_shape=batch)
        self.kernel = gp.kernels.ScaleKernel(shape, batch_shape=batch).double()
        floor = gp.constraints.GreaterThan(1e-8)
        self.likelihood = gp.likelihoods.GaussianLikelihood(batch_shape=batch, noise_constraint=floor).double()
        self.kernel.base_kernel.lengthscale, self.likelihood.noise = self.k**0.5, 1e-2
        self.kernel.outputscale = 1.0
        for part in [*self.kernel.modules(), *self.likelihood.modules()]:
            if isinstance(part, gp.constraints.Interval):  # bounds are infinite, and nothing that is learned
                for name in ("lower_bound", "upper_bound"):
                    part.register_buffer(name, getattr(part, name), persistent=False)
        data = {"inputs": (most, self.k), "held": (D, most, self.k), "alpha": (D, most), "inverse": (D, most, most)}
        for name, shape in (data | {"shifts": (self.k + D,)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        for name, shape in {"scales": (self.k + D,), "lengths": (D, self.k), "signal": (D,), "noise": (D,)}.items():
            self.register_buffer(name, torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # N; rows of buffers from there on are not used

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        mean, variance = self.predict(x, y)
        change = mean + variance.sqrt() * torch.randn_like(mean)
        x_next = self.motion.after(x, change)
        return Moved(x_next, self.rewards(x, y, x_next), x.new_ones(x.shape[:-1]))

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        """As `forward`, of `members` particles (E, B, .), from x (B, d) or from one of each (E, B, d)."""
        x = x.expand(self.members, *x.shape[-2:])
        y = y.expand(*x.shape[:-1], -1)
        flat = self(x.flatten(0, 1), y.flatten(0, 1))
        return Moved(*(part.view(*x.shape[:-1], *part.shape[1:]) for part in flat))

    def predict(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, d), y (B, n) -> mean and variance, with noise, of how the states move (B, D)."""
        w, N = torch.cat([x, y], -1).double(), int(self.count)
        mean, variance = Posterior.apply(  # type: ignore[no-untyped-call]
            w, self.shifts[: self.k], self.lengths, self.held[:, :N], self.signal, self.alpha[:, :N], self.inverse[:, :N, :N]
        )
        shift, scale = self.shifts[self.k :], self.scales[self.k :]
        return (shift + scale * mean).to(x), (scale.square() * (variance.clamp_min(0) + self.noise)).to(x)

    def moments(self, mean: Tensor, cov: Tensor) -> Moments:
        """Of how the states move (D,), with noise, where w = (x, y) is normal, with mean (k,) and cov (k, k)."""
        N, scale = int(self.count), self.scales[self.k :]
        centres = self.shifts[: self.k] + self.scales[: self.k] * self.inputs[:N]
        found, products = radial(mean, cov, centres, self.lengths, self.signal, self.alpha[:, :N])
        own = self.signal - (self.inverse[:, :N, :N] * products).sum((1, 2)) + self.noise
        spread = (found.cov + torch.diag(own)) * scale[:, None] * scale
        return Moments(self.shifts[self.k :] + scale * found.mean, spread, found.slope * scale)

    @torch.no_grad()
    def hold(self, met: Transitions) -> Tensor:
        """Take transitions as data, standardised, as many as may be held; returns the targets (N, D) of these.

        The posterior is that of `condition`, which comes after learning.

        Raises:
            UserError: too few transitions, or too many, or angles that are off the circle.
        """
        if len(met.x) < self.least:
            raise UserError(f"dynamics: {len(met.x)} transitions are met; a Gaussian process needs at least {self.least}")
        self.motion.require(met.x)
        inputs = torch.cat([met.x, met.y], -1).double()
        pairs = torch.cat([inputs, self.motion.change(met.x.double(), met.x_next.double())], -1)
        self.shifts.copy_(pairs.mean(0))
        self.scales.copy_(spread(pairs))
        self._settle()
        chosen = self.points(((inputs - self.shifts[: self.k]) / self.lengths[:, None]).mean(0))
        self.count.fill_(len(chosen))
        self.inputs[: len(chosen)] = ((inputs - self.shifts[: self.k]) / self.scales[: self.k])[chosen]
        scaled: Tensor = ((pairs - self.shifts) / self.scales)[chosen, self.k :]
        return scaled

    def loss(self, targets: Tensor) -> Tensor:
        """Minus the log marginal likelihood of targets (N, D) a datum, summed over outputs, with penalties.

        Those are of lengthscales far from the root of k, by a broad log-normal (as Hvarfner, Hellsten and Nardi, 2024), and of
        ratios of signal to noise beyond `LARGEST_RATIO`, as Deisenroth and Rasmussen's.
        """
        gp, N = _gpytorch(), len(targets)
        inputs = self.inputs[:N]
        covariance = self.kernel(inputs).add_diagonal(JITTER * self.kernel.outputscale[:, None])
        prior = gp.distributions.MultivariateNormal(targets.new_zeros(targets.mT.shape), covariance)
        with gp.settings.fast_computations(log_prob=False):  # by Cholesky whatever N is, and not by random probes
            fit = self.likelihood(prior).log_prob(targets.mT).sum()
        far = (self.kernel.base_kernel.lengthscale.log() - 0.5 * torch.log(inputs.new_tensor(float(self.k)))) / 2
        ratio = 0.5 * (self.kernel.outputscale / self.likelihood.noise[:, 0]).log()
        penalty = far.square().sum() / 2 + (ratio / torch.log(ratio.new_tensor(LARGEST_RATIO))).pow(30).sum()
        loss: Tensor = (penalty - fit) / N
        return loss

    @torch.no_grad()
    def condition(self, targets: Tensor) -> None:
        """Set the posterior, given targets (N, D) of the data that are held."""
        N = len(targets)
        self._settle()
        held = self.inputs[:N] * self.scales[: self.k] / self.lengths[:, None]
        covariance = self.signal[:, None, None] * (-0.5 * torch.cdist(held, held).square()).exp()
        factor = torch.linalg.cholesky(covariance + torch.diag_embed(self.noise[:, None].expand(-1, N)))
        self.held[:, :N], self.inverse[:, :N, :N] = held, torch.cholesky_inverse(factor)
        self.alpha[:, :N] = torch.cholesky_solve(targets.mT[..., None], factor)[..., 0]

    @torch.no_grad()
    def _settle(self) -> None:
        """Copy what the posterior needs of the parameters, so that it asks no library."""
        self.lengths.copy_(self.kernel.base_kernel.lengthscale[:, 0] * self.scales[: self.k])
        self.signal.copy_(self.kernel.outputscale)
        self.noise.copy_(self.likelihood.noise[:, 0] + JITTER * self.signal)


class Posterior(torch.autograd.Function):
    """Means and variances of processes at inputs, with derivatives written out: a path of many steps is mostly such calls.

    w (B, k), shift (k,), lengths (D, k), held (D, N, k), signal (D,), alpha (D, N), inverse (D, N, N) -> (B, D) twice.
    """

    @staticmethod
    def forward(ctx, w, shift, lengths, held, signal, alpha, inverse):  # type: ignore[no-untyped-def]
        at = (w - shift) / lengths[:, None]  # (D, B, k)
        exponent = at @ held.mT  # -|at - held|^2 / 2
        exponent -= 0.5 * held.square().sum(-1)[:, None]
        exponent -= 0.5 * at.square().sum(-1, keepdim=True)
        kernel = exponent.clamp_max_(0).exp_().mul_(signal[:, None, None])  # (D, B, N)
        solved = kernel @ inverse
        variance = signal[:, None] - (solved * kernel).sum(-1)
        ctx.save_for_backward(at, held, lengths, kernel, solved, alpha)
        return (kernel @ alpha[..., None])[..., 0].mT, variance.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_mean, of_variance):  # type: ignore[no-untyped-def]
        at, held, lengths, kernel, solved, alpha = ctx.saved_tensors
        weight = torch.addcmul(of_mean.mT[..., None] * alpha[:, None], of_variance.mT[..., None], solved, value=-2).mul_(kernel)
        slope = weight @ held - weight.sum(-1, keepdim=True) * at  # (D, B, k)
        return (slope / lengths[:, None]).sum(0), *[None] * 6


def _gpytorch() -> Any:
    """gpytorch, which is imported when it is first needed. Raises UserError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what it imports compiles in a way that torch will drop
            import gpytorch  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"dynamics=gp: gpytorch is needed, pip install 'rlamort[gp]' ({error})") from error
    return gpytorch
