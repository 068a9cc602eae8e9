"""Fits of Gaussian processes as dynamics."""

from torch import nn

from rlamort.agent import Adam, descend
from rlamort.dynamics import Dynamics, GaussianProcess
from rlamort.errors import UserError
from rlamort.objective import Metrics
from rlamort.source import Replay


class Fits(nn.Module):
    """The fits of Gaussian processes; of known dynamics nothing is fitted.

    Args:
        dynamics: what learns.
        steps: gradient steps in a fit.
        learning_rate: Adam's step size.

    Raises:
        UserError: dynamics that learn in another way, or have no gradients.
    """

    def __init__(self, dynamics: Dynamics, steps: int, learning_rate: float) -> None:
        super().__init__()
        if not dynamics.differentiable or (dynamics.learned and not isinstance(dynamics, GaussianProcess)):
            raise UserError(
                f"dynamics={type(dynamics).__name__}: gp is needed, or own, where the equations are known, or Known"
            )
        self._of = (dynamics,)  # in a tuple, so that its tensors are not registered here, too
        self.steps, self.adam = steps, Adam(dynamics.parameters(), learning_rate)

    def __call__(self, source: Replay) -> Metrics:
        """Maximise the marginal likelihood of all transitions, from where the last fit ended, and set the posterior."""
        (dynamics,) = self._of
        if not isinstance(dynamics, GaussianProcess):
            return {}
        targets = dynamics.hold(source.everything(n_step=1))
        for _ in range(self.steps):
            loss = dynamics.loss(targets)
            descend(loss, dynamics.parameters(), self.adam)
        dynamics.condition(targets)
        return {"dynamics/loss": loss.detach(), "dynamics/points": dynamics.count.to(loss).clone()}
