"""Model predictive control: at every step a plan is optimised through the dynamics, and its first action is taken.

f = minus the return of a plan · Y = box^H · p(x) = visited states · y_theta = any model, such as steps of the
cross-entropy method from the previous plan · L = none: nothing is amortized. With a learned ensemble of dynamics it is PETS
(Chua et al., 2018, algorithm 1), as configs/method/pets.yaml says. H actions in a plan · n = dim of an action

PETS plays the mean of the elites, whose variance is smoothed, and not the best sample, which is the one that the model flatters
most. From its released code some things differ. Samples are of the normal conditioned on the box, in place of one cut at two
standard deviations that are narrowed near the bounds. A plan that moves on repeats its last action, in place of a zero. The
cost that draws the bounds of variances together is a mean over coordinates, and weights do not decay. Members are followed by
their means unless `dynamics.particles` says otherwise, and rewards are learned, too, unless `dynamics.rewards=own`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlamort import parts
from rlamort.adjoint import Carry
from rlamort.agent import Adam, Agent
from rlamort.config import Fixed, Fraction, Positive, Size, Whole, Widths
from rlamort.domain import unit_box
from rlamort.dynamics import Trajectory
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.fits.dynamics import Refits
from rlamort.host.graphs import Recorded
from rlamort.model import Model
from rlamort.objective import Metrics, Objective
from rlamort.source import Replay


class MPC(Agent):
    """A planner. Its state is the previous plan, shifted by one action with the last repeated, for a warm start, and likewise
    the elites that a solver such as Icem keeps from plan to plan.

    Args:
        spec: sizes, action bounds, and the environment's equations, if they are known.
        model: of the plan. Its context is the state and the previous plan, from which init=previous starts.
        dynamics: the transition model; own takes the environment's equations, simulator its MuJoCo model, ensemble is learned
            from transitions.
        horizon: actions in a plan.
        hidden: widths of hidden layers, unless a part sets its own.
        discount: per step.
        fit_every: environment steps between fits of learned dynamics to all transitions; 0 for known dynamics.
        fit_epochs: epochs in a fit.
        fit_batch_size: transitions in a step of a fit, sampled independently for every member of an ensemble.
        fit_hold_out: every so-many-th episode is held out from fits, to measure them on; 0 holds out none.
        learning_rate: Adam's step size in fits.
    """

    needs_fit = True

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Unroll(parts.Previous(), parts.Cem(sigma=0.5), keep_best=True),
        dynamics: parts.Dynamics = parts.Own(),
        horizon: Fixed[Size] = 20,
        hidden: Fixed[Widths] = (128, 128),
        discount: Fraction = 0.99,
        fit_every: Whole = 0,
        fit_epochs: Size = 20,
        fit_batch_size: Size = 64,
        fit_hold_out: Whole = 10,
        learning_rate: Positive = 1e-3,
    ) -> None:
        super().__init__(spec, normalise=False)
        require_within(horizon, spec)
        self.n, self.plans = self.domain.dim, unit_box(horizon * self.domain.dim)
        self.dynamics = dynamics(spec, hidden)
        self.adam = Adam(self.dynamics.parameters(), learning_rate)
        self.fits = Refits(self.dynamics, self.adam, fit_every, fit_epochs, fit_batch_size, fit_hold_out)
        self.fit_every, self.fit_least = fit_every, self.fits.least
        self.f = Trajectory(self.dynamics, horizon, discount)
        self.model = model(parts.Setting(self.plans, spec.x_dim + self.plans.dim, hidden, horizon=horizon))
        self.plans_of = Recorded(self.planned, "plans")
        if not self.dynamics.differentiable:
            with torch.random.fork_rng(devices=[]):  # a model that asks for gradients says so before any work starts
                self.act(torch.zeros(1, spec.x_dim), explore=True)

    def start(self, count: int) -> Carry:
        return blank(self.model, self.plans.dim, count, self.device)

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        plans = self.plans_of(x, *h)
        moved = tuple(torch.cat([part[..., self.n :], part[..., -self.n :]], -1) for part in plans)
        return plans[0][:, : self.n], moved

    def planned(self, x: Tensor, *h: Tensor) -> tuple[Tensor, ...]:
        """The plan (N, H n), and what else its model keeps."""
        return planned(self.acting, self.f, x, h)

    def fit(self, source: Replay) -> Metrics:
        return self.fits(source, self.f.horizon)

    def notice(self, recorded: Mapping[str, Any]) -> None:
        self.fits.notice(recorded)

    def update_from(self, sample: object, improve: bool) -> Metrics:
        return {}  # f is known, or learned in fits, and nothing is amortized


def require_within(horizon: int, spec: Spec) -> None:
    """Raises UserError if plans are longer than episodes."""
    if spec.longest is not None and horizon > spec.longest:
        raise UserError(f"horizon={horizon}: an episode has {spec.longest} steps at most, so a plan needs no more")


def blank(model: Model, dim: int, count: int, device: torch.device) -> Carry:
    """What a planner remembers where episodes begin: a solution of zeros (N, m), and (N, k, m) where its model keeps k more."""
    shapes = [(count,), *([(count, model.keeps)] if model.keeps else [])]
    return tuple(torch.zeros(*shape, dim, device=device) for shape in shapes)


def planned(model: Model, f: Objective, x: Tensor, h: Carry) -> tuple[Tensor, ...]:
    """The solution (N, m) for x (N, d), begun from the one of the step before, and what the model keeps (N, k, m)."""
    before, *kept = h
    return model.resumed(torch.cat([x, before], -1), f.oracle(x), *kept)
