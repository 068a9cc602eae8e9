"""What follows an action: known or learned, and the objectives that follow it."""

from rlamort.dynamics.base import LARGE, LAST, Act, Dynamics, Known, Moved, Transitions
from rlamort.dynamics.ensemble import Ending, Endless, Ensemble, Normal, Particles, Predicted, Rewards, Squared, Told
from rlamort.dynamics.expansion import Gains, Retraced, ValueExpansion
from rlamort.dynamics.perturbed import Init, Noise, Perturbed, Policy, Replan, Separate, Uniform
from rlamort.dynamics.trajectory import Trajectory

__all__ = [
    "LARGE", "LAST", "Act", "Dynamics", "Ending", "Endless", "Ensemble", "Gains", "Init", "Known", "Moved", "Noise", "Normal",
    "Particles", "Perturbed", "Policy", "Predicted", "Replan", "Retraced", "Rewards", "Separate", "Squared", "Told",
    "Trajectory", "Transitions", "Uniform", "ValueExpansion",
]  # fmt: skip
