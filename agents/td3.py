"""TD3: twin delayed deep deterministic policy gradient (Fujimoto, van Hoof and Meger, 2018, algorithm 1).

f = -Q_1 · Y = box · p(x) = replay · y_theta = any model · L = any loss. With one critic, no smoothing and no delay it is
DDPG (Lillicrap et al., 2016), as configs/method/ddpg.yaml says.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Count, Decay, Fixed, Fraction, NonNegative, Positive, Widths
from rlamort.critic import Critic, frozen_copy, polyak
from rlamort.env import Spec
from rlamort.losses import td_target
from rlamort.model import Model
from rlamort.nets import ARITHMETIC, WEIGHTS
from rlamort.norm import copy_statistics
from rlamort.objective import MaxQ, Metrics
from rlamort.source import Batch

PESSIMISM = 1.0  # of targets: the minimum of two


class TD3(Agent):
    """A deterministic policy on the max-Q problem of the first critic; targets are the minimum of two (clipped double Q).

    Args:
        spec: sizes and action bounds.
        model: of the policy.
        loss: of the policy.
        critic: the ensemble of Q functions; targets are the minimum of two.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size for the policy.
        critic_learning_rate: the critics'; null takes learning_rate.
        adam_beta1: decay of Adam's first moment.
        weights: unit keeps the incoming weights of every unit of policy and critics at length one, by projection after every
            step (Palenicek et al., 2025: XQC); free does not.
        discount: per step.
        tau: Polyak averaging: weight of the online network in every update of a target.
        exploration_noise: standard deviation of exploration noise, in units of half the action range.
        smoothing_noise: standard deviation of the noise on target actions (target policy smoothing), in the same units.
        smoothing_clip: bound of that noise.
        actor_delay: critic updates per update of policy and targets.
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
        learning_rate: Positive = 1e-3,
        critic_learning_rate: Positive | None = None,
        adam_beta1: Decay = 0.9,
        weights: Fixed[Literal["free", "unit"]] = "free",
        discount: Fraction = 0.99,
        tau: Fraction = 0.005,
        exploration_noise: NonNegative = 0.1,
        smoothing_noise: NonNegative = 0.2,
        smoothing_clip: NonNegative = 0.5,
        actor_delay: Count = 2,
        normalise: Fixed[bool] = False,
        matmul: Literal["float32", "tf32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__(spec, normalise=normalise)
        arithmetic, project = ARITHMETIC[matmul], WEIGHTS[weights]
        self.tau, self.improve_every = tau, actor_delay
        self.exploration_noise, self.smoothing_noise, self.smoothing_clip = (
            exploration_noise, smoothing_noise, smoothing_clip,
        )  # fmt: skip

        def new_critic() -> Critic:
            return critic(spec.x_dim, self.domain.dim, hidden, arithmetic)

        setting = parts.Setting(self.domain, spec.x_dim, hidden, arithmetic)
        loss.require_trained(model)
        self.model, self.loss, self.critic = model(setting), loss(setting), new_critic()
        self.critic.head.require(PESSIMISM)
        self.project, project_critic = project(self.model), project(self.critic)
        self.target_model: Model = frozen_copy(self.model, model(setting))
        self.target_critic = critic.target(self.critic, new_critic, tau, project_critic)
        self.f = MaxQ(self.critic, beta=0.0, members=1)
        self.target_f = MaxQ(self.target_critic, PESSIMISM)
        critic_rate, decay = critic_learning_rate or learning_rate, (adam_beta1, 0.999)
        self.model_adam = Adam(self.model.parameters(), learning_rate, decay, project=self.project)
        self.critic_adam = Adam(self.critic.parameters(), critic_rate, decay, project=project_critic)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        x = self.normaliser(x)
        y: Tensor = self.model(x, self.f.oracle(x))
        return (y + self.exploration_noise * torch.randn_like(y)).clamp(-1, 1) if explore else y

    def evaluate(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            y_next = self.target_model(batch.x_next, self.target_f.oracle(batch.x_next))
            noise = self.smoothing_noise * torch.randn_like(y_next)  # one draw per sample and coordinate
            y_next = (y_next + noise.clamp(-self.smoothing_clip, self.smoothing_clip)).clamp(-1, 1)
        head = self.critic.head
        q, q_next = self.target_critic.both(batch.x, batch.y, batch.x_next, y_next)  # (E, B, O)
        loss = 2 * head.loss(q, head.target(q_next, lambda value: td_target(batch, value), PESSIMISM))  # errors without a half
        descend(loss, self.critic.parameters(), self.critic_adam)
        return {"critic/loss": loss.detach(), "critic/q": head.q(q.detach()).mean(), **head.metrics()}

    def improve(self, batch: Batch) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.model.parameters(), self.model_adam)
        self.target_critic.follow()
        polyak(self.target_model, self.model, self.tau)
        self.project(list(self.target_model.parameters()))
        copy_statistics(self.target_model, self.model)
        return {f"actor/{name}": value for name, value in metrics.items()}

    def notice(self, recorded: Mapping[str, Any]) -> None:
        self.critic.head.notice(recorded)
