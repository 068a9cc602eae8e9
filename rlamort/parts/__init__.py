"""The values of a row's `model`, `loss` and `critic`: constructors of this framework, named, nested and with fields.

Each class here is a part (`rlamort.config.Part`): a frozen dataclass that builds the object of its name. So
`model: {kind: Unroll, update: {kind: Recurrent, head: gated}, steps: 5}` in a row, `model=semi model.steps=8` on the command
line and `rlamort.parts.Unroll(steps=8)` in Python are one mechanism.
"""

from rlamort.parts.critics import Categorical, Critics, Head, Online, Polyak, Quantiles, Scalar, Target
from rlamort.parts.dynamics import Dynamics, Ensemble, Known, Own, Simulator
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
    "Accelerated", "Adam", "Adjoint", "Alista", "Anderson", "Categorical", "Cem", "Choice", "Critics", "Dynamics", "Ensemble",
    "Expanded", "Expansion", "File", "FirstOrder", "Fista", "Full", "Gradient", "Head", "Icem", "Ilqr", "Implicit", "InChart",
    "Init", "Ista", "Iterates", "Known", "Label", "Labelled", "Labels", "Lagrangian", "Latent", "Lbfgs", "LearnedGradient",
    "Likelihood", "LineSearch", "Lista", "ListaCp", "Loss", "Middle", "Model", "Momentum", "Mppi", "MultipleShooting",
    "Noise", "Objective", "OneStep", "Online", "Own", "Penalty", "Polyak", "Previous", "PsdEncoder", "Quantiles", "Recurrent",
    "Refined", "Regress", "Replan", "Safeguarded", "Scalar", "Separate", "Setting", "Simulator", "Smoothed", "Solution",
    "Solved", "SpectralGradient", "Start", "StepIsta", "SupportPoints", "Target", "Teacher", "Truncated", "TwoStep",
    "Unexpanded", "Uniform", "Unroll", "Unrolled", "Update",
]  # fmt: skip
