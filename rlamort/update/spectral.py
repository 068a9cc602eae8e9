"""Spectral projected gradient."""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.config import Count
from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update, push


class SpectralGradient(Update):
    """Spectral projected gradient: a projected gradient step with the Barzilai-Borwein step size.

    Birgin, Martinez and Raydan (2000), algorithm 2.1 (SPG1): trials are on the projection arc, so Y need not be convex, and
    acceptance is the nonmonotone rule of Grippo, Lampariello and Lucidi, against the worst of the last costs. A rejected trial
    is an iteration, too, at which the item stays. The step size comes from gradients alone, so rounding of the cost does not
    stop the descent before a certificate of 1e-4 holds in float32, as it stops FISTA's backtracking. An iteration is one
    evaluation of f and its gradient; its result is a projection onto Y.

    Args:
        domain: Y, onto which trials are projected.
        memory: M, costs of the nonmonotone rule.
    """

    def __init__(self, domain: Domain, memory: Count = 10) -> None:
        super().__init__()
        if memory < 1:
            raise UserError(f"update.memory: {memory} is given; at least 1 is needed")
        self.domain, self.memory = domain, memory

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """The gradient at y (B, n), the step size (B,), and the last costs (B, M), that of y last."""
        cost, slope = oracle.value_and_grad(y)
        slope = slope.where(slope.isfinite(), 0)  # that item stays, and no projection sees NaN
        step = 1 / (self.domain.at(x).nearest(y - slope) - y).abs().amax(-1).clamp(1e-8, 1e8)
        return slope, step, cost[:, None].repeat(1, self.memory)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        slope, step, recent = h
        trial = self.domain.at(x).nearest(y - step[:, None] * slope)
        trial_cost, trial_slope = oracle.value_and_grad(trial)
        move, turn = trial - y, trial_slope - slope
        length, curvature = move.square().sum(-1), (move * turn).sum(-1)
        worst = recent.amax(-1)
        rounding = 8 * torch.finfo(y.dtype).eps * worst.abs()
        accepted = trial_cost <= worst - 1e-4 * length / step + rounding  # False where NaN
        accepted = accepted & trial_slope.isfinite().all(-1)
        convex = curvature > 0
        spectral = torch.where(convex, length / torch.where(convex, curvature, 1), 2 * step)
        step = torch.where(accepted, spectral, step / 4).clamp(1e-12, 1e12)
        keep = accepted[:, None]
        recent = push(recent, trial_cost).where(keep, recent)
        return trial.where(keep, y), (trial_slope.where(keep, slope), step, recent)

    def value(self, y: Tensor, h: Carry, oracle: Oracle) -> Tensor:
        return h[2][:, -1]
