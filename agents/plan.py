"""Model predictive control: at every step a plan is optimised through the dynamics, and its first action is taken.

f = minus the return of a plan · Y = box^H · p(x) = visited states · y_theta = any model, such as steps of the
cross-entropy method from the previous plan · L = none: nothing is amortized. With a learned ensemble of dynamics it is PETS
(Chua et al., 2018, algorithm 1), as configs/method/pets.yaml says. H actions in a plan · n = dim of an action
"""

import torch
from torch import Tensor

from rlamort import parts
from rlamort.adjoint import Carry
from rlamort.agent import Adam, Agent
from rlamort.config import Fixed, Fraction, Positive, Size, Whole, Widths
from rlamort.domain import unit_box
from rlamort.dynamics import Ensemble, Trajectory
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.fits.dynamics import fit, measured, require_fits
from rlamort.objective import Metrics
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
        learning_rate: Positive = 1e-3,
    ) -> None:
        super().__init__(spec, normalise=False)
        if spec.longest is not None and horizon > spec.longest:
            raise UserError(f"horizon={horizon}: an episode has {spec.longest} steps at most, so a plan needs no more")
        self.n, self.plans = self.domain.dim, unit_box(horizon * self.domain.dim)
        self.dynamics = dynamics(spec, hidden)
        require_fits(self.dynamics, fit_every)
        self.fit_every, self.fit_epochs, self.fit_batch_size = fit_every, fit_epochs, fit_batch_size
        self.f = Trajectory(self.dynamics, horizon, discount)
        self.model = model(parts.Setting(self.plans, spec.x_dim + self.plans.dim, hidden, horizon=horizon))
        if not self.dynamics.differentiable:
            with torch.random.fork_rng(devices=[]):  # a model that asks for gradients says so before any work starts
                self.act(torch.zeros(1, spec.x_dim), explore=True)
        self.adam = Adam(self.dynamics.parameters(), learning_rate)

    def start(self, count: int) -> Carry:
        shapes = [(count,), *([(count, self.model.keeps)] if self.model.keeps else [])]
        return tuple(torch.zeros(*shape, self.plans.dim, device=self.device) for shape in shapes)

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        before, *kept = h
        plans = self.acting.resumed(torch.cat([x, before], -1), self.f.oracle(x), *kept)  # (N, H n), and (N, k, H n)
        moved = tuple(torch.cat([part[..., self.n :], part[..., -self.n :]], -1) for part in plans)
        return plans[0][:, : self.n], moved

    def fit(self, source: Replay) -> Metrics:
        assert isinstance(self.dynamics, Ensemble), "or fit_every is 0"
        metrics = measured(self.dynamics, source, self.f.horizon, self.fit_every // source.rows)
        return metrics | fit(self.dynamics, self.adam, source.everything(), self.fit_epochs, self.fit_batch_size)

    def update_from(self, sample: object, improve: bool) -> Metrics:
        return {}  # f is known, or learned in fits, and nothing is amortized
