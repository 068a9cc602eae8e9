"""rlamort: reinforcement learning and control in which a policy is an amortization model.

>>> import rlamort as ra
>>> agent = ra.SAC("InvertedPendulum-v5", seed=0).learn(10_000)
>>> action, _ = agent.predict(observation, deterministic=True)

Names are loaded when they are first used, so that importing the package is quick and needs none of its neighbours.
"""

from typing import TYPE_CHECKING, Any

from rlamort.errors import Fault, UserError

if TYPE_CHECKING:
    from rlamort.run import Learner, load

    SAC: type[Learner]
    TD3: type[Learner]
    DDPG: type[Learner]

__all__ = ["DDPG", "SAC", "TD3", "Fault", "Learner", "UserError", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Learner", "load"):
        import rlamort.run

        return getattr(rlamort.run, name)
    if name.isupper():  # every method in configs/method is a class here, in capitals
        from rlamort.config import methods

        if name.lower() in methods():
            from rlamort.run import learner_class

            globals()[name] = made = learner_class(name.lower())
            return made
    raise AttributeError(f"module 'rlamort' has no attribute {name!r}")
