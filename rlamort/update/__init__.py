"""One step of a solver, y -> y, classical or learned. `rlamort.adjoint` differentiates through steps."""

from rlamort.update.adam import Adam
from rlamort.update.anderson import Anderson
from rlamort.update.base import Projected, Update
from rlamort.update.best import BestSoFar, best_so_far
from rlamort.update.cem import Cem, HardTop, Icem, SoftTop
from rlamort.update.draws import Clipped, Coloured, Truncated, White
from rlamort.update.gradient import Fixed, Gradient, Learned
from rlamort.update.ilqr import Ilqr
from rlamort.update.lbfgs import Lbfgs
from rlamort.update.mppi import Mppi
from rlamort.update.recurrent import Additive, Gated, Gru, LogSign, Lstm, Normed, Recurrent
from rlamort.update.space import InChart, InY, Space
from rlamort.update.spectral import SpectralGradient

__all__ = [
    "Adam", "Additive", "Anderson", "BestSoFar", "Cem", "Clipped", "Coloured", "Fixed", "Gated", "Gradient",
    "Gru", "HardTop", "Icem", "Ilqr", "InChart", "InY", "Lbfgs", "Learned", "LogSign", "Lstm", "Mppi", "Normed", "Projected",
    "Recurrent", "SoftTop", "Space", "SpectralGradient", "Truncated", "Update", "White", "best_so_far",
]  # fmt: skip
