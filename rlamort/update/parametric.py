"""A solver's step with parameters that a policy chooses, and one policy for all of its decisions.

x context (B, d) · y solution (B, n) · h carry: tensors with leading axis B · m decisions in a step · phi features (B, m, k)
· u parameters (B, m, a) in [-1, 1]
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.objective import Oracle
from rlamort.update import Update


class ParametricStep(nn.Module):
    """A solver's step with parameters u, such as penalties, damping, step sizes, scaled from [-1, 1] to their units.

    Attributes:
        decisions: m, decisions of one kind per step, each with its own features.
        inputs: k, size of the features of one decision.
        outputs: a, size of one decision.
    """

    decisions: int
    inputs: int
    outputs: int

    def start(self, y: Tensor, x: Tensor) -> Carry:
        """The carry h before the first step from y (B, n)."""
        return ()

    def features(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> Tensor:
        """phi (B, m, k), the features of each decision."""
        raise NotImplementedError

    def forward(self, u: Tensor, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        """One step (y, h) -> (y, h) with u (B, m, a) in [-1, 1]."""
        raise NotImplementedError


class Fold(NamedTuple):
    """(B, m, .) as (B m, .) and back, so that one policy makes every decision (RLQP, Ichnowski et al., 2021).

    Item i's decisions have the indices i m ... i m + m - 1.
    """

    decisions: int  # m

    def rows(self, phi: Tensor) -> Tensor:
        """(B, m, k) -> (B m, k)."""
        return phi.flatten(0, 1)

    def items(self, u: Tensor) -> Tensor:
        """(B m, a) -> (B, m, a)."""
        return u.reshape(-1, self.decisions, u.shape[-1])

    def shared(self, value: Tensor) -> Tensor:
        """(B,) -> (B m,): an item's value, repeated for each of its decisions."""
        return value.repeat_interleave(self.decisions)


class Controlled(Update):
    """A solver's step with parameters chosen by a policy, such as one trained in `rlamort.env.iterate`.

    Args:
        policy: features (B m, k) -> parameters (B m, a) in [-1, 1]; of an agent, its `act` without exploration.
        step: the parametric step.
    """

    def __init__(self, policy: Callable[[Tensor], Tensor], step: ParametricStep) -> None:
        super().__init__()
        self.policy, self.step = policy, step
        self.fold = Fold(step.decisions)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        return self.step.start(y, x)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        phi = self.step.features(y, h, x, oracle)
        u = self.fold.items(self.policy(self.fold.rows(phi)))
        stepped: tuple[Tensor, Carry] = self.step(u, y, h, x, oracle)
        return stepped
