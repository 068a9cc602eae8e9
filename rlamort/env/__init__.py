"""X with dynamics: what an agent acts in."""

from rlamort.env.base import *  # noqa: F403
