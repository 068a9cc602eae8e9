"""PILCO: policy search in a model of Gaussian processes, from few episodes (Deisenroth and Rasmussen, 2011, algorithm 1).

f = minus the return of an episode that the model expects · Y = box · p(x) = starts of episodes · y_theta = radial policy, or
any model without queries · L = objective. Uncertainty is followed by particles, as in MC-PILCO (Amadio et al., 2022), or by
moments in closed form. d = x_dim
"""

import functools

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, Fraction, NonNegative, Positive, Size, Widths
from rlamort.dynamics import Motion
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.fits.gaussian_process import Fits
from rlamort.objective import Metrics, nothing
from rlamort.radial import Sine
from rlamort.source import Contexts, Replay


class PILCO(Agent):
    """A policy that is improved in its model alone, to the end, after every episode.

    Args:
        spec: sizes and action bounds.
        model: of the policy.
        loss: of the policy.
        dynamics: the model: gp is learned, own takes the environment's equations.
        propagation: of uncertainty through the model: particles, or moments in closed form.
        horizon: steps of the model; null takes those of an episode.
        discount: per step.
        hidden: widths of hidden layers, of a model with networks that does not set its own.
        fit_every: environment steps between fits; null takes those of an episode.
        fit_steps: gradient steps of the model in a fit.
        fit_rate: Adam's step size in them.
        policy_steps: gradient steps of the policy in a fit.
        learning_rate: Adam's step size in them, which falls to zero along half a cosine in each fit.
        particles: starts in such a step.
        deviation: of the normal noise in every coordinate that is added to the starts that were met, in radians for angles.
    """

    needs_fit = True

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Radial(),
        loss: parts.Loss = parts.Objective(),
        dynamics: parts.Dynamics = parts.GaussianProcess(),
        propagation: parts.Propagation = parts.Particles(),
        horizon: Size | None = None,
        discount: Fraction = 0.99,
        hidden: Fixed[Widths] = (64, 64),
        fit_every: Size | None = None,
        fit_steps: Size = 100,
        fit_rate: Positive = 0.05,
        policy_steps: Size = 250,
        learning_rate: Positive = 0.02,
        particles: Size = 30,
        deviation: NonNegative = 0.1,
    ) -> None:
        super().__init__(spec, normalise=False)
        self.fit_every, horizon = self._episode("fit_every", fit_every), self._episode("horizon", horizon)
        self.policy_steps, self.particles, self.deviation = policy_steps, particles, deviation
        setting = parts.Setting(self.domain, spec.x_dim, hidden)
        loss.require_trained(model)
        self.model, self.loss = model(setting), loss(setting)
        self.dynamics = dynamics(spec, hidden)
        self.fits = Fits(self.dynamics, fit_steps, fit_rate)
        self.fit_least = self.fits.least
        self.motion = Motion(spec.x_dim) if self.fits.learner is None else self.fits.learner.motion
        self.f = propagation(self.dynamics, self.model, horizon, discount)
        self.new_adam = functools.partial(Adam, learning_rate=learning_rate, horizon=policy_steps)
        self.adam = self.new_adam(self.model.parameters())

    def _episode(self, field: str, given: int | None) -> int:
        steps = self.spec.longest if given is None else given
        if steps is None:
            raise UserError(
                f"{field}: null takes the steps of an episode, and this environment has no limit; a number is needed"
            )
        return steps

    def act(self, x: Tensor, explore: bool) -> Tensor:
        y: Tensor = self.model(x, nothing(x))
        return y

    def fit(self, source: Replay) -> Metrics:
        metrics = self.fits(source)  # the model, to all transitions
        if isinstance(self.model, Sine):
            self.model.net.place(source.everything().x, source.begun(), self.motion.circle(source.device))
        self.adam = self.new_adam(self.model.parameters()).to(self.device)  # another model, another objective
        for _ in range(self.policy_steps):
            loss, found = self.loss(self.model, self.f, self.starts(source))
            descend(loss, self.model.parameters(), self.adam)
            metrics |= {f"actor/{name}": value for name, value in found.items()}
        return metrics

    def starts(self, source: Replay) -> Contexts:
        """Starts of episodes that were met, with noise."""
        met = source.begun()
        x = met[torch.randint(len(met), (self.particles,), device=met.device)]
        noise = self.deviation * torch.randn(self.particles, self.motion.outputs, dtype=x.dtype, device=x.device)
        return Contexts(self.motion.after(x, noise))

    def update_from(self, sample: object, improve: bool) -> Metrics:
        return {}  # all is learned in fits
