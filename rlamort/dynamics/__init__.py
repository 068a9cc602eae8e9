"""What follows an action: known or learned, and the objectives that follow it."""

from rlamort.dynamics.base import LARGE, LAST, Act, Dynamics, Known, Moved, Transitions
from rlamort.dynamics.ensemble import Ending, Endless, Ensemble, Normal, Predicted, Settled, Squared, Told, ToldEnds
from rlamort.dynamics.expansion import Gains, Retraced, ValueExpansion
from rlamort.dynamics.gaussian_process import Everything, GaussianProcess, Motion, Spread
from rlamort.dynamics.learning import Conditioned, Trained, lacking
from rlamort.dynamics.linear_gaussian import LinearGaussian, Mixture, Prior
from rlamort.dynamics.perturbed import Init, Noise, Perturbed, Policy, Replan, Separate, Uniform
from rlamort.dynamics.policy_search import Beliefs, Particles
from rlamort.dynamics.rewards import Ends, GoesOn, Paid, Rewards, Saturating
from rlamort.dynamics.trajectory import Trajectory

__all__ = [
    "LARGE", "LAST", "Act", "Beliefs", "Conditioned", "Dynamics", "Ending", "Endless", "Ends", "Ensemble", "Everything",
    "Gains", "GaussianProcess", "GoesOn", "Init", "Known", "LinearGaussian", "Mixture", "Motion", "Moved", "Noise", "Normal",
    "Paid", "Particles", "Perturbed", "Policy", "Predicted", "Prior", "Replan", "Retraced", "Rewards", "Saturating",
    "Separate", "Settled", "Spread", "Squared", "Told", "ToldEnds", "Trained", "Trajectory", "Transitions", "Uniform",
    "ValueExpansion", "lacking",
]  # fmt: skip
