"""Convex quadratic programs are found as such and solved exactly, against SciPy and against certificates."""

import numpy as np
import pytest
import scipy.optimize
import torch

from rlamort.domain import Affine, Ball, Box, CappedSimplex, Euclid, Orthant, PerItem, Polyhedron, Product, Simplex
from rlamort.objective import Cost
from rlamort.parts import Setting, Solution
from rlamort.problem import Problem
from rlamort.solve.quadratic import Quadratic, exactly, minimise, quadratic

F64 = torch.float64
B = 12
SETS = {
    "box": lambda: Box([-1.0, 0.0, -2.0, 0.5], [2.0, 1.0, 0.0, 4.0]),
    "orthant": lambda: Orthant(4),
    "simplex": lambda: Simplex(4),
    "capped simplex": lambda: CappedSimplex(4, 2.5),
    "space": lambda: Euclid(4),
    "affine": lambda: Affine([[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.0, 2.0]], [1.0, 0.5]),
    "polyhedron": lambda: Polyhedron(torch.randn(6, 4, generator=_seeded(3)), -1.0, 1.0, torch.ones(1, 4), [0.1]),
    "product": lambda: Product([Simplex(2), Box([-1.0, -1.0], [1.0, 0.5])]),
    "of items": lambda: Polyhedron(torch.eye(4), PerItem(4), 3.0, torch.ones(1, 4), PerItem(1)).bind(
        {"low": -torch.rand(B, 4, generator=_seeded(4)), "b": torch.rand(B, 1, generator=_seeded(5))}
    ),
    "matrices of items": lambda: Polyhedron(PerItem(5, 4), -1.0, 1.0).bind({"A": torch.randn(B, 5, 4, generator=_seeded(6))}),
    "box of items": lambda: Box(PerItem(4), PerItem(4)).bind({"low": -torch.ones(B, 4), "high": torch.rand(B, 4)}),
}  # fmt: skip


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def program(rank, shared, seed=0):
    size = () if shared else (B,)
    root = torch.randn(*size, 4, rank, generator=_seeded(seed), dtype=F64)
    return Quadratic(root @ root.mT, torch.randn(B, 4, generator=_seeded(seed + 1), dtype=F64))


def value(one, y):
    return 0.5 * torch.einsum("...i,...ij,...j->...", y, one.Q, y) + (one.q * y).sum(-1)


def by_scipy(one, domain, item):
    """The minimum over the polyhedron by an interior-point method, an item at a time."""
    Q = (one.Q if one.Q.ndim == 2 else one.Q[item]).numpy()
    data = {k: (v if v.ndim == (2 if k in "EA" else 1) else v[item]).numpy() for k, v in domain.polyhedral().items()}
    bounds = [scipy.optimize.LinearConstraint(data["E"], data["b"], data["b"])] if len(data["b"]) else []
    bounds += [scipy.optimize.LinearConstraint(data["A"], data["low"], data["high"])] if len(data["low"]) else []
    q = one.q[item].numpy()
    found = scipy.optimize.minimize(
        lambda y: 0.5 * y @ Q @ y + q @ y, np.full(4, 0.1), jac=lambda y: Q @ y + q, constraints=bounds, method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    return found.fun


@pytest.mark.parametrize("shared", [True, False], ids=["one Q", "Q of items"])
@pytest.mark.parametrize("name", SETS)
def test_the_solution_is_scipys(name, shared):
    domain, one = SETS[name](), program(4, shared)
    y = minimise(one, domain)
    assert domain.violation(y).max() < 1e-13
    best = torch.tensor([by_scipy(one, domain, i) for i in range(B)], dtype=F64)
    torch.testing.assert_close(value(one, y), best, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["box", "simplex", "capped simplex", "product"])
def test_a_singular_program_is_solved_too(name, rank):
    """Linear programs are those of rank 0; the duality gap by `linear` is 0."""
    domain, one = SETS[name](), program(rank, True)
    y = minimise(one, domain)
    slope = y @ one.Q + one.q
    assert domain.violation(y).max() < 1e-13
    assert (slope * (y - domain.linear(slope))).sum(-1).max() < 1e-9


def test_what_is_not_convex_has_no_solution_here():
    one = program(4, False)
    one.Q[3] = -one.Q[3]
    y = minimise(one, SETS["box"]())
    assert y.isnan().any(-1).tolist() == [i == 3 for i in range(B)]


class Tracking(Problem):
    """A quadratic cost of parameters in x."""

    domain = Box([-1.0] * 4, [1.0] * 4)

    def contexts(self, count):
        return {"to": 2 * torch.randn(count, 4), "weight": 0.1 + torch.rand(count, 4)}

    def cost(self, y, x):
        return (x["weight"] * (y - x["to"]).square()).sum(-1) + y.sum(-1).square()


class Quartic(Tracking):
    def cost(self, y, x):
        return super().cost(y, x) + 1e-3 * y.pow(4).sum(-1)


class Round(Tracking):
    domain = Ball(4, 1.0)


class Bent(Tracking):
    """Not differentiable in torch."""

    def cost(self, y, x):
        return super().cost(y, x).detach()


def rows(problem):
    torch.manual_seed(0)
    return problem.layout.pack(problem.contexts(B)).double()


def test_a_cost_is_recognised_by_its_gradients():
    problem = Tracking()
    x = rows(problem)
    found = quadratic(Cost(problem), x, 4)
    weight = problem.layout.unpack(x)["weight"]
    torch.testing.assert_close(found.Q, torch.diag_embed(2 * weight) + 2, rtol=1e-12, atol=1e-12)
    y = exactly(Cost(problem), problem.domain, x)
    residual = (y - problem.domain.nearest(y - Cost(problem).oracle(x).grad(y))).norm(dim=-1)
    assert residual.max() < 1e-12


@pytest.mark.parametrize("kind", [Quartic, Round, Bent])
def test_what_is_no_quadratic_program_is_left_to_others(kind):
    problem = kind()
    assert exactly(Cost(problem), problem.domain, rows(problem)) is None


def test_float32_is_not_precise_enough_to_tell():
    assert quadratic(Cost(Tracking()), rows(Tracking()).float(), 4) is None


class Dented(Tracking):
    """Quadratic where it is probed, and not near its solution."""

    def cost(self, y, x):
        near = (y - 0.1).square().sum(-1)
        return super().cost(y, x) + 5 * (-1e4 * near).exp() * y[:, 0]


def test_what_only_looks_quadratic_is_no_solution():
    problem = Dented()
    x = problem.layout.pack({"to": torch.full((B, 4), 0.5), "weight": torch.ones(B, 4)}).double()
    assert quadratic(Cost(problem), x, 4) is not None
    assert exactly(Cost(problem), problem.domain, x).isnan().all()


class Steep(Tracking):
    """Not convex for the first item."""

    def cost(self, y, x):
        return (x["weight"] * (y - x["to"]).square()).sum(-1)


def test_a_teacher_searches_for_items_that_are_no_convex_program():
    problem = Steep()
    torch.manual_seed(0)
    teacher, x = Solution()(Setting.of(problem, (8,))), problem.contexts(B)
    x["weight"][0] = -1.0
    y = teacher(problem.layout.pack(x))
    assert y.isfinite().all()
    assert problem.domain.violation(y).max() < 1e-6
    torch.testing.assert_close(y[1:], problem.domain.nearest(x["to"])[1:], rtol=1e-5, atol=1e-5)
