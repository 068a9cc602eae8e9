"""What follows an action: known or learned, and the objectives that follow it."""

from rlamort.dynamics.base import Dynamics, Known, Moved, Transitions
from rlamort.dynamics.ensemble import Ending, Endless, Ensemble, Normal, Squared
from rlamort.dynamics.expansion import LARGE, LAST, Gains, Retraced, ValueExpansion
from rlamort.dynamics.linear_gaussian import LinearGaussian, Mixture, Prior
from rlamort.dynamics.trajectory import Trajectory

__all__ = [
    "LARGE", "LAST", "Dynamics", "Ending", "Endless", "Ensemble", "Gains", "Known", "LinearGaussian", "Mixture", "Moved",
    "Normal", "Prior", "Retraced", "Squared", "Trajectory", "Transitions", "ValueExpansion",
]  # fmt: skip
