"""POPLIN: planning around a policy, which learns what was planned (Wang and Ba, 2020).

f = minus the return of a perturbed policy, through learned dynamics · Y = perturbations, of actions (POPLIN-A) or of the
policy's weights (POPLIN-P) · p(x) = visited states · y_theta = a solver's steps from the previous perturbation · L = regress on
the actions that were planned. No steps are the policy itself, and more are more planning. H steps · m = dim of a perturbation

Some things differ from the paper's released code. Its regression takes rows of the whole data set by numbers that were drawn
for the part to train on, so that rows held out are trained on, and the last fifth of all never is; here both are shuffled. Its
averaging of perturbations, which replaces the weights by the mean perturbation and forgets what it was added to, is left out.
Actions from before the first fit, which are random, are no part of the regression. And the policy squashes its outputs into
the bounds by tanh, where there they are clipped. All `policy_epochs` are taken, where there errors on what is held out end a
regression; `policy_patience` does that here, and keeps the best weights besides.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from rlamort.agents.plan import blank, planned, require_within
from torch import Tensor

from rlamort import parts
from rlamort.adjoint import Carry
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, Fraction, Positive, Size, Whole, Widths
from rlamort.domain import Euclid
from rlamort.dynamics import Perturbed, Policy, Trajectory
from rlamort.env import Spec
from rlamort.fits.dynamics import Refits
from rlamort.host.graphs import Recorded
from rlamort.objective import Metrics
from rlamort.source import Replay

HELD_OUT = 0.1  # of what was planned: the regression's error there is recorded


class POPLIN(Agent):
    """A planner around a policy. Its state is the previous perturbation, moved on by one step.

    A fit changes what a perturbation is added to. Where it comes in the middle of an episode, and not at its end, the next plan
    begins at the old perturbation of the new policy.

    Args:
        spec: sizes, action bounds, and the environment's equations, if they are known.
        noise: what is perturbed: init or replan, the actions of a policy that is rolled out once or asked anew on the way;
            uniform or separate, its weights, once for the whole plan or in each step.
        model: of the perturbation. Its context is the state and the previous perturbation.
        dynamics: the transition model: ensemble is learned from transitions, own takes the environment's equations.
        horizon: steps of a plan.
        hidden: widths of hidden layers of the dynamics, unless the part sets its own.
        policy_hidden: widths of the policy's hidden layers.
        discount: per step.
        fit_every: environment steps between fits of dynamics and policy to all transitions.
        fit_epochs: epochs in a fit of the dynamics.
        fit_batch_size: transitions in a step of a fit of either.
        fit_hold_out: every so-many-th episode is held out from fits of the dynamics, to measure them on; 0 holds out none.
        learning_rate: Adam's step size for the dynamics.
        policy_epochs: epochs in a fit of the policy, at most.
        policy_patience: epochs without a smaller error on the held-out tenth after which a fit of the policy ends, which then
            keeps the weights of the smallest; 0 takes all epochs, and the last weights.
        policy_learning_rate: Adam's step size for the policy.
    """

    needs_fit = True
    random: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        noise: parts.Noise = parts.Uniform(),
        model: parts.Model = parts.Unroll(parts.Previous(), parts.Cem(100, 10, 0.3, 0.1, power=2)),
        dynamics: parts.Dynamics = parts.Ensemble(),
        horizon: Fixed[Size] = 20,
        hidden: Fixed[Widths] = (128, 128),
        policy_hidden: Fixed[Widths] = (32,),
        discount: Fraction = 0.99,
        fit_every: Size = 200,
        fit_epochs: Size = 20,
        fit_batch_size: Size = 64,
        fit_hold_out: Whole = 10,
        learning_rate: Positive = 1e-3,
        policy_epochs: Size = 20,
        policy_patience: Whole = 0,
        policy_learning_rate: Positive = 3e-3,
    ) -> None:
        super().__init__(spec, normalise=False)
        require_within(horizon, spec)
        self.fit_every, self.fit_batch_size = fit_every, fit_batch_size
        self.policy_epochs, self.policy_patience = policy_epochs, policy_patience
        self.dynamics = dynamics(spec, hidden)
        learned = fit_every if self.dynamics.learned else 0
        self.adam = Adam(self.dynamics.parameters(), learning_rate)
        self.fits = Refits(self.dynamics, self.adam, learned, fit_epochs, fit_batch_size, fit_hold_out)
        self.fit_least = self.fits.least
        self.policy = Policy(spec.x_dim, self.domain, policy_hidden)
        self.policy_adam = Adam(self.policy.parameters(), policy_learning_rate)
        trajectory = Trajectory(self.dynamics, horizon, discount)
        self.noise = noise(self.policy, trajectory)
        self.f = Perturbed(spec.x_dim, self.noise, trajectory)
        space = Euclid(self.noise.dim)
        self.model = model(parts.Setting(space, spec.x_dim + space.dim, hidden, horizon=self.noise.steps))
        self.plans_of = Recorded(self.planned, "plans")
        self.register_buffer("random", torch.full((), -1, dtype=torch.int64))  # transitions before the first fit; -1: not yet

    def start(self, count: int) -> Carry:
        return blank(self.model, self.noise.dim, count, self.device)

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        omega = self.plans_of(x, *h)  # (N, m), and (N, k, m)
        act = self.noise.rule(omega[0], self.noise.reference(x))
        return act(0, x), tuple(self.noise.moved(part) for part in omega)

    def planned(self, x: Tensor, *h: Tensor) -> tuple[Tensor, ...]:
        """The perturbation (N, m), and what else its model keeps."""
        return planned(self.acting, self.f, x, h)

    def fit(self, source: Replay) -> Metrics:
        return self.fits(source, self.f.trajectory.horizon) | self.distil(source)

    def distil(self, source: Replay) -> Metrics:
        """Regress the policy on all actions that were planned."""
        batch = source.everything(n_step=1)
        self.policy.standardise(batch.x)
        if self.random < 0:
            self.random.fill_(source.collected)
        chosen = source.later(int(self.random))  # (B,) bool
        x, y = batch.x[chosen], batch.y[chosen]
        order = torch.randperm(len(x), device=x.device)
        held, learned = order.tensor_split([int(HELD_OUT * len(x))])
        losses: dict[str, Tensor] = {}
        least, best, epochs, stale = math.inf, self.policy.state_dict(), 0, 0
        for _ in range(self.policy_epochs if len(learned) else 0):
            for index in torch.split(learned[torch.randperm(len(learned), device=x.device)], self.fit_batch_size):
                loss = (self.policy(x[index]) - y[index]).square().mean()
                descend(loss, self.policy.parameters(), self.policy_adam)
            losses["policy/loss"] = loss.detach()
            if self.policy_patience and len(held):
                error, epochs, stale = float(self._error(x[held], y[held])), epochs + 1, stale + 1
                if error < least:
                    least, best, stale = error, copy.deepcopy(self.policy.state_dict()), 0
                if stale == self.policy_patience:
                    break
        if epochs:
            self.policy.load_state_dict(best)
            losses["policy/epochs"] = losses["policy/loss"].new_tensor(epochs)
        if len(held):
            losses["policy/held_out"] = self._error(x[held], y[held])
        return losses

    @torch.no_grad()
    def _error(self, x: Tensor, y: Tensor) -> Tensor:
        """The policy's mean squared error ()."""
        error: Tensor = (self.policy(x) - y).square().mean()
        return error

    def notice(self, recorded: Mapping[str, Any]) -> None:
        self.fits.notice(recorded)

    def update_from(self, sample: object, improve: bool) -> Metrics:
        return {}  # all is learned in fits
