"""Y, the domains of solutions, and densities over them."""

from rlamort.domain.sets import *  # noqa: F403
