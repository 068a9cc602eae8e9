"""Regression by a learned energy: the prediction is where the energy of a pair is least (Amos and Yarats, 2020, section 5.1).

x input (B, 1) · y prediction (B, 1) · E energy (B,), a network
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlamort.config import Widths
from rlamort.domain import Euclid
from rlamort.problem import Problem


class EnergyRegression(Problem[dict[str, Tensor]]):
    """The label of an input x, uniform on [0, 2 pi], is x sin(x); solvers ask for E(y; x), which is learned with them.

    The cost is the squared error of the prediction, and reads the label, which is hidden from solvers and networks.

    Args:
        widths: hidden layers of the energy, with SiLU after each, so that it has second derivatives.
    """

    domain = Euclid(1)
    hidden = ("label",)

    def __init__(self, widths: Widths = (64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in pairwise([2, *widths]):
            layers += [nn.Linear(i, o), nn.SiLU()]
        self.energy = nn.Sequential(*layers, nn.Linear(widths[-1], 1, bias=False))  # what is minimised has no offset

    def contexts(self, count: int) -> dict[str, Tensor]:
        x = 2 * math.pi * torch.rand(count, 1)
        return {"input": x, "label": x * x.sin()}

    def support(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        energy: Tensor = self.energy(torch.cat([x["input"], y], -1))
        return energy[:, 0]

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return (y - x["label"]).square().sum(-1)
