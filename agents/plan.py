"""Model predictive control: at every step a plan is made through the dynamics, and its first action is played.

f = minus the return of a plan · Y = box^H · p(x) = states met in play · y_theta = any model, such as steps of the
cross-entropy method from the plan before · L = none: nothing is amortized. H actions in a plan · n = dim of an action
"""

import torch
from torch import Tensor

from rlamort import parts
from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.config import Fixed, Fraction, Size, Widths
from rlamort.domain import unit_box
from rlamort.dynamics import Trajectory
from rlamort.env import Spec
from rlamort.objective import Metrics
from rlamort.source import Batch


class MPC(Agent):
    """A planner. It remembers its plan, moved on by one action of which the last is repeated: its model may begin there.

    Args:
        spec: sizes, action bounds, and the equations of the environment, where they are known.
        model: makes the plan. Its context is the state and the plan before, where init=previous begins.
        dynamics: what follows an action; own takes the environment's equations.
        horizon: actions in a plan.
        hidden: widths of the hidden layers of networks that do not say otherwise.
        discount: per step.
    """

    of_environment = True

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Unroll(parts.Previous(), parts.Cem(sigma=0.5), keep_best=True),
        dynamics: parts.Dynamics = parts.Own(),
        horizon: Fixed[Size] = 20,
        hidden: Fixed[Widths] = (256, 256),
        discount: Fraction = 0.99,
    ) -> None:
        super().__init__(spec, normalise=False)
        self.n, self.plans = self.domain.dim, unit_box(horizon * self.domain.dim)
        self.dynamics = dynamics(spec)
        self.f = Trajectory(self.dynamics, horizon, discount)
        self.model = model(parts.Setting(self.plans, spec.x_dim + self.plans.dim, hidden, previous=True))

    def start(self, count: int) -> Carry:
        return (torch.zeros(count, self.plans.dim, device=self.device),)

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        plan = self.acting(torch.cat([x, *h], -1), self.f.oracle(x))  # (N, H n)
        return plan[:, : self.n], (torch.cat([plan[:, self.n :], plan[:, -self.n :]], -1),)

    def evaluate(self, batch: Batch) -> Metrics:
        return {}  # f is known

    def improve(self, batch: Batch) -> Metrics:
        return {}
