"""Ensembles of Q functions, what their outputs stand for, and what they bootstrap from, as parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlamort import critic as critics
from rlamort import head as heads
from rlamort.config import Fixed, Part, Size, Whole, Widths
from rlamort.critic import Critic
from rlamort.errors import UserError
from rlamort.nets import FLOAT32, Arithmetic, FreeWeights, UnitWeights
from rlamort.norm import NORMS, Normed


@dataclass(frozen=True)
class Head(Part):
    """What a critic's outputs stand for, and how they learn it."""

    def __call__(self) -> heads.Head:
        raise NotImplementedError


@dataclass(frozen=True)
class Scalar(Head):
    """One output, Q, by squared error."""

    def __call__(self) -> heads.Head:
        return heads.Scalar()


@dataclass(frozen=True)
class Categorical(Head):
    """A distribution over evenly spaced returns, by cross-entropy.

    Args:
        count: number of atoms.
        low: the first.
        high: the last; targets outside are clipped, and counted as critic/outside.
        projection: moved moves the least critic's whole distribution; two_hot takes a scalar target's two nearest atoms.
    """

    count: Fixed[Size] = 101
    low: Fixed[float] = -5.0
    high: Fixed[float] = 5.0
    projection: Literal["moved", "two_hot"] = "moved"

    def __call__(self) -> heads.Head:
        if self.count < 2 or self.low >= self.high:
            raise UserError(
                f"critic.head: {self.count} atoms from {self.low:g} to {self.high:g}; two or more, low below high, are needed"
            )
        projections: dict[str, heads.Projection] = {"moved": heads.Moved(), "two_hot": heads.TwoHot()}
        return heads.Categorical(self.count, self.low, self.high, projections[self.projection])


@dataclass(frozen=True)
class Quantiles(Head):
    """Quantiles of the return, by quantile regression, with the highest truncated in targets (Kuznetsov et al., 2020).

    Args:
        count: number of quantiles of each critic.
        dropped: quantiles per critic that are dropped from the pooled target.
    """

    count: Fixed[Size] = 25
    dropped: Whole = 2

    def __call__(self) -> heads.Head:
        return heads.Quantiles(self.count, self.dropped)


Targets = critics.NoTarget | critics.TargetNetwork
Make = Callable[[], Critic]  # another critic of the same shape
Project = FreeWeights | UnitWeights


@dataclass(frozen=True)
class Target(Part):
    """What critics bootstrap from."""

    def require(self, norm: str) -> None:
        """Raises UserError if it does not go with the critics' normalisation."""

    def __call__(self, critic: Critic, fresh: Make, tau: float, project: Project | None = None) -> Targets:
        raise NotImplementedError


@dataclass(frozen=True)
class Online(Target):
    """The critics themselves, without a target network."""

    def __call__(self, critic: Critic, fresh: Make, tau: float, project: Project | None = None) -> Targets:
        return critics.NoTarget(critic)


@dataclass(frozen=True)
class Polyak(Target):
    """A target network, by Polyak averaging.

    Args:
        statistics: with critic.norm=batch, what the target network normalises by: batch, of the same pass as the critics';
            running, the critics' running statistics.
    """

    statistics: Literal["batch", "running"] = "batch"

    def require(self, norm: str) -> None:
        if self.statistics == "running" and not NORMS[norm].of_batch:
            raise UserError(
                f"critic.target.statistics=running and critic.norm={norm}: the critics then have no running statistics; "
                "critic.norm=batch or renorm is needed"
            )

    def __call__(self, critic: Critic, fresh: Make, tau: float, project: Project | None = None) -> Targets:
        of_batch = {"batch": critics.JointTargetNetwork, "running": critics.RunningTargetNetwork}
        kind = of_batch[self.statistics] if critic.ensemble.of_batch else critics.TargetNetwork
        return kind(critic, fresh(), tau, project)


@dataclass(frozen=True)
class Critics(Part):
    """An ensemble of Q functions.

    Args:
        members: size of the ensemble.
        norm: before every ReLU: layer for layer normalisation (Ball et al., 2023); batch for batch normalisation, also of
            inputs and jointly over states and next states (Bhatt et al., 2024); renorm for its renormalisation; or none.
        hidden: widths of the hidden layers; null takes the method's.
        head: what the outputs stand for.
        target: what targets are made of.
    """

    members: Fixed[Size] = 2
    norm: Fixed[Normed] = "none"
    hidden: Fixed[Widths | None] = None
    head: Head = Scalar()
    target: Target = Polyak()

    def __call__(self, x_dim: int, y_dim: int, hidden: Widths, arithmetic: Arithmetic = FLOAT32) -> Critic:
        self.target.require(self.norm)
        widths = hidden if self.hidden is None else self.hidden
        return Critic(x_dim, y_dim, widths, self.members, NORMS[self.norm], arithmetic, self.head())


Head.presets = {"scalar": Scalar(), "categorical": Categorical(), "quantiles": Quantiles()}
Target.presets = {"polyak": Polyak(), "none": Online()}
