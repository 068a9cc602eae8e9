"""How far the objective of a stochastic policy follows a model before it asks the critic."""

from collections.abc import Callable

from torch import Tensor, nn

from rlamort.agent import Adam
from rlamort.dynamics import Dynamics, Ensemble, ValueExpansion
from rlamort.fits.dynamics import fit_steps, measured
from rlamort.objective import Metrics, Objective, Oracle, Soft
from rlamort.source import Replay

Policy = Callable[[Tensor, Oracle], Tensor]  # (x, oracle) -> lam, as of a model


class Expansion(nn.Module):
    """No expansion: the objective is the critic's.

    Attributes:
        fit_every: environment steps between calls of `fit`; 0 for none.
    """

    fit_every: int = 0

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
        horizon: H.
        discount: per step.
    """

    def __init__(self, dynamics: Dynamics, horizon: int, discount: float) -> None:
        super().__init__()
        self.dynamics, self.horizon, self.discount = dynamics, horizon, discount

    def objective(self, soft: Soft, policy: Policy) -> Objective:
        return ValueExpansion(soft, self.dynamics, policy, self.horizon, self.discount)


class Learned(Modelled):
    """The same by a model that is learned.

    Args:
        dynamics: the model.
        horizon: H.
        discount: per step.
        fit_every: environment steps between fits.
        steps: gradient steps in a fit.
        batch_size: transitions in a step, sampled independently for every member.
        learning_rate: Adam's step size.
    """

    def __init__(
        self,
        dynamics: Ensemble,
        horizon: int,
        discount: float,
        fit_every: int,
        steps: int,
        batch_size: int,
        learning_rate: float,
    ) -> None:
        super().__init__(dynamics, horizon, discount)
        self.fit_every, self.steps, self.batch_size = fit_every, steps, batch_size
        self.adam = Adam(dynamics.parameters(), learning_rate)

    def fit(self, source: Replay) -> Metrics:
        assert isinstance(self.dynamics, Ensemble)
        metrics = measured(self.dynamics, source, max(1, self.horizon), self.fit_every // source.rows)
        batch = source.everything(n_step=1)
        return metrics | fit_steps(self.dynamics, self.adam, batch, self.steps, self.batch_size)
