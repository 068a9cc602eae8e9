"""One step of a solver, y -> y, classical or learned. `rlamort.adjoint` differentiates through steps."""

from rlamort.update.adam import Adam
from rlamort.update.anderson import Anderson
from rlamort.update.anytime import AUTO, Always, Anytime, Refine, Worth, anytime, best
from rlamort.update.base import Projected, Update
from rlamort.update.best import BestSoFar, best_so_far
from rlamort.update.cem import Cem, HardTop, Icem, SoftTop
from rlamort.update.draws import Clipped, Coloured, Truncated, White
from rlamort.update.gradient import Fixed, Gradient, Learned
from rlamort.update.ilqr import Ilqr, LinearQuadratic
from rlamort.update.lbfgs import Lbfgs
from rlamort.update.line import LineSearch
from rlamort.update.mppi import Mppi
from rlamort.update.recurrent import Additive, Gated, Gru, LogSign, Lstm, Normed, Recurrent
from rlamort.update.shooting import MultipleShooting
from rlamort.update.space import InChart, InY, Space
from rlamort.update.spectral import SpectralGradient

__all__ = [
    "AUTO", "Adam", "Additive", "Always", "Anderson", "Anytime", "BestSoFar", "Cem", "Clipped", "Coloured", "Fixed", "Gated",
    "Gradient", "Gru", "HardTop", "Icem", "Ilqr", "InChart", "InY", "Lbfgs", "Learned", "LineSearch", "LinearQuadratic",
    "LogSign", "Lstm", "Mppi", "MultipleShooting", "Normed", "Projected", "Recurrent", "Refine", "SoftTop", "Space",
    "SpectralGradient", "Truncated", "Update", "White", "Worth", "anytime", "best", "best_so_far",
]  # fmt: skip
