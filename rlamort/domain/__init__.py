"""Y, where solutions live, and P(Y), densities over it."""

from rlamort.domain.base import LARGEST, Domain, finite, within
from rlamort.domain.birkhoff import Birkhoff
from rlamort.domain.cones import PSD, ExponentialCone, SecondOrderCone
from rlamort.domain.density import Density, Gaussian, SquashedGaussian
from rlamort.domain.sets import Box, CappedSimplex, Euclid, Orthant, Product, Simplex, Sphere, unit_box
from rlamort.domain.weights import Weights

__all__ = [
    "LARGEST", "PSD", "Birkhoff", "Box", "CappedSimplex", "Density", "Domain", "Euclid", "ExponentialCone", "Gaussian",
    "Orthant", "Product", "SecondOrderCone", "Simplex", "Sphere", "SquashedGaussian", "Weights", "finite", "unit_box",
    "within",
]  # fmt: skip
