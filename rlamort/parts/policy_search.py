"""The data that Gaussian processes hold, and how uncertain states are followed, as parts."""

from collections.abc import Callable
from dataclasses import dataclass

from rlamort import dynamics as made
from rlamort.config import Fixed, Part, Positive, Size
from rlamort.errors import UserError
from rlamort.model import Model
from rlamort.objective import Objective
from rlamort.radial import Sine


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
            "dynamics.rewards=saturating": lambda: isinstance(dynamics.rewards, made.Saturating),
            "model=radial": lambda: isinstance(model, Sine),
        }
        for field, held in needed.items():
            if not held():
                raise UserError(f"propagation=moments: {field} is needed, whose moments are known; or propagation=particles")
        assert isinstance(dynamics, made.GaussianProcess)
        assert isinstance(dynamics.rewards, made.Saturating)
        assert isinstance(model, Sine)
        return made.Beliefs(dynamics, dynamics.rewards, model.moments, horizon, discount)


Propagation.presets = {"particles": Particles(), "moments": Moments()}
