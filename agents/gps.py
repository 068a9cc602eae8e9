"""Guided policy search by mirror descent (Montgomery and Levine, 2016, algorithm 1; Levine and Abbeel, 2014).

f = minus the return of a trajectory, by models that are linear about its samples · Y = box · p(x) = states that local
controllers meet · y_theta = a network · L = KL to the local controllers, a regression with their precisions.

M conditions · T steps · N rollouts of each in an iteration · d = x_dim · n = dim of an action, in units of half its range
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rlamort import parts
from rlamort.adjoint import Carry
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, NonNegative, Positive, Size, Widths
from rlamort.dynamics import LinearGaussian, Prior
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.losses import Regress, precise
from rlamort.objective import Metrics, Unknown
from rlamort.solve.kl_control import Moments, Quadratic, bounded, expanded, expected, follow
from rlamort.source import Labelled, Played, Rollouts
from rlamort.source.rollouts import Several

T = TypeVar("T", bound=Any)  # a named tuple of tensors
POINTS = 40  # for a cluster of the prior, as in the authors' code


class GPS(Agent):
    """Local controllers of the start states that they were sampled from, and a network that follows them everywhere.

    The controllers play while it learns, the network otherwise. Of the authors' code it keeps the algorithm; what differs is
    that inputs are normalised by all samples, where the code keeps the first iteration's; that costs are convex at every
    sample; that controllers cool no further than a temperature, without which learning drifts away again; that models are
    fitted in units of the samples' spread; and that bounds of the step's factor, fixed numbers there, are fields.

    Args:
        spec: sizes, action bounds, the episode's length, and the environment's equations.
        model: of the policy: full, one forward pass.
        dynamics: whose reward is asked, which must be differentiable; how states move is learned.
        num_envs: M.
        rollouts: N.
        hidden: widths of the network's hidden layers, unless the model sets its own.
        normalise: normalise the network's inputs by statistics of all samples.
        learning_rate: Adam's step size.
        policy_steps: gradient steps of the network in an iteration.
        batch_size: states in such a step.
        initial_std: standard deviation of the first actions, in units of half their range.
        kl_step: nats a step by which a controller may leave the network, times a factor that is adapted.
        least_factor: of `kl_step`.
        most_factor: of `kl_step`.
        least_change: of the factor in an iteration.
        most_change: of the factor in an iteration.
        temperature: price of entropy, in units of the reward, at which controllers stop cooling; 0 is the paper's.
        clusters: Gaussians of the prior of local models, at most; 1 pools all samples.
        prior_strength: samples of a step that the prior counts for.

    Raises:
        UserError: no time limit is known, rewards are not known or have no gradients, or bounds are in the wrong order.
    """

    before: Tensor
    begun: Tensor
    eta: Tensor
    factor: Tensor
    variance: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        dynamics: parts.Dynamics = parts.Own(),
        num_envs: Fixed[Size] = 1,
        rollouts: Fixed[Several] = 5,
        hidden: Fixed[Widths] = (64, 64),
        normalise: Fixed[bool] = True,
        learning_rate: Positive = 1e-3,
        policy_steps: Size = 1000,
        batch_size: Size = 256,
        initial_std: Fixed[Positive] = 0.1,
        kl_step: NonNegative = 0.3,
        least_factor: Positive = 0.5,
        most_factor: Positive = 3.0,
        least_change: Positive = 0.1,
        most_change: Positive = 5.0,
        temperature: NonNegative = 0.001,
        clusters: Size = 20,
        prior_strength: Positive = 1.0,
    ) -> None:
        super().__init__(spec, normalise=normalise)
        if spec.longest is None:
            raise UserError("env: it has no time limit, and rollouts of one length are needed; set max_episode_steps")
        for name, least, most in (("factor", least_factor, most_factor), ("change", least_change, most_change)):
            if least > most:
                raise UserError(f"least_{name}={least:g}: it is above most_{name}={most:g}; at most that is needed")
        self.horizon, self.rollouts, self.fit_every = spec.longest, rollouts, num_envs * rollouts * spec.longest
        self.kl_step, self.temperature = kl_step, temperature
        self.factors, self.changes = (least_factor, most_factor), (least_change, most_change)
        self.policy_steps, self.batch_size = policy_steps, batch_size
        self.dynamics, self.prior = dynamics(spec, hidden), Prior(clusters, POINTS, prior_strength)
        if self.dynamics.learned or not self.dynamics.differentiable or not self._sloped(spec.x_dim):
            raise UserError(
                f"dynamics={type(self.dynamics).__name__}: its rewards are no known function with gradients in states and "
                "actions; dynamics=own, where the environment's equations are known, or Known, with yours, is needed"
            )
        if model.taught:
            raise UserError(
                f"model={model.label()}: it reads labels as predictions of its own, and here they are Gaussians; full is needed"
            )
        self.f, self.loss = Unknown(), Regress(None, precise)
        self.model = model(parts.Setting(self.domain, spec.x_dim, hidden, objective=self.f))
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a model that asks f says so before any work starts
            self.model(torch.zeros(2, spec.x_dim), self.f.oracle(torch.zeros(2, spec.x_dim)))
        self.adam = Adam(self.model.parameters(), learning_rate)
        M, H, d, n = num_envs, self.horizon, spec.x_dim, self.domain.dim
        self.controllers, self.local = (Held(LinearGaussian, _sizes(M, H, *of)) for of in ((n, d), (d, d + n)))
        self.cost = Held(Quadratic, ((M, H), (M, H, d + n), (M, H, d + n, d + n)))
        self.controllers.covariance.copy_(initial_std**2 * torch.eye(n))
        zeros = {"before": (M,), "begun": (), "eta": (M,), "factor": (), "variance": (n,)}
        for name, shape in zeros.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.eta.fill_(1)
        self.factor.fill_(1)

    @torch.enable_grad()
    def _sloped(self, x_dim: int) -> bool:
        """Whether its rewards have gradients."""
        z = torch.zeros(2, x_dim + self.domain.dim, requires_grad=True)
        return bool(self.dynamics(z[:, :x_dim], z[:, x_dim:]).reward.requires_grad)

    def start(self, count: int) -> Carry:
        """The step of its episode and the condition of each environment."""
        condition = torch.arange(count, device=self.device) % len(self.eta)
        return torch.zeros_like(condition), condition

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        time, condition = h
        after = (time + 1).clamp(max=self.horizon - 1), condition
        if not explore:
            return self.policy(x), after
        gain, offset, covariance = (part[condition, time] for part in self.controllers())
        noise = torch.linalg.cholesky(covariance) @ torch.randn_like(offset)[..., None]
        y = (gain @ x.to(gain)[..., None] + noise)[..., 0] + offset
        return y.clamp(-1, 1).to(x), after

    def policy(self, x: Tensor) -> Tensor:
        """The network's action at x (B, d)."""
        x = self.normaliser(x)
        y: Tensor = self.model(x, self.f.oracle(x))
        return y

    def fit(self, source: Rollouts) -> Metrics:
        """An iteration, once its rollouts are there: local models, the C-step and the S-step."""
        if source.episode < self.rollouts:
            return {}
        met, recent = source.latest(), source.recent()
        if not self.begun:
            self.regress(met)  # the network begins as the first controllers
        dynamics = self.modelled(met, recent, lambda one: (torch.cat([one.x[:, :-1], one.y], -1), one.x[:, 1:]))
        network = self.modelled(met, recent, self._answered)
        network = network._replace(covariance=network.covariance + torch.diag(self.variance))
        cost, start = expanded(self.dynamics, met.x[:, :-1], met.y), Moments.of(met.x[:, 0])
        metrics = self.adapt(dynamics, network, cost, start)
        eps = torch.full_like(self.eta, self.kl_step * self.horizon) * self.factor
        found = bounded(cost, dynamics, network, start, eps, self.eta, self.temperature)  # the C-step
        self.controllers.hold(found.controller)
        self.eta.copy_(found.eta)
        metrics |= {"gps/kl": (found.divergence / eps.clamp(min=1e-12)).mean(), "gps/met": found.met.double().mean()}
        return metrics | {"gps/log10_eta": found.eta.log10().mean()} | self.regress(met)  # the S-step

    def modelled(self, met: Played, recent: Played, pairs: Callable[[Played], tuple[Tensor, Tensor]]) -> LinearGaussian:
        """The linear model of pairs (z, w) about the samples of an iteration, with a prior from all that is kept."""
        mixture = self.prior.mixture(torch.cat(pairs(recent), -1).flatten(0, 2))
        return self.prior.fitted(*pairs(met), mixture)

    @torch.no_grad()
    def _answered(self, one: Played) -> tuple[Tensor, Tensor]:
        """The states of rollouts, and the network's actions there."""
        x = one.x[:, :-1]
        return x, self.policy(x.flatten(0, 2)).view(*x.shape[:-1], -1)

    def adapt(self, dynamics: LinearGaussian, network: LinearGaussian, cost: Quadratic, start: Moments) -> Metrics:
        """Let the step grow where the local models' promise was kept, and shrink where not (Montgomery and Levine, 2016, 4.2).

        The promise is the improvement of the network under the models of the iteration before, for which one step was best
        if the models err by the square of the step.
        """
        now = expected(cost, follow(dynamics, network, start))
        metrics = {"gps/cost": now.mean()}
        if self.begun:
            promised = self.before - expected(self.cost(), follow(self.local(), network, start))
            promised, kept = promised.mean(), (self.before - now).mean()
            # what was promised for nothing; never none, in units of the cost, so that where little is left steps shrink
            missing = (promised - kept).clamp(min=1e-4 * self.before.abs().mean().clamp(min=1e-12))
            self.factor.mul_((promised / (2 * missing)).clamp(*self.changes)).clamp_(*self.factors)
            metrics |= {"gps/promised": promised, "gps/improved": kept}
        self.begun.fill_(1)
        self.before.copy_(now)
        self.local.hold(dynamics)
        self.cost.hold(cost)
        return metrics | {"gps/factor": self.factor.clone()}

    def regress(self, met: Played) -> Metrics:
        """Train the network on the controllers' actions at all states that were met, weighed by their precisions."""
        x = met.x[:, :-1]  # (M, T, N, d)
        y = self.controllers().mean(x.double()).clamp(-1, 1)
        P = torch.linalg.inv(self.controllers().covariance)  # (M, T, n, n)
        self.variance.copy_(torch.linalg.inv(P.mean((0, 1))).diagonal())
        P = P / P.diagonal(dim1=-2, dim2=-1).mean()
        rows = P.flatten(-2)[:, :, None].expand(*y.shape[:-1], -1)
        labels, x = torch.cat([y, rows], -1).to(x).flatten(0, 2), self.normaliser(x.flatten(0, 2))
        for _ in range(self.policy_steps):
            index = torch.randint(len(x), (self.batch_size,), device=x.device)
            metrics = self.improve(Labelled(x[index], labels[index]))
        return metrics

    def improve(self, batch: Labelled) -> Metrics:
        loss, _ = self.loss(self.model, self.f, batch)
        descend(loss, self.model.parameters(), self.adam)
        return {"policy/loss": loss.detach()}

    def update_from(self, sample: object, improve: bool) -> Metrics:
        return {}  # all learning is of whole iterations


class Held(nn.Module, Generic[T]):
    """A named tuple of tensors as buffers, which are 0 at first, so that it travels with an agent's.

    Args:
        kind: of the tuple.
        shapes: of its tensors.
    """

    covariance: Tensor

    def __init__(self, kind: type[T], shapes: Iterable[tuple[int, ...]]) -> None:
        super().__init__()
        self.kind = kind
        for name, shape in zip(kind._fields, shapes, strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def forward(self) -> T:
        value: T = self.kind(*self.buffers())
        return value

    def hold(self, value: T) -> None:
        """Take the values of another."""
        for ours, theirs in zip(self.buffers(), value, strict=True):
            ours.copy_(theirs)


def _sizes(conditions: int, steps: int, outputs: int, inputs: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a `LinearGaussian`."""
    return (conditions, steps, outputs, inputs), (conditions, steps, outputs), (conditions, steps, outputs, outputs)
