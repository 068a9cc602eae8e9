"""How dynamics say that they learn from transitions. E members · B transitions · N of them that are held · p numbers of an item

A `Dynamics` with `learned = True` has what one of these contracts names, whoever wrote it, and derives from none of them.
What they set themselves are closed forms, such as means or a posterior; gradient steps on their losses are taken in
`rlamort.fits`, by `rlamort.agent.descend`.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from rlamort.dynamics.base import Dynamics, Transitions
from rlamort.dynamics.gaussian_process import Motion


class Trained(Protocol):
    """Dynamics that learn by gradient steps on batches of transitions, as networks do."""

    @property
    def members(self) -> int: ...  # E, each of which is trained on transitions of its own; 1 for a single model
    @property
    def least(self) -> int: ...  # transitions that a fit needs at least
    def prepare(self, met: Transitions) -> Tensor: ...  # (B, p), what losses are of; sets scales and the like to those of all
    def loss(self, items: Tensor) -> Tensor: ...  # items (E, B, p), each member's own -> the sum of the members' losses ()
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


class Conditioned(Protocol):
    """Dynamics whose parameters are learned on all data at once, and that are conditioned on these, as Gaussian processes."""

    @property
    def motion(self) -> Motion: ...  # how states move, where coordinates are angles
    @property
    def least(self) -> int: ...  # transitions that a fit needs at least
    def hold(self, met: Transitions) -> Tensor: ...  # takes them as data, as many as may be held, and gives targets (N, p)
    def loss(self, targets: Tensor) -> Tensor: ...  # ()
    def condition(self, targets: Tensor) -> None: ...  # sets the posterior, after gradient steps
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


def lacking(dynamics: Dynamics, contract: object) -> list[str]:
    """What dynamics have not of `Trained` or `Conditioned`."""
    return [name for name in vars(contract) if not name.startswith("_") and not hasattr(dynamics, name)]
