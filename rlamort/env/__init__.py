"""X with dynamics: what an agent acts in."""

from rlamort.env.base import Env, Episode, Policy, Solutions, Space, Spec, Step, Units

__all__ = ["Env", "Episode", "Policy", "Solutions", "Space", "Spec", "Step", "Units"]
