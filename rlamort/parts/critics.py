"""Ensembles of Q functions, as a part."""

from dataclasses import dataclass
from typing import Literal

from rlamort.config import Fixed, Part, Size, Widths
from rlamort.critic import Critic
from rlamort.nets import FLOAT32, NORMS, Arithmetic


@dataclass(frozen=True)
class Critics(Part):
    """An ensemble of Q functions.

    Args:
        members: size of the ensemble.
        outputs: outputs per member: 1, or the number of quantiles of a distributional critic.
        norm: layer for layer normalisation before every ReLU (Ball et al., 2023); none for no normalisation.
        hidden: widths of the hidden layers; null takes the method's.
    """

    members: Fixed[Size] = 2
    outputs: Fixed[Size] = 1
    norm: Fixed[Literal["none", "layer"]] = "none"
    hidden: Fixed[Widths | None] = None

    def __call__(self, x_dim: int, y_dim: int, hidden: Widths, arithmetic: Arithmetic = FLOAT32) -> Critic:
        widths = hidden if self.hidden is None else self.hidden
        return Critic(x_dim, y_dim, widths, self.members, NORMS[self.norm], arithmetic, self.outputs)
