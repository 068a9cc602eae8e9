"""SAC: soft actor-critic with automatic temperature (Haarnoja et al., 2018b, algorithm 1).

f = Soft(-min Q, alpha) · Y = squashed Gaussian · p(x) = replay · y_theta = any model · L = any loss. With recurrent steps from
the prior and the loss over all iterates it is IAPO (Marino et al., 2021), with f expanded through a model SVG(H) (Amos et al.,
2021), and without entropy SVG(0) (Heess et al., 2015), as rows in configs/method say.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from rlamort import parts
from rlamort.adjoint import Carry
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Count, Decay, Fixed, Fraction, NonNegative, Positive, Size, Widths
from rlamort.critic import Critic
from rlamort.domain import NOISES, SquashedGaussian
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.losses import td_target
from rlamort.nets import ARITHMETIC, WEIGHTS
from rlamort.objective import MaxQ, Metrics, Soft, Temperature
from rlamort.source import Batch, Replay


class SAC(Agent):
    """A stochastic policy on the soft max-Q problem of an ensemble of critics.

    Args:
        spec: sizes and action bounds.
        model: of the policy; it predicts the parameters of its density.
        loss: of the policy.
        critic: the ensemble of Q functions.
        draws: actions over which the policy's objective is the mean, one half of their noise mirrored, in losses and in what a
            model with steps asks.
        expansion: steps of a model that the policy's objective follows before it asks the critic.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size for the policy and the temperature.
        critic_learning_rate: the critics'; null takes learning_rate.
        learning_rate_horizon: updates over which learning rates fall to zero along a half cosine; null keeps them.
        adam_beta1: decay of Adam's first moment, for policy and critics.
        weights: unit keeps the incoming weights of every unit of policy and critics at length one, by projection after every
            step (Palenicek et al., 2025: XQC); free does not.
        actor_delay: critic updates per update of policy and temperature.
        discount: per step.
        tau: Polyak averaging: weight of the online critics in every update of their targets.
        pessimism: beta in mean - beta std over the ensemble; 1 over two critics is their minimum.
        temperature: initial alpha, the weight of the entropy bonus, per nat; 0 stays 0, and leaves the entropy out.
        target_entropy: target of the automatic temperature, in nats on [-1, 1]^n; null takes n target_entropy_per_dim.
        target_entropy_per_dim: the same per coordinate of the action.
        exploration: noise of exploring actions; fresh at every step, or held for k steps, P(k) proportional to k^-2, k <= 16.
        normalise: normalise observations by running statistics.
        matmul: precision of the networks' matrix products; weights, losses and optimisers are float32 with any. tf32 needs a
            GPU of compute capability 8.0 or newer.
    """

    needs_fit = True  # of an expansion that is learned; without one there are no fits
    fit_field = "expansion.fit_every"
    renamed = MappingProxyType({"critics": "critic.members", "critic_norm": "critic.norm"})

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        loss: parts.Loss = parts.Objective(),
        critic: parts.Critics = parts.Critics(),
        draws: Size = 1,
        expansion: parts.Expansion = parts.Unexpanded(),
        hidden: Fixed[Widths] = (256, 256),
        learning_rate: Positive = 3e-4,
        critic_learning_rate: Positive | None = None,
        learning_rate_horizon: Count | None = None,
        adam_beta1: Decay = 0.9,
        weights: Fixed[Literal["free", "unit"]] = "free",
        actor_delay: Count = 1,
        discount: Fraction = 0.99,
        tau: Fraction = 0.005,
        pessimism: NonNegative = 1.0,
        temperature: NonNegative = 1.0,
        target_entropy: float | None = None,
        target_entropy_per_dim: float = -1.0,
        exploration: Fixed[Literal["fresh", "held"]] = "fresh",
        normalise: Fixed[bool] = False,
        matmul: Literal["float32", "tf32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__(spec, normalise=normalise)
        arithmetic, project = ARITHMETIC[matmul], WEIGHTS[weights]
        self.pessimism, self.improve_every = pessimism, actor_delay
        self.density, self.noise = SquashedGaussian(self.domain.dim), NOISES[exploration]()
        self.target_entropy = target_of(self.density.dim, target_entropy, target_entropy_per_dim)

        def new_critic() -> Critic:
            return critic(spec.x_dim, self.domain.dim, hidden, arithmetic)

        setting = parts.Setting(self.density.parameters, spec.x_dim, hidden, arithmetic)
        loss.require_trained(model)
        expansion.require_states(normalise)
        self.model, self.loss = model(setting), loss(setting)
        self.critic = new_critic()
        self.critic.head.require(pessimism)
        project_model, project_critic = project(self.model), project(self.critic)
        self.target_critic = critic.target(self.critic, new_critic, tau, project_critic)
        self.alpha = Temperature(temperature)
        self.expansion = expansion(spec, hidden, discount)
        self.fit_every, self.fit_least = self.expansion.fit_every, self.expansion.fit_least
        self.adds_rewards = self.expansion.adds_rewards
        self.f = self.expansion.objective(Soft(MaxQ(self.critic, pessimism), self.density, self.alpha, draws), self.model)
        horizon, decay = learning_rate_horizon, (adam_beta1, 0.999)
        seldom = horizon and -(-horizon // actor_delay)  # its steps, where the critics take `horizon`
        critic_rate = critic_learning_rate or learning_rate
        self.model_adam = Adam(self.model.parameters(), learning_rate, decay, horizon=seldom, project=project_model)
        self.critic_adam = Adam(self.critic.parameters(), critic_rate, decay, horizon=horizon, project=project_critic)
        self.alpha_adam = Adam(self.alpha.parameters(), learning_rate, horizon=seldom)

    def start(self, count: int) -> Carry:
        return self.noise.start(count, self.density.dim, self.device)

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        x = self.normaliser(x)
        lam = self.model(x, self.f.oracle(x) if explore else self.f.deterministic_oracle(x))
        if not explore:
            return self.density.median(lam), h
        noise, h = self.noise(self.density.noise(lam), h)
        return self.density.draw(lam, noise), h

    def evaluate(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            y_next, logq = self.density.sample(self.model(batch.x_next, self.f.oracle(batch.x_next)))
            cost = (self.alpha() * logq)[:, None]  # of acting so at x'
        head = self.critic.head
        q, q_next = self.target_critic.both(batch.x, batch.y, batch.x_next, y_next)  # (E, B, O)
        target = head.target(q_next, lambda value: td_target(batch, value - cost), self.pessimism)
        loss = head.loss(q, target)
        descend(loss, self.critic.parameters(), self.critic_adam)
        self.target_critic.follow()
        return {"critic/loss": loss.detach(), "critic/q": head.q(q.detach()).mean(), **head.metrics()}

    def improve(self, batch: Batch) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.model.parameters(), self.model_adam)
        # entropy above its target makes alpha fall, in log space so that it stays positive
        alpha_loss = self.alpha.log * (metrics["entropy"] - self.target_entropy)
        descend(alpha_loss, self.alpha.parameters(), self.alpha_adam)
        return {f"actor/{name}": value for name, value in metrics.items()} | {"temperature": self.alpha().detach()}

    def fit(self, source: Replay) -> Metrics:
        return self.expansion.fit(source)

    def notice(self, recorded: Mapping[str, Any]) -> None:
        self.critic.head.notice(recorded)


def target_of(dim: int, total: float | None, per_dim: float) -> float:
    """The target entropy of `dim` coordinates, in nats. Raises UserError if it is given twice."""
    if total is not None and per_dim != -1:
        raise UserError(f"target_entropy={total} and target_entropy_per_dim={per_dim}: one of them is needed, not both")
    return dim * per_dim if total is None else total
