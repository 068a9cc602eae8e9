"""Q functions, and the values that they bootstrap from. E members · B batch · O outputs of a member"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlamort.head import Head, Scalar
from rlamort.nets import FLOAT32, Arithmetic, Ensemble, FreeWeights, UnitWeights
from rlamort.norm import NoNorm, Norm, copy_statistics

M = TypeVar("M", bound=nn.Module)


class Critic(nn.Module):
    """Q_1..Q_E : (x, y) -> expected discounted return, an ensemble of independent networks.

    Args:
        x_dim: coordinates of a state.
        y_dim: coordinates of an action.
        hidden: widths of the hidden layers.
        members: E.
        norm: between a hidden layer's product and its ReLU.
        arithmetic: of the products.
        head: what the outputs stand for; None for one output, Q itself.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int],
        members: int,
        norm: Norm = NoNorm,
        arithmetic: Arithmetic = FLOAT32,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        self.head = head or Scalar()
        self.ensemble = Ensemble(members, x_dim + y_dim, hidden, self.head.outputs, norm, arithmetic)

    def forward(self, x: Tensor, y: Tensor, members: int | None = None) -> Tensor:
        """x (B, d), y (B, n) -> Q (members, B); None takes all members."""
        return self.head.q(self.outputs(x, y, members))

    def outputs(self, x: Tensor, y: Tensor, members: int | None = None, training: bool = False) -> Tensor:
        """x (B, d), y (B, n) -> all outputs of each member (members, B, O); `training` as in `Ensemble`."""
        out: Tensor = self.ensemble(torch.cat([x, y], dim=-1), members, training)
        return out

    def both(self, x: Tensor, y: Tensor, x_next: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (E, B, O) at (x, y) and at (x_next, y_next), of one training pass over both.

        The statistics of a batch norm are then those of stored and of new actions together, so that neither are
        normalised by the statistics of the others (Bhatt et al., 2024: CrossQ, section 3.2).
        """
        now, after = self.outputs(torch.cat([x, x_next]), torch.cat([y, y_next]), training=True).chunk(2, dim=1)
        return now, after


class NoTarget(nn.Module):
    """Targets from the critic itself, without a copy of it (Bhatt et al., 2024: CrossQ).

    Args:
        critic: what learns.
    """

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self._of = (critic,)  # in a tuple, so that its tensors are not registered here, too

    @property
    def critic(self) -> Critic:
        """What learns."""
        return self._of[0]

    def forward(self, x: Tensor, y: Tensor, members: int | None = None) -> Tensor:
        """As `Critic.forward`."""
        q: Tensor = self.critic(x, y, members)
        return q

    def both(self, x: Tensor, y: Tensor, x_next: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's outputs at (x, y), and those that targets are made of, at (x_next, y_next), both (E, B, O)."""
        now, after = self.critic.both(x, y, x_next, y_next)
        return now, after.detach()

    def follow(self) -> None:
        """Called after the critic's step: nothing, since it is the critic."""


class TargetNetwork(nn.Module):
    """Targets from a copy of the critic, whose weights are a running average of its own (Lillicrap et al., 2016).

    Args:
        critic: what learns.
        fresh: of the same shape, which becomes the copy.
        tau: weight of the critic's in every update of the average.
        project: the constraint on its weights; None if they are free.
    """

    def __init__(self, critic: Critic, fresh: Critic, tau: float, project: FreeWeights | UnitWeights | None = None) -> None:
        super().__init__()
        self._of = (critic,)  # as above
        self.ensemble = frozen_copy(critic, fresh).ensemble
        self.tau, self.project = tau, project or FreeWeights(self.ensemble)

    @property
    def critic(self) -> Critic:
        """What learns."""
        return self._of[0]

    def forward(self, x: Tensor, y: Tensor, members: int | None = None) -> Tensor:
        """As `Critic.forward`."""
        return self.critic.head.q(self.ensemble(torch.cat([x, y], dim=-1), members))

    def both(self, x: Tensor, y: Tensor, x_next: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's outputs at (x, y), and those that targets are made of, at (x_next, y_next), both (E, B, O)."""
        with torch.no_grad():
            after: Tensor = self.ensemble(torch.cat([x_next, y_next], dim=-1))
        return self.critic.outputs(x, y, training=True), after

    def follow(self) -> None:
        """Called after the critic's step: average."""
        polyak(self.ensemble, self.critic.ensemble, self.tau)
        self.project(list(self.ensemble.parameters()))


class JointTargetNetwork(TargetNetwork):
    """For batch norm: critic and copy both see both halves, and each normalises by the statistics of its pass."""

    def both(self, x: Tensor, y: Tensor, x_next: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor]:
        now, _ = self.critic.both(x, y, x_next, y_next)
        with torch.no_grad():
            rows = torch.cat([torch.cat([x, x_next]), torch.cat([y, y_next])], dim=-1)
            after: Tensor = self.ensemble(rows, training=True)[:, len(x) :]
        return now, after


class RunningTargetNetwork(TargetNetwork):
    """For batch norm: the critic sees both halves, and the copy, with the critic's running statistics, the second alone."""

    def both(self, x: Tensor, y: Tensor, x_next: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            after: Tensor = self.ensemble(torch.cat([x_next, y_next], dim=-1))
        now, _ = self.critic.both(x, y, x_next, y_next)
        return now, after

    def follow(self) -> None:
        super().follow()
        copy_statistics(self.ensemble, self.critic.ensemble)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for all parameters in one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def frozen_copy(module: M, copy: M) -> M:
    """`copy`, of the same shape as `module`, with its values and without gradients: a target network."""
    copy.load_state_dict(module.state_dict())
    return copy.requires_grad_(False)
