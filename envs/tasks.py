"""Meta-learning: the solution of a task is a network fitted to it.

B tasks · S samples of a task · y parameters of a network (B, p)
"""

import math

import torch
from torch import Tensor

from rlamort.config import Count, Widths
from rlamort.domain import Weights
from rlamort.nets import mlp
from rlamort.problem import Problem


class Sinusoids(Problem[dict[str, Tensor]]):
    """Regression on sine waves from few samples (Finn et al., 2017, section 5.1).

    A task is a sin(t - phase) with an amplitude a in [0.1, 5] and a phase in [0, pi], t in [-5, 5]. Solvers use its support
    set; the cost is the error on its query set, which is hidden.

    Args:
        shots: samples of the support set.
        queries: samples of the query set.
        hidden_widths: hidden layers of the fitted network.
    """

    hidden = ("query_inputs", "query_targets")

    def __init__(self, shots: Count = 5, queries: Count = 10, hidden_widths: Widths = (40, 40)) -> None:
        super().__init__()
        self.shots, self.queries = shots, queries
        self.domain = Weights(mlp(1, hidden_widths, 1))

    def contexts(self, count: int) -> dict[str, Tensor]:
        amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1)
        phase = math.pi * torch.rand(count, 1, 1)
        inputs = 10 * torch.rand(count, self.shots + self.queries, 1) - 5
        targets = amplitude * (inputs - phase).sin()
        s = self.shots
        return {
            "support_inputs": inputs[:, :s], "support_targets": targets[:, :s],
            "query_inputs": inputs[:, s:], "query_targets": targets[:, s:],
        }  # fmt: skip

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.error(y, x, "query")

    def support(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.error(y, x, "support")

    def error(self, y: Tensor, x: dict[str, Tensor], which: str) -> Tensor:
        """The mean squared error (B,) on the support or the query set."""
        assert isinstance(self.domain, Weights)
        found = self.domain.apply(y, x[f"{which}_inputs"])
        return (found - x[f"{which}_targets"]).square().mean((1, 2))
