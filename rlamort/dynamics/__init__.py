"""What follows an action: known or learned, and the objectives that follow it."""

from rlamort.dynamics.base import Dynamics, Known, Moved, Transitions
from rlamort.dynamics.ensemble import Ending, Endless, Ensemble, Normal, Squared
from rlamort.dynamics.expansion import LARGE, LAST, Gains, Retraced, ValueExpansion
from rlamort.dynamics.gaussian_process import Everything, GaussianProcess, Motion, Spread
from rlamort.dynamics.linear_gaussian import LinearGaussian, Mixture, Prior
from rlamort.dynamics.policy_search import Beliefs, Particles
from rlamort.dynamics.rewards import Paid, Saturating
from rlamort.dynamics.trajectory import Trajectory

__all__ = [
    "LARGE", "LAST", "Beliefs", "Dynamics", "Ending", "Endless", "Ensemble", "Everything", "Gains", "GaussianProcess", "Known",
    "LinearGaussian", "Mixture", "Motion", "Moved", "Normal", "Paid", "Particles", "Prior", "Retraced", "Saturating", "Spread",
    "Squared", "Trajectory", "Transitions", "ValueExpansion",
]  # fmt: skip
