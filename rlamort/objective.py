"""f, the cost that a model amortizes: lower is better, one number per context.

x context (B, d) · y solution (B, n) · lam density parameters · f cost (B,) · alpha temperature
"""

import math

import torch
from torch import Tensor, nn

from rlamort.critic import Critic
from rlamort.domain import Density

Metrics = dict[str, Tensor]


class Objective:
    """f : Y x X -> R^B. An objective owns nothing that learns; whoever calls `descend` says what moves."""

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, n), x (B, d) -> f(y; x) (B,)."""
        return self.report(y, x)[0]

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        """f(y; x) (B,), and what is worth knowing of it as detached 0-d tensors."""
        raise NotImplementedError


class MaxQ(Objective):
    """f(y; x) = -(mean_i Q_i(x, y) - beta std_i Q_i(x, y)), the max-Q problem of an ensemble of critics.

    std is the population's: beta = 1 over two critics is exactly -min(Q_1, Q_2) (Fujimoto et al., 2018, eq. 10).

    Args:
        critic: Q_1..Q_E.
        beta: pessimism.
        members: how many of the ensemble, from the first, take part; None for all.
    """

    def __init__(self, critic: Critic, beta: float = 1.0, members: int | None = None) -> None:
        self.critic, self.beta, self.members = critic, beta, members

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        q = self.critic(x, y, self.members)  # (E, B)
        return self.beta * q.std(0, correction=0) - q.mean(0), {}


class Temperature(nn.Module):
    """alpha > 0, held as its logarithm so that no gradient step can make it negative.

    Args:
        alpha: initial value; 0 is allowed, and then it stays.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(alpha) if alpha > 0 else -math.inf))

    def forward(self) -> Tensor:
        return self.log.exp()


class Soft(Objective):
    """f(lam; x) = E_{y ~ q(.; lam)}[f(y; x) + alpha log q(y; lam)], estimated by one reparameterised draw.

    With f = -Q this is SAC's actor loss (Haarnoja et al., 2018b, eq. 7), with alpha = 0 that of SVG(0), and with
    f = -log p(x, y) and alpha = 1 it is -ELBO (tutorial, eqs. 31 and 75).

    Args:
        f: the objective of a single solution.
        density: q.
        alpha: temperature; what is passed is shared, not copied.
    """

    def __init__(self, f: Objective, density: Density, alpha: Temperature) -> None:
        self.f, self.density, self.alpha = f, density, alpha

    def report(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        y, logq = self.density.sample(lam)
        cost, metrics = self.f.report(y, x)
        # the temperature is a price here, not a variable: whoever minimises f must not move it
        return cost + self.alpha().detach() * logq, metrics | {"entropy": -logq.detach().mean()}
