"""Rewards that are known beside learned dynamics, the data that those hold, and how uncertain states are followed, as parts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlamort import dynamics as made
from rlamort.config import Fixed, NonNegative, Part, Positive, Size
from rlamort.config.imports import module_of
from rlamort.domain import Box
from rlamort.dynamics.gaussian_process import Reward as Rewarded
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.model import Model
from rlamort.objective import Objective
from rlamort.radial import Sine


@dataclass(frozen=True)
class Reward(Part):
    """A reward that is a known function of state and action."""

    def __call__(self, spec: Spec) -> Rewarded:
        raise NotImplementedError


@dataclass(frozen=True)
class Equations(Reward):
    """The environment's own, where its equations are known."""

    @property
    def of_environment(self) -> bool:
        return True

    def __call__(self, spec: Spec) -> Rewarded:
        if spec.equations is None:
            raise UserError(
                "dynamics.reward=own: the equations of this environment are not known, and the model learns how states move, "
                "not what they are worth; dynamics.reward=saturating, with dynamics.reward.target=[...] and .weights=[...], or "
                "dynamics.reward=Written dynamics.reward.function=module:function, is needed"
            )
        return made.Paid(made.Known(spec.equations, Box(spec.low, spec.high), "own"))


@dataclass(frozen=True)
class Saturating(Reward):
    """exp(-sum_i weights_i (x_i - target_i)^2 / 2) - 1.

    Args:
        target: a number for every coordinate of states.
        weights: inverse squares of widths, likewise; 0 where a coordinate does not count.
    """

    target: Fixed[tuple[float, ...]] = ()
    weights: Fixed[tuple[NonNegative, ...]] = ()

    def __call__(self, spec: Spec) -> Rewarded:
        for field in ("target", "weights"):
            given = getattr(self, field)
            if len(given) != spec.x_dim:
                raise UserError(
                    f"dynamics.reward.{field}={list(given)}: {spec.x_dim} numbers are needed, one a coordinate of states"
                )
        return made.Saturating(self.target, self.weights)


@dataclass(frozen=True)
class Written(Reward):
    """A function of the user's.

    Args:
        function: module:function, of x (B, d) and u (B, n), in the environment's units and in torch, to rewards (B,).
    """

    function: str = ""

    def __call__(self, spec: Spec) -> Rewarded:
        module, _, name = self.function.partition(":")
        found = getattr(module_of(self.function, "dynamics.reward.function"), name, None) if module and name else None
        if not callable(found):
            raise UserError(f"dynamics.reward.function={self.function}: there is no such function; module:function is needed")
        actions, written = Box(spec.low, spec.high), found
        shape = tuple(written(torch.zeros(2, spec.x_dim), torch.zeros(2, actions.dim)).shape)
        if shape != (2,):
            raise UserError(f"dynamics.reward.function={self.function}: for two states it gives shape {shape}; (2,) is needed")
        return made.Paid(made.Known(lambda x, u: (x, written(x, u), torch.ones_like(x[:, 0])), actions, self.function))


Reward.presets = {"own": Equations(), "saturating": Saturating()}


@dataclass(frozen=True)
class Points(Part):
    """Which transitions a Gaussian process holds."""

    def __call__(self) -> made.Everything:
        raise NotImplementedError


@dataclass(frozen=True)
class All(Points):
    """All, and an error where there are more.

    Args:
        most: how many there may be.
    """

    most: Fixed[Size] = 400

    def __call__(self) -> made.Everything:
        return made.Everything(self.most)


@dataclass(frozen=True)
class Spread(Points):
    """The most different ones, where there are more.

    Args:
        most: how many are held.
    """

    most: Fixed[Size] = 200

    def __call__(self) -> made.Everything:
        return made.Spread(self.most)


Points.presets = {"all": All(), "spread": Spread()}


@dataclass(frozen=True)
class Propagation(Part):
    """How uncertain states are followed through dynamics."""

    def __call__(self, dynamics: made.Dynamics, model: Model, horizon: int, discount: float) -> Objective:
        """The objective of a first action, with the model's later ones."""
        raise NotImplementedError


@dataclass(frozen=True)
class Particles(Propagation):
    """By particles, each of one start.

    Args:
        clip: largest norm of the derivative of a particle's return in each state on its way; null does not limit it.
    """

    clip: Positive | None = 5.0

    def __call__(self, dynamics: made.Dynamics, model: Model, horizon: int, discount: float) -> Objective:
        return made.Particles(dynamics, model, horizon, discount, self.clip)


@dataclass(frozen=True)
class Moments(Propagation):
    """By mean and covariance, in closed form: of Gaussian processes, radial policies and the saturating reward."""

    def __call__(self, dynamics: made.Dynamics, model: Model, horizon: int, discount: float) -> Objective:
        needed: dict[str, Callable[[], bool]] = {
            "dynamics=gp": lambda: isinstance(dynamics, made.GaussianProcess),
            "dynamics.reward=saturating": lambda: isinstance(dynamics.reward, made.Saturating),
            "model=radial": lambda: isinstance(model, Sine),
        }
        for field, held in needed.items():
            if not held():
                raise UserError(f"propagation=moments: {field} is needed, whose moments are known; or propagation=particles")
        assert isinstance(dynamics, made.GaussianProcess)
        assert isinstance(dynamics.reward, made.Saturating)
        assert isinstance(model, Sine)
        return made.Beliefs(dynamics, dynamics.reward, model.moments, horizon, discount)


Propagation.presets = {"particles": Particles(), "moments": Moments()}
