"""One step of a solver, y -> y, classical or learned."""

from rlamort.update.steps import *  # noqa: F403
