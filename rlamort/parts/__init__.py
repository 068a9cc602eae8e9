"""The values of a row's `model`, `loss` and `critic`: constructors of this framework, named, nested and with fields.

Each class here is a part (`rlamort.config.Part`): a frozen dataclass that builds the object of its name. So
`model: {kind: Unroll, update: {kind: Recurrent, head: gated}, steps: 5}` in a row, `model=semi model.steps=8` on the command
line and `rlamort.parts.Unroll(steps=8)` in Python are one mechanism.
"""

from rlamort.parts.critics import Categorical, Critics, Head, Online, Polyak, Quantiles, Scalar, Target
from rlamort.parts.dynamics import Dynamics, Ensemble, GaussianProcess, Known, Own, Simulator
from rlamort.parts.expansion import Expanded, Expansion, Unexpanded
from rlamort.parts.labels import File, Solved
from rlamort.parts.losses import (
    Accelerated,
    Iterates,
    Label,
    Labelled,
    Lagrangian,
    Likelihood,
    Loss,
    Objective,
    Penalty,
    Regress,
    Smoothed,
    Solution,
    Teacher,
)  # fmt: skip
from rlamort.parts.models import (
    Choice,
    Full,
    InChart,
    Latent,
    Middle,
    Model,
    Previous,
    PsdEncoder,
    Radial,
    Refined,
    Safeguarded,
    Start,
    TwoStep,
    Unroll,
)  # fmt: skip
from rlamort.parts.plans import (
    Cem,
    Icem,
    Ilqr,
    Init,
    Mppi,
    MultipleShooting,
    Noise,
    Replan,
    Separate,
    SupportPoints,
    Uniform,
)  # fmt: skip
from rlamort.parts.policy_search import All, Moments, Particles, Points, Propagation, Spread
from rlamort.parts.rewards import LearnedRewards, OwnRewards, Rewards, Saturating, Written
from rlamort.parts.setting import Setting
from rlamort.parts.updates import (
    Adam,
    Adjoint,
    Alista,
    Anderson,
    FirstOrder,
    Fista,
    Gradient,
    Implicit,
    Ista,
    Lbfgs,
    LearnedGradient,
    LineSearch,
    Lista,
    ListaCp,
    Momentum,
    OneStep,
    Recurrent,
    SpectralGradient,
    StepIsta,
    Truncated,
    Unrolled,
    Update,
)  # fmt: skip
from rlamort.source import Labels

__all__ = [
    "Accelerated", "Adam", "Adjoint", "Alista", "All", "Anderson", "Categorical", "Cem", "Choice", "Critics", "Dynamics",
    "Ensemble", "Expanded", "Expansion", "File", "FirstOrder", "Fista", "Full", "GaussianProcess", "Gradient", "Head", "Icem",
    "Ilqr", "Implicit", "InChart", "Init", "Ista", "Iterates", "Known", "Label", "Labelled", "Labels", "Lagrangian", "Latent",
    "Lbfgs", "LearnedGradient", "LearnedRewards", "Likelihood", "LineSearch", "Lista", "ListaCp", "Loss", "Middle", "Model",
    "Moments", "Momentum", "Mppi", "MultipleShooting", "Noise", "Objective", "OneStep", "Online", "Own", "OwnRewards",
    "Particles", "Penalty", "Points", "Polyak", "Previous", "Propagation", "PsdEncoder", "Quantiles", "Radial", "Recurrent",
    "Refined", "Regress", "Replan", "Rewards", "Safeguarded", "Saturating", "Scalar", "Separate", "Setting", "Simulator",
    "Smoothed", "Solution", "Solved", "SpectralGradient", "Spread", "Start", "StepIsta", "SupportPoints", "Target", "Teacher",
    "Truncated", "TwoStep", "Unexpanded", "Uniform", "Unroll", "Unrolled", "Update", "Written",
]  # fmt: skip
