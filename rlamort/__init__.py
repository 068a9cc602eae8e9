"""rlamort: reinforcement learning and control in which a policy is an amortization model.

>>> import rlamort as ra
>>> agent = ra.SAC("InvertedPendulum-v5", seed=0).learn(10_000)
>>> action, _ = agent.predict(observation, deterministic=True)

Names are loaded when they are first used, so that importing the package is quick and needs none of its neighbours.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from rlamort.errors import Fault, UserError

# Threads spin while they wait for each other, by default about as long as a scheduler's time slice, so training nearly stops
# on a busy machine. This shortens the spinning; GNU's OpenMP reads it when torch is imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "3000"

if TYPE_CHECKING:
    from rlamort.domain import (
        PSD,
        Affine,
        Ball,
        Birkhoff,
        Box,
        CappedSimplex,
        Euclid,
        ExponentialCone,
        Gaussian,
        Orthant,
        PerItem,
        Polyhedron,
        Product,
        SecondOrderCone,
        Simplex,
        Sphere,
        SquashedGaussian,
    )
    from rlamort.measure.fit import amortize, load_solver
    from rlamort.problem import Problem
    from rlamort.run.learner import Learner
    from rlamort.run.restore import load, resume
    from rlamort.solve.solver import Solver
    from rlamort.update import Anytime

    SAC: type[Learner]
    TD3: type[Learner]
    DDPG: type[Learner]

HOMES = {
    "run.learner": ("Learner",),
    "run.restore": ("load", "resume"),
    "problem": ("Problem",),
    "measure.fit": ("amortize", "load_solver"),
    "solve.solver": ("Solver",),
    "update": ("Anytime",),
    "domain": (
        "PSD", "Affine", "Ball", "Birkhoff", "Box", "CappedSimplex", "Euclid", "ExponentialCone", "Gaussian", "Orthant",
        "PerItem", "Polyhedron", "Product", "SecondOrderCone", "Simplex", "Sphere", "SquashedGaussian",
    ),
}  # fmt: skip

__all__ = [
    "DDPG", "PSD", "SAC", "TD3", "Affine", "Anytime", "Ball", "Birkhoff", "Box", "CappedSimplex", "Euclid", "ExponentialCone",
    "Fault", "Gaussian", "Learner", "Orthant", "PerItem", "Polyhedron", "Problem", "Product", "SecondOrderCone", "Simplex",
    "Solver", "Sphere", "SquashedGaussian", "UserError", "amortize", "load", "load_solver", "resume",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            globals()[name] = found = getattr(importlib.import_module(f"rlamort.{module}"), name)
            return found
    if name.isupper():  # every method in configs/method is a class here, in capitals
        from rlamort.config import methods

        if name.lower() in methods():
            from rlamort.run.learner import learner_class

            globals()[name] = made = learner_class(name.lower())
            return made
    raise AttributeError(f"module 'rlamort' has no attribute {name!r}")
