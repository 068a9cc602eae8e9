"""Q functions. E members · B batch"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlamort.nets import FLOAT32, Arithmetic, Ensemble, NoNorm

M = TypeVar("M", bound=nn.Module)


class Critic(nn.Module):
    """Q_1..Q_E : (x, y) -> expected discounted return, an ensemble of independent networks.

    Args:
        x_dim: coordinates of a state.
        y_dim: coordinates of an action.
        hidden: widths of the hidden layers.
        members: E.
        norm: between a hidden layer's product and its ReLU, as `rlamort.nets.Ensemble` takes it.
        arithmetic: of the products.
        outputs: outputs of each member, such as quantiles of the return; its Q is their mean.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int],
        members: int,
        norm: Callable[[int, int], nn.Module] = NoNorm,
        arithmetic: Arithmetic = FLOAT32,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.ensemble = Ensemble(members, x_dim + y_dim, hidden, outputs, norm, arithmetic)

    def forward(self, x: Tensor, y: Tensor, members: int | None = None) -> Tensor:
        """x (B, d), y (B, n) -> Q (members, B); None takes all members."""
        q = self.atoms(x, y, members)
        return q.squeeze(-1) if self.outputs == 1 else q.mean(-1)

    def atoms(self, x: Tensor, y: Tensor, members: int | None = None) -> Tensor:
        """x (B, d), y (B, n) -> all outputs of each member (members, B, outputs)."""
        q: Tensor = self.ensemble(torch.cat([x, y], dim=-1), members)
        return q


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for all parameters in one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def frozen_copy(module: M, copy: M) -> M:
    """`copy`, of the same shape as `module`, with its values and without gradients: a target network."""
    copy.load_state_dict(module.state_dict())
    return copy.requires_grad_(False)
