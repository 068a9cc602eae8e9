"""SAC: soft actor-critic with automatic temperature (Haarnoja et al., 2018b, algorithm 1).

f = Soft(-min Q, alpha) · Y = squashed Gaussian · p(x) = replay · y_theta = any model · L = any loss. With recurrent steps from
the prior and the loss over all iterates it is IAPO (Marino et al., 2021), as configs/method/iapo.yaml says.
"""

from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, Fraction, NonNegative, Positive, Widths
from rlamort.critic import Critic, frozen_copy, polyak
from rlamort.domain import SquashedGaussian
from rlamort.env import Spec
from rlamort.losses import td_target
from rlamort.nets import ARITHMETIC
from rlamort.objective import MaxQ, Metrics, Soft, Temperature
from rlamort.source import Batch


class SAC(Agent):
    """A stochastic policy on the soft max-Q problem of an ensemble of critics.

    Args:
        spec: sizes and action bounds.
        model: of the policy; it predicts the parameters of its density.
        loss: of the policy.
        critic: the ensemble of Q functions.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size for the policy and the temperature.
        critic_learning_rate: the critics'; null takes learning_rate.
        discount: per step.
        tau: Polyak averaging: weight of the online critics in every update of their targets.
        pessimism: beta in mean - beta std over the ensemble; 1 over two critics is their minimum.
        temperature: initial alpha, the weight of the entropy bonus, per nat.
        target_entropy: target of the automatic temperature, in nats on [-1, 1]^n; null takes -n.
        normalise: normalise observations by running statistics.
        matmul: precision of the networks' matrix products; weights, losses and optimisers are float32 with any. tf32 needs a
            GPU of compute capability 8.0 or newer.
    """

    renamed = MappingProxyType({"critics": "critic.members", "critic_norm": "critic.norm"})

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        loss: parts.Loss = parts.Objective(),
        critic: parts.Critics = parts.Critics(),
        hidden: Fixed[Widths] = (256, 256),
        learning_rate: Positive = 3e-4,
        critic_learning_rate: Positive | None = None,
        discount: Fraction = 0.99,
        tau: Fraction = 0.005,
        pessimism: NonNegative = 1.0,
        temperature: Positive = 1.0,
        target_entropy: float | None = None,
        normalise: Fixed[bool] = False,
        matmul: Literal["float32", "tf32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__(spec, normalise=normalise)
        arithmetic = ARITHMETIC[matmul]
        self.tau = tau
        self.density = SquashedGaussian(self.domain.dim)
        self.target_entropy = -float(self.density.dim) if target_entropy is None else target_entropy

        def new_critic() -> Critic:
            return critic(spec.x_dim, self.domain.dim, hidden, arithmetic)

        setting = parts.Setting(self.density.parameters, spec.x_dim, hidden, arithmetic)
        loss.require_trained(model)
        self.model, self.loss = model(setting), loss(setting)
        self.critic = new_critic()
        self.target_critic = frozen_copy(self.critic, new_critic())
        self.alpha = Temperature(temperature)
        self.f = Soft(MaxQ(self.critic, pessimism), self.density, self.alpha)
        self.target_f = Soft(MaxQ(self.target_critic, pessimism), self.density, self.alpha)
        self.model_adam = Adam(self.model.parameters(), learning_rate)
        self.critic_adam = Adam(self.critic.parameters(), critic_learning_rate or learning_rate)
        self.alpha_adam = Adam(self.alpha.parameters(), learning_rate)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        x = self.normaliser(x)
        lam = self.model(x, self.f.oracle(x) if explore else self.f.deterministic_oracle(x))
        return self.density.draw(lam) if explore else self.density.median(lam)

    def evaluate(self, batch: Batch) -> Metrics:
        with torch.no_grad():  # V(x') = -f(lam; x'): the critics' target is the value of the problem the actor solves
            lam = self.model(batch.x_next, self.f.oracle(batch.x_next))
            target = td_target(batch, -self.target_f(lam, batch.x_next))
        q = self.critic(batch.x, batch.y)  # (E, B)
        loss = 0.5 * (q - target).square().mean(-1).sum()
        descend(loss, self.critic.parameters(), self.critic_adam)
        polyak(self.target_critic, self.critic, self.tau)
        return {"critic/loss": loss.detach(), "critic/q": q.detach().mean()}

    def improve(self, batch: Batch) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.model.parameters(), self.model_adam)
        # entropy above its target makes alpha fall, in log space so that it stays positive
        alpha_loss = self.alpha.log * (metrics["entropy"] - self.target_entropy)
        descend(alpha_loss, self.alpha.parameters(), self.alpha_adam)
        return {f"actor/{name}": value for name, value in metrics.items()} | {"temperature": self.alpha().detach()}
