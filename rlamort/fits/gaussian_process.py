"""Fits of dynamics that are `Conditioned`, such as Gaussian processes."""

from typing import cast

from torch import nn

from rlamort.agent import Adam, descend
from rlamort.dynamics import Conditioned, Dynamics, lacking
from rlamort.errors import UserError
from rlamort.objective import Metrics
from rlamort.source import Replay


class Fits(nn.Module):
    """The fits of dynamics to all data at once; of known ones nothing is fitted.

    Args:
        dynamics: what learns.
        steps: gradient steps in a fit.
        learning_rate: Adam's step size.

    Attributes:
        least: transitions that a fit needs at least; 0 of known dynamics.

    Raises:
        UserError: dynamics that learn in another way, or have no gradients.
    """

    def __init__(self, dynamics: Dynamics, steps: int, learning_rate: float) -> None:
        super().__init__()
        missing = lacking(dynamics, Conditioned) if dynamics.learned else []
        if missing or not dynamics.differentiable:
            lacks = f" One of yours needs {', '.join(missing)} (rlamort.dynamics.Conditioned)" if missing else ""
            raise UserError(
                f"dynamics={type(dynamics).__name__}: gp is needed, or own, where the equations are known, or Known.{lacks}"
            )
        learner = cast(Conditioned, dynamics) if dynamics.learned else None
        self.least = 0 if learner is None else learner.least
        self._of = (learner,)  # in a tuple, so that its tensors are not registered here, too
        self.steps, self.adam = steps, Adam(dynamics.parameters(), learning_rate)

    @property
    def learner(self) -> Conditioned | None:
        """What learns; None of known dynamics."""
        return self._of[0]

    def __call__(self, source: Replay) -> Metrics:
        """Maximise the marginal likelihood of all transitions, from where the last fit ended, and set the posterior."""
        dynamics = self.learner
        if dynamics is None:
            return {}
        targets = dynamics.hold(source.everything(n_step=1))
        for _ in range(self.steps):
            loss = dynamics.loss(targets)
            descend(loss, dynamics.parameters(), self.adam)
        dynamics.condition(targets)
        return {"dynamics/loss": loss.detach(), "dynamics/points": loss.new_tensor(len(targets))}
