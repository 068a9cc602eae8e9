"""Y, where solutions live, and P(Y), densities over it."""

from rlamort.domain.base import LARGEST, Data, Domain, PerItem, nearest_each, project_each, slack, within
from rlamort.domain.birkhoff import Birkhoff
from rlamort.domain.cones import PSD, ExponentialCone, SecondOrderCone
from rlamort.domain.context import ContextDomain
from rlamort.domain.density import Density, Gaussian, Point, SquashedGaussian
from rlamort.domain.items import Ball
from rlamort.domain.noise import NOISES, FreshNoise, HeldNoise
from rlamort.domain.polyhedron import Affine, Polyhedron
from rlamort.domain.rows import Rows
from rlamort.domain.sets import Box, CappedSimplex, Euclid, Orthant, Product, Simplex, Sphere, unit_box
from rlamort.domain.weights import Weights

__all__ = [
    "LARGEST", "NOISES", "PSD", "Affine", "Ball", "Birkhoff", "Box", "CappedSimplex", "ContextDomain", "Data", "Density",
    "Domain", "Euclid", "ExponentialCone", "FreshNoise", "Gaussian", "HeldNoise", "Orthant", "PerItem", "Point", "Polyhedron",
    "Product", "Rows", "SecondOrderCone", "Simplex", "Sphere", "SquashedGaussian", "Weights", "nearest_each", "project_each",
    "slack", "unit_box", "within",
]  # fmt: skip
