"""Adam."""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.config import Positive
from rlamort.objective import Oracle
from rlamort.update.base import Update


class Adam(Update):
    """Adam (Kingma and Ba, 2015, algorithm 1) per item, with the step size rate / (1 + t / 50).

    Args:
        rate: initial step size.
        decay: beta_1 and beta_2, of the moments.
    """

    def __init__(self, rate: Positive, decay: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__()
        self.rate, self.decay = rate, decay

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return torch.zeros_like(y), torch.zeros_like(y), y.new_zeros(len(y), 1)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        mean, square, steps = h
        slope, (first, second) = oracle.grad(y), self.decay
        mean, square, steps = mean.lerp(slope, 1 - first), square.lerp(slope.square(), 1 - second), steps + 1
        direction = (mean / (1 - first**steps)) / ((square / (1 - second**steps)).sqrt() + 1e-8)
        return y - self.rate / (1 + steps / 50) * direction, (mean, square, steps)
