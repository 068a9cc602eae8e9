"""TQC: truncated quantile critics (Kuznetsov et al., 2020, algorithm 1).

f = Soft(-mean of all quantiles, alpha) · Y = squashed Gaussian · p(x) = replay · y_theta = any model · L = any loss.
"""

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, Fraction, Positive, Whole, Widths
from rlamort.critic import frozen_copy, polyak
from rlamort.domain import SquashedGaussian
from rlamort.env import Spec
from rlamort.losses import quantile_huber, td_target
from rlamort.objective import MaxQ, Metrics, Soft, Temperature
from rlamort.source import Batch


class TQC(Agent):
    """A stochastic policy on the soft max-Q problem of quantile critics, with the highest quantiles truncated in targets.

    Args:
        spec: sizes and action bounds.
        model: of the policy; it predicts the parameters of its density.
        loss: of the policy.
        critic: the ensemble of critics, with quantiles of the return as outputs.
        dropped: quantiles per critic that are dropped from the pooled target.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size, for policy, critics and temperature.
        discount: per step.
        tau: Polyak averaging: weight of the online critics in every update of their targets.
        normalise: normalise observations by running statistics.
    """

    def __init__(
        self, spec: Spec, *, model: parts.Model = parts.Full(), loss: parts.Loss = parts.Objective(),
        critic: parts.Critics = parts.Critics(5, 25), dropped: Whole = 2, hidden: Fixed[Widths] = (256, 256),
        learning_rate: Positive = 3e-4, discount: Fraction = 0.99, tau: Fraction = 0.005, normalise: Fixed[bool] = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, normalise=normalise)
        self.tau, self.atom_count = tau, critic.members * (critic.outputs - dropped)
        self.density, self.alpha = SquashedGaussian(self.domain.dim), Temperature(1.0)
        setting = parts.Setting(self.density.parameters, spec.x_dim, hidden)
        loss.require_trained(model)
        self.model, self.loss = model(setting), loss(setting)
        self.critic, fresh = (critic(spec.x_dim, self.domain.dim, hidden) for _ in range(2))
        self.target_critic = frozen_copy(self.critic, fresh)
        self.f = Soft(MaxQ(self.critic, beta=0.0), self.density, self.alpha)
        learning = self.model, self.critic, self.alpha
        self.model_adam, self.critic_adam, self.alpha_adam = (Adam(one.parameters(), learning_rate) for one in learning)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        x = self.normaliser(x)
        lam = self.model(x, self.f.oracle(x) if explore else self.f.deterministic_oracle(x))
        return self.density.draw(lam) if explore else self.density.median(lam)

    def evaluate(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            y_next, logq = self.density.sample(self.model(batch.x_next, self.f.oracle(batch.x_next)))
            atoms = self.target_critic.atoms(batch.x_next, y_next).transpose(0, 1).flatten(1)  # (B, E M)
            target = td_target(
                batch, atoms.sort(-1).values[:, : self.atom_count] - self.alpha() * logq[:, None]
            )  # (B, atom_count)
        loss = quantile_huber(self.critic.atoms(batch.x, batch.y), target)
        descend(loss, self.critic.parameters(), self.critic_adam)
        polyak(self.target_critic, self.critic, self.tau)
        return {"critic/loss": loss.detach(), "critic/q": target.mean()}

    def improve(self, batch: Batch) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.model.parameters(), self.model_adam)
        descend(self.alpha.log * (metrics["entropy"] + self.density.dim), self.alpha.parameters(), self.alpha_adam)
        return {f"actor/{name}": value for name, value in metrics.items()} | {"temperature": self.alpha().detach()}
