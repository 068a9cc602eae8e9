"""SVG(1) and SVG(inf): stochastic value gradients along transitions that were met (Heess et al., 2015, algorithms 2 and 1).

f = minus the value of a policy, along real transitions and with the derivatives of a model · Y = squashed Gaussian ·
p(x) = replay · y_theta = any model without queries · L = any loss. C sequences · H steps in one · d = x_dim
"""

import warnings

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, Fraction, Positive, Size, Whole, Widths
from rlamort.critic import Critic, NoTarget, TargetNetwork, frozen_copy
from rlamort.domain import Density, SquashedGaussian
from rlamort.dynamics import Retraced
from rlamort.env import Spec
from rlamort.fits.dynamics import Fits
from rlamort.model import Model
from rlamort.objective import Metrics, nothing
from rlamort.source import Batch, Contexts, Replay


class SVG1(Agent):
    """A stochastic policy on the value of its next step through a model, and a critic V of states.

    The paper keeps the action that was played, and weighs it by the ratio of the present policy's density to that which
    played it. A replay does not know the latter, so actions are drawn anew here, and the transition's noise alone is inferred.

    Args:
        spec: sizes and action bounds.
        model: of the policy; it predicts the parameters of its density.
        loss: of the policy.
        critic: V.
        dynamics: the model; own takes the environment's equations, ensemble is learned from transitions.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size for policy, critic and model.
        discount: per step.
        tau: Polyak averaging: weight of the online critic in every update of its target.
        fit_every: environment steps between fits of learned dynamics; 0 for known dynamics.
        fit_steps: gradient steps in a fit.
        fit_batch_size: transitions in a step of a fit, sampled independently for every member of an ensemble.
    """

    needs_fit = True

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        loss: parts.Loss = parts.Objective(),
        critic: parts.Critics = parts.Critics(members=1),
        dynamics: parts.Dynamics = parts.Ensemble(),
        hidden: Fixed[Widths] = (256, 256),
        learning_rate: Positive = 1e-3,
        discount: Fraction = 0.99,
        tau: Fraction = 0.005,
        fit_every: Whole = 200,
        fit_steps: Size = 200,
        fit_batch_size: Size = 256,
    ) -> None:
        super().__init__(spec, normalise=False)
        self.density, self.fit_every = SquashedGaussian(self.domain.dim), fit_every
        setting = parts.Setting(self.density.parameters, spec.x_dim, hidden)
        loss.require_trained(model)
        self.model, self.loss = model(setting), loss(setting)
        self.critic = critic(spec.x_dim, 0, hidden)
        self.target_critic = critic.target(self.critic, lambda: critic(spec.x_dim, 0, hidden), tau)
        self.dynamics = dynamics(spec, hidden)
        self.fits = Fits(self.dynamics, fit_every, fit_steps, fit_batch_size, learning_rate)
        self.fit_least = self.fits.least
        along = (spec.x_dim, self.density, self.dynamics, self.model, Fresh(self.density), discount)
        self.f, self.target_f = Retraced(*along, StateValue(self.critic)), Retraced(*along, StateValue(self.target_critic))
        self.model_adam = Adam(self.model.parameters(), learning_rate)
        self.critic_adam = Adam(self.critic.parameters(), learning_rate)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        lam = self.model(x, nothing(x))
        return self.density.draw(lam) if explore else self.density.median(lam)

    def fit(self, source: Replay) -> Metrics:
        return self.fits(source)  # the model, on all transitions

    def evaluate(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            target = -self.target_f(self.model(batch.x, nothing(batch.x)), self.f.posed(batch))  # r + gamma V'(x')
        v = StateValue(self.critic).members(batch.x)  # (E, B)
        loss = 0.5 * (v - target).square().mean(-1).sum()
        descend(loss, self.critic.parameters(), self.critic_adam)
        self.target_critic.follow()
        return {"critic/loss": loss.detach(), "critic/v": v.detach().mean()}

    def improve(self, batch: Batch) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, Contexts(self.f.posed(batch)))
        descend(loss, self.model.parameters(), self.model_adam)
        return {f"actor/{name}": value for name, value in metrics.items()}


