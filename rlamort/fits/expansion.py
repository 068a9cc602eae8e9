"""How far the objective of a stochastic policy follows a model before it asks the critic."""

from collections.abc import Callable

from torch import Tensor, nn

from rlamort.dynamics import Dynamics, ValueExpansion
from rlamort.fits.dynamics import Fits
from rlamort.objective import Metrics, Objective, Oracle, Soft
from rlamort.source import Replay

Policy = Callable[[Tensor, Oracle], Tensor]  # (x, oracle) -> lam, as of a model


class Expansion(nn.Module):
    """No expansion: the objective is the critic's.

    Attributes:
        fit_every: environment steps between calls of `fit`; 0 for none.
        fit_least: transitions that a fit needs at least.
        adds_rewards: whether the objective adds rewards of the model, in the environment's unit, to the critic's values.
    """

    fit_every: int = 0
    fit_least: int = 0
    adds_rewards: bool = False

    def objective(self, soft: Soft, policy: Policy) -> Objective:
        """f, over the parameters of a density, given the critic's."""
        return soft

    def fit(self, source: Replay) -> Metrics:
        """Learn the model from all transitions; returns detached 0-d tensors."""
        return {}


class Modelled(Expansion):
    """H steps of a model, and then the critic.

    Args:
        dynamics: the model.
        fits: its fits.
        horizon: H.
        discount: per step.
    """

    def __init__(self, dynamics: Dynamics, fits: Fits, horizon: int, discount: float) -> None:
        super().__init__()
        self.dynamics, self.fits, self.fit_every, self.fit_least = dynamics, fits, fits.every, fits.least
        self.horizon, self.discount, self.adds_rewards = horizon, discount, horizon > 0

    def objective(self, soft: Soft, policy: Policy) -> Objective:
        return ValueExpansion(soft, self.dynamics, policy, self.horizon, self.discount)

    def fit(self, source: Replay) -> Metrics:
        return self.fits(source, max(1, self.horizon))
