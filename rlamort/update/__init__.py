"""One step of a solver, y -> y, classical or learned. `rlamort.adjoint` differentiates through steps."""

from rlamort.update.anderson import Anderson
from rlamort.update.base import Update
from rlamort.update.cem import Cem, HardTop, SoftTop
from rlamort.update.gradient import Fixed, Gradient, Learned
from rlamort.update.lbfgs import Lbfgs
from rlamort.update.recurrent import Additive, Gated, Gru, LogSign, Lstm, Normed, Recurrent

__all__ = [
    "Additive", "Anderson", "Cem", "Fixed", "Gated", "Gradient", "Gru", "HardTop", "Lbfgs", "Learned", "LogSign", "Lstm",
    "Normed", "Recurrent", "SoftTop", "Update",
]  # fmt: skip