class SVGInf(Agent):
    """A stochastic policy on the return of whole sequences, differentiated through a model; there is no critic.

    The noise of states and actions that were met is inferred, of actions by the policy that played them. So the first gradient
    step in a fit is along what happened, and the next ones are along what the present policy would have done with that noise.

    Args:
        spec: sizes and action bounds.
        model: of the policy; it predicts the parameters of its density.
        loss: of the policy.
        dynamics: the model; own takes the environment's equations, ensemble is learned from transitions.
        horizon: steps of a sequence, all of one episode; shorter episodes are not learned from.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size for policy and model.
        discount: per step.
        fit_every: environment steps between fits, which learn the model from all transitions, and the policy from those since.
        fit_steps: gradient steps of the model in a fit.
        fit_batch_size: transitions in such a step, sampled independently for every member of an ensemble.
        policy_steps: gradient steps of the policy in a fit.
        sequences: sequences in such a step.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        loss: parts.Loss = parts.Objective(),
        dynamics: parts.Dynamics = parts.Ensemble(),
        horizon: Size = 40,
        hidden: Fixed[Widths] = (256, 256),
        learning_rate: Positive = 1e-3,
        discount: Fraction = 0.99,
        fit_every: Size = 200,
        fit_steps: Size = 200,
        fit_batch_size: Size = 256,
        policy_steps: Size = 20,
        sequences: Size = 64,
    ) -> None:
        super().__init__(spec, normalise=False)
        self.density, self.fit_every, self.horizon = SquashedGaussian(self.domain.dim), fit_every, horizon
        self.policy_steps, self.sequences = policy_steps, sequences
        setting = parts.Setting(self.density.parameters, spec.x_dim, hidden)
        loss.require_trained(model)
        self.model, self.loss = model(setting), loss(setting)
        self.player = frozen_copy(self.model, model(setting))  # the policy since the last fit
        self.dynamics = dynamics(spec, hidden)
        learned = fit_every if self.dynamics.learned else 0
        self.fits = Fits(self.dynamics, learned, fit_steps, fit_batch_size, learning_rate)
        self.fit_least, self.fit_horizon, self.warned = self.fits.least, horizon, False
        along = (spec.x_dim, self.density, self.dynamics, self.model, Played(self.density, self.player), discount)
        self.f = Retraced(*along, worthless)
        self.model_adam = Adam(self.model.parameters(), learning_rate)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        lam = self.model(x, nothing(x))
        return self.density.draw(lam) if explore else self.density.median(lam)

    def fit(self, source: Replay) -> Metrics:
        metrics, latest = self.fits(source), self.fit_every // source.rows
        if (longest := source.longest(latest)) < self.horizon:
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"horizon={self.horizon}: of the latest {latest} steps of each environment at most {longest} are stored in "
                    "a row of one episode, so the policy learned nothing in a fit. It is not said again; a shorter "
                    "horizon, a larger fit_every or buffer_size, or longer episodes help",
                    stacklevel=2,
                )
            return metrics
        self.player.load_state_dict(self.model.state_dict())
        for _ in range(self.policy_steps):
            met = source.sequences(self.sequences, self.horizon, latest=latest)  # (C, H)
            loss, found = self.loss(self.model, self.f, Contexts(self.f.posed(met)))
            descend(loss, self.model.parameters(), self.model_adam)
            metrics |= {f"actor/{name}": value for name, value in found.items()}
        return metrics

    def update_from(self, sample: object, improve: bool) -> Metrics:
        return {}  # all is learned in fits


class Fresh:
    """Actions drawn anew, whatever was played.

    Args:
        density: of actions.
    """

    def __init__(self, density: Density) -> None:
        self.density = density

    def __call__(self, lam: Tensor, met: Tensor, played: Tensor) -> Tensor:
        """lam, a state that was met (B, d), and what was played there (B, n) -> actions (B, n)."""
        return self.density.draw(lam)


class Played(Fresh):
    """Actions as functions of lam with the noise of those that were played (Heess et al., 2015).

    Args:
        density: of actions.
        policy: that played. The present one in its place would take its own progress for noise, which shrinks the density.
    """

    def __init__(self, density: Density, policy: Model) -> None:
        super().__init__(density)
        self.policy = policy

    def __call__(self, lam: Tensor, met: Tensor, played: Tensor) -> Tensor:
        with torch.no_grad():
            noise = self.density.inferred(self.policy(met, nothing(met)), played)
        return self.density.draw(lam, noise)


class StateValue:
    """V(x) of critics without actions, the mean of their members.

    Args:
        critic: of x and an action of no coordinates.
    """

    def __init__(self, critic: Critic | NoTarget | TargetNetwork) -> None:
        self.critic = critic

    def members(self, x: Tensor) -> Tensor:
        """x (B, d) -> V of each member (E, B)."""
        q: Tensor = self.critic(x, x[:, :0])
        return q

    def __call__(self, x: Tensor) -> Tensor:
        return self.members(x).mean(0)


def worthless(x: Tensor) -> Tensor:
    """Zeros (B,): nothing follows a sequence."""
    return x.new_zeros(len(x))
