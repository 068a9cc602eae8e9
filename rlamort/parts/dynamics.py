"""Dynamics, as parts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import silu

from rlamort import dynamics as made
from rlamort.config import Fixed, Part, Size, Whole, Widths
from rlamort.config.imports import module_of
from rlamort.domain import Box
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.parts.policy_search import All, Points
from rlamort.parts.rewards import LearnedRewards, OwnRewards, Rewards, own


@dataclass(frozen=True)
class Dynamics(Part):
    """A transition model."""

    def __call__(self, spec: Spec, hidden: Widths) -> made.Dynamics:
        """The dynamics of an environment; `hidden` are widths of hidden layers, unless the part sets its own."""
        raise NotImplementedError


@dataclass(frozen=True)
class Own(Dynamics):
    """The environment's own equations, if they are known."""

    @property
    def of_environment(self) -> bool:
        return True

    def __call__(self, spec: Spec, hidden: Widths) -> made.Dynamics:
        if spec.equations is None:
            raise UserError(
                "dynamics=own: the equations of this environment are not known, or a wrapper, another step than that of the "
                "class that has them, or another environment beside it changes what they are about. Those of Pendulum-v1 are; "
                "give one of your own a method dynamics(x, u) -> (x_next, reward, continues), in torch, or name such a "
                "function, dynamics=Known dynamics.step=module:function, or learn them, dynamics=ensemble"
            )
        return _checked(made.Known(spec.equations, Box(spec.low, spec.high), "own"), spec)


@dataclass(frozen=True)
class Known(Dynamics):
    """Equations written by the user.

    Args:
        step: module:function, of x (B, d) and u (B, n), in the environment's units and in torch, to x_next (B, d), reward (B,)
            and continues (B,), which is 0 where the task ends and else 1.
    """

    step: str = ""

    def __call__(self, spec: Spec, hidden: Widths) -> made.Dynamics:
        module, _, name = self.step.partition(":")
        found = getattr(module_of(self.step, "dynamics.step"), name, None) if module and name else None
        if not callable(found):
            raise UserError(f"dynamics.step={self.step}: there is no such function; module:function is needed")
        return _checked(made.Known(found, Box(spec.low, spec.high), self.step), spec)


@dataclass(frozen=True)
class Simulator(Dynamics):
    """The true MuJoCo model of an environment whose rewards are known as functions of its physics: values, no gradients."""

    @property
    def of_environment(self) -> bool:
        return True

    def __call__(self, spec: Spec, hidden: Widths) -> made.Dynamics:
        if spec.simulator is None:
            raise UserError(
                "dynamics=simulator: an environment in this process, without a vector wrapper, is needed; or learn it, ensemble"
            )
        found: made.Dynamics = spec.simulator()
        return found


@dataclass(frozen=True)
class Ensemble(Dynamics):
    """An ensemble of networks, learned from transitions.

    Args:
        members: size of the ensemble.
        likelihood: normal predicts variances, too (Chua et al., 2018); squared predicts means alone.
        ends: learned predicts where tasks end; own asks the environment's function about predicted states, where it is known;
            never takes it that they go on.
        hidden: widths of the hidden layers; null takes the method's.
        rewards: learned predicts them, too; others are asked about predicted states: own, the environment's function, where it
            is known, saturating, the distance to a target, or Written, yours.
        particles: drawn of each member's predicted noise along a plan; 0 follows its mean.
        activation: of hidden units; silu, which is smooth, as dynamics mostly are, or relu.
    """

    members: Fixed[Size] = 5
    likelihood: Fixed[Literal["normal", "squared"]] = "normal"
    ends: Fixed[Literal["never", "learned", "own"]] = "never"
    hidden: Fixed[Widths | None] = None
    rewards: Rewards = LearnedRewards()
    particles: Whole = 0
    activation: Fixed[Literal["relu", "silu"]] = "relu"

    @property
    def of_environment(self) -> bool:
        return self.rewards.of_environment or self.ends == "own"

    def __call__(self, spec: Spec, hidden: Widths) -> made.Dynamics:
        if self.particles and self.likelihood == "squared":
            raise UserError(
                f"dynamics.particles={self.particles}: they draw noise that members predict; with dynamics.likelihood=squared "
                "0 is needed"
            )
        widths = hidden if self.hidden is None else self.hidden
        likelihood = made.Normal if self.likelihood == "normal" else made.Squared
        known = self.rewards(spec)
        rewards = made.Predicted() if known is None else made.Told(known)
        return made.Ensemble(
            spec.x_dim, len(spec.low), widths, self.members, likelihood, self._ends(spec), rewards, self.particles,
            activation={"relu": torch.relu, "silu": silu}[self.activation],
        )  # fmt: skip

    def _ends(self, spec: Spec) -> Callable[[], made.Endless | made.Ending]:
        if self.ends != "own":
            return made.Ending if self.ends == "learned" else made.Endless
        return functools.partial(made.ToldEnds, own(spec, "ends", made.GoesOn))


@dataclass(frozen=True)
class GaussianProcess(Dynamics):
    """Gaussian processes, learned from few transitions, with a reward that is known.

    Args:
        rewards: own takes the environment's equations, saturating the distance to a target, Written a function of yours.
        angles: coordinates that are the cosine and the sine of an angle, one pair after another: the angle is predicted, where
            plain coordinates would leave the circle.
        points: which transitions it holds.
    """

    rewards: Rewards = OwnRewards()
    angles: Fixed[tuple[Whole, ...]] = ()
    points: Points = All()

    @property
    def of_environment(self) -> bool:
        return self.rewards.of_environment

    def __call__(self, spec: Spec, hidden: Widths) -> made.Dynamics:
        rewards = None if self.of_environment and spec.equations is None else self.rewards(spec)
        if rewards is None:
            raise UserError(
                f"dynamics.rewards={self.rewards.label()}: the model learns how states move, not what they are worth, which "
                "must be known, with gradients: own, of an environment whose equations are known; saturating, with "
                "dynamics.rewards.target=[...] and .weights=[...]; or Written, with dynamics.rewards.function=module:function"
            )
        return made.GaussianProcess(spec.x_dim, len(spec.low), rewards, self.angles, self.points())


def _checked(known: made.Known, spec: Spec) -> made.Known:
    known.require(spec.x_dim)
    return known


Dynamics.presets = {"own": Own(), "simulator": Simulator(), "ensemble": Ensemble(), "gp": GaussianProcess()}
