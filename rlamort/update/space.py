"""The coordinates in which a solver iterates: Y itself, or its chart.

y solution (B, n) · v unconstrained (B, inputs) · z iterate, y or v · x context (B, d)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlamort.domain import Domain, Euclid
from rlamort.objective import Oracle


@dataclass(frozen=True)
class InY:
    """Iterates are solutions. Updates that leave Y need a projection after each step, as `Projected` has it.

    Args:
        whole: Y.

    Attributes:
        name: for rows and messages.
        domain: of iterates.
    """

    whole: Domain
    name: ClassVar[Literal["solution"]] = "solution"

    @property
    def domain(self) -> Domain:
        return self.whole

    def begin(self, v: Tensor, x: Tensor) -> Tensor:
        """The iterate z whose solution is project(v)."""
        return self.whole.at(x).project(v)

    def point(self, z: Tensor, x: Tensor) -> Tensor:
        """The solution y of an iterate z."""
        return z

    def oracle(self, oracle: Oracle, d: int) -> Oracle:
        """An oracle of f over y as one over z; the first `d` columns of its contexts are x."""
        return oracle


@dataclass(frozen=True)
class InChart:
    """Iterates are the unconstrained numbers v that Y's `project` takes, in which its boundary is infinitely far away.

    Args:
        whole: Y.

    Attributes:
        name: for rows and messages.
        domain: of iterates, R^inputs.
    """

    whole: Domain
    name: ClassVar[Literal["chart"]] = "chart"

    @property
    def domain(self) -> Domain:
        return Euclid(self.whole.inputs)

    def begin(self, v: Tensor, x: Tensor) -> Tensor:
        """The iterate z whose solution is project(v)."""
        return v

    def point(self, z: Tensor, x: Tensor) -> Tensor:
        """The solution y of an iterate z."""
        return self.whole.at(x).project(z)

    def oracle(self, oracle: Oracle, d: int) -> Oracle:
        """An oracle of f over y as one over z; the first `d` columns of its contexts are x."""
        return oracle.through(self.point, d)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """The chart as a latent space: what `project` takes is the iterate itself."""
        return z


Space = InY | InChart
