"""X with dynamics: environments."""

from rlamort.env.base import Env, Episode, Policy, Solutions, Space, Spec, Step, Units

__all__ = ["Env", "Episode", "Policy", "Solutions", "Space", "Spec", "Step", "Units"]
