"""Constraints of problems: what is refused, the augmented Lagrangian beside known solutions and SciPy, losses under them."""

import math
from collections.abc import Callable

import pytest
import torch
from test_cli import rlamort
from torch import Tensor
from torch.autograd import gradcheck

import rlamort as ra
from rlamort.constraints import AugmentedLagrangian, Constraints, Multipliers, Penalised, Predicted
from rlamort.domain import Box, Domain, Euclid, Orthant, PerItem, Simplex, within
from rlamort.errors import UserError
from rlamort.measure.check import check
from rlamort.measure.fit import report
from rlamort.objective import Cost, Oracle
from rlamort.problem import Problem
from rlamort.run.learner import learner_class
from rlamort.solve.by_scipy import by_scipy
from rlamort.solve.lagrangian import augmented_lagrangian, kkt
from rlamort.source import Contexts

F64 = torch.float64
Columns = Callable[..., list[Tensor]]


class Named(Problem[Tensor]):
    """A problem of one context, by functions of its coordinates: f, equalities h = 0 and inequalities g <= 0."""

    def __init__(self, domain: Domain, f: Callable[..., Tensor], h: Columns, g: Columns) -> None:
        super().__init__()
        self.domain, self.f, self.h, self.g = domain, f, h, g

    def contexts(self, count: int) -> Tensor:
        return torch.zeros(count, 1)

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return self.f(*y.T)

    def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, g = (torch.stack(rows(*y.T), -1) if rows(*y.T) else y[:, :0] for rows in (self.h, self.g))
        return h, g


def none(*y: Tensor) -> list[Tensor]:
    return []


# problems of Hock and Schittkowski (1981), by number: the problem, its start, its solution, and the multipliers, where they are
# known in closed form
HS: dict[int, tuple[Named, list[float], list[float], list[float]]] = {
    6: (Named(Euclid(2), lambda a, b: (1 - a) ** 2, lambda a, b: [10 * (b - a**2)], none), [-1.2, 1], [1, 1], [0]),
    7: (
        Named(Euclid(2), lambda a, b: (1 + a**2).log() - b, lambda a, b: [(1 + a**2) ** 2 + b**2 - 4], none),
        [2, 2], [0, math.sqrt(3)], [1 / (2 * math.sqrt(3))],
    ),
    10: (
        Named(Euclid(2), lambda a, b: a - b, none, lambda a, b: [3 * a**2 - 2 * a * b + b**2 - 1]),
        [-10, 10], [0, 1], [0.5],
    ),
    12: (
        Named(Euclid(2), lambda a, b: a**2 / 2 + b**2 - a * b - 7 * a - 7 * b, none, lambda a, b: [4 * a**2 + b**2 - 25]),
        [0, 0], [2, 3], [0.5],
    ),
    21: (
        Named(Box([2, -50], [50, 50]), lambda a, b: a**2 / 100 + b**2 - 100, none, lambda a, b: [10 - 10 * a + b]),
        [2, -1], [2, 0], [0],
    ),
    28: (
        Named(Euclid(3), lambda a, b, c: (a + b) ** 2 + (b + c) ** 2, lambda a, b, c: [a + 2 * b + 3 * c - 1], none),
        [-4, 1, 1], [0.5, -0.5, 0.5], [0],
    ),
    35: (
        Named(
            Orthant(3),
            lambda a, b, c: 9 - 8 * a - 6 * b - 4 * c + 2 * a**2 + 2 * b**2 + c**2 + 2 * a * b + 2 * a * c,
            none,
            lambda a, b, c: [a + b + 2 * c - 3],
        ),
        [0.5, 0.5, 0.5], [4 / 3, 7 / 9, 4 / 9], [2 / 9],
    ),
    39: (
        Named(Euclid(4), lambda a, b, c, d: -a, lambda a, b, c, d: [b - a**3 - c**2, a**2 - b - d**2], none),
        [2, 2, 2, 2], [1, 1, 0, 0], [-1, -1],
    ),
    71: (
        Named(
            Box([1] * 4, [5] * 4),
            lambda a, b, c, d: a * d * (a + b + c) + c,
            lambda a, b, c, d: [a**2 + b**2 + c**2 + d**2 - 40],
            lambda a, b, c, d: [25 - a * b * c * d],
        ),
        [1, 5, 5, 1], [1, 4.74299963, 3.82114998, 1.37940829], [0.16146857, 0.55229366],
    ),
}  # fmt: skip


def solved(problem: Problem, x: Tensor, starts: Tensor, **keywords: float):
    return augmented_lagrangian(Cost(problem), Constraints.of(problem), problem.domain, x, starts, **keywords)


def dual(multipliers: Multipliers) -> Tensor:
    return torch.cat([multipliers.equality, multipliers.inequality], -1)


@pytest.mark.parametrize(("dtype", "near"), [(F64, 1e-5), (torch.float32, 5e-3)])
@pytest.mark.parametrize("number", HS)
def test_problems_of_hock_and_schittkowski_are_solved_from_their_starts(number, dtype, near):
    problem, start, solution, multipliers = HS[number]
    found = solved(problem, torch.zeros(1, 1, dtype=dtype), torch.tensor([[start]], dtype=dtype))
    assert found.status == ["solved"]
    assert torch.allclose(found.y[0], torch.tensor(solution, dtype=dtype), atol=near)
    assert torch.allclose(dual(found.multipliers)[0], torch.tensor(multipliers, dtype=dtype), atol=near)
    assert within(problem.domain, found.y).all()


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_scipy_finds_the_same(method):
    for number in (6, 12, 35, 39, 71):
        problem, start, solution, multipliers = HS[number]
        found = by_scipy(problem, torch.zeros(1, 1), torch.tensor([start]), method)
        assert found.status == ["solved"], number
        assert found.y.dtype is F64
        assert torch.allclose(found.y[0], torch.tensor(solution, dtype=F64), atol=1e-4)
        assert torch.allclose(dual(found.multipliers)[0], torch.tensor(multipliers, dtype=F64), atol=1e-4)


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
@pytest.mark.parametrize("domain", [Simplex(3), Box([0.0] * 3, [1.0] * 3)])
def test_scipy_takes_problems_without_constraints(method, domain):
    problem = Named(domain, lambda a, b, c: (a - 0.5) ** 2 + (b - 0.3) ** 2 + (c - 0.2) ** 2, none, none)
    found = by_scipy(problem, torch.zeros(1, 1), torch.full((1, 3), 0.4), method)
    assert found.status == ["solved"]
    assert torch.allclose(found.y[0], torch.tensor([0.5, 0.3, 0.2], dtype=F64), atol=1e-4)


class Quadratic(Problem[dict[str, Tensor]]):
    """1/2 y' Q y + q y with fixed rows A y = b(x) and G y <= c(x), strongly convex, over a box."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        n, m, k = 6, 2, 4
        self.domain = Box([-1.0] * n, [1.0] * n)
        root = torch.randn(n, n, dtype=F64)
        self.register_buffer("Q", root @ root.T / n + torch.eye(n, dtype=F64))
        self.register_buffer("A", torch.randn(m, n, dtype=F64))
        self.register_buffer("G", torch.randn(k, n, dtype=F64))
        self.scale = scale

    def contexts(self, count: int) -> dict[str, Tensor]:
        centre = 0.5 * torch.rand(count, 6, dtype=F64) - 0.25
        c = centre @ self.G.double().T + 0.1 * torch.rand(count, 4, dtype=F64)
        return {"q": 2 * torch.randn(count, 6, dtype=F64), "b": centre @ self.A.double().T, "c": c}

    def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return 0.5 * ((y @ self.Q.to(y)) * y).sum(-1) + (x["q"].to(y) * y).sum(-1)

    def constraints(self, y: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        units = torch.tensor([1.0, self.scale, self.scale, 1.0]).to(y)
        return self.scale * (y @ self.A.T.to(y) - x["b"]), units * (y @ self.G.T.to(y) - x["c"])


def quadratics(count: int, problem: Quadratic) -> Tensor:
    torch.manual_seed(0)
    return problem.layout.pack(problem.contexts(count))


def test_multipliers_of_convex_programs_are_those_of_scipy():
    problem = Quadratic()
    x = quadratics(8, problem)
    found = solved(problem, x, torch.zeros(1, 8, 6, dtype=F64))
    reference = by_scipy(problem, x, torch.zeros(8, 6, dtype=F64))
    assert found.solved.all()
    assert (reference.residual < 1e-6).all()
    assert (reference.multipliers.inequality > 1e-3).any(0).sum() >= 3  # inequalities that matter
    assert torch.allclose(found.y, reference.y, atol=1e-5)
    assert torch.allclose(found.cost, reference.cost, atol=1e-5)
    assert torch.allclose(dual(found.multipliers), dual(reference.multipliers), atol=1e-4)
    f, constraints = Cost(problem), Constraints.of(problem)
    stationarity, complementarity = kkt(f, constraints, problem.domain, found.y, x, found.multipliers)
    assert stationarity.max() < 1e-4
    assert complementarity.max() < 1e-4
    shifted = found.multipliers._replace(inequality=found.multipliers.inequality + 0.1)
    assert all((part > 1e-3).any() for part in kkt(f, constraints, problem.domain, found.y, x, shifted))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_the_unit_of_a_row_changes_no_answer(scale):
    x = quadratics(4, Quadratic())
    plain, scaled = (solved(Quadratic(unit), x, torch.zeros(1, 4, 6, dtype=F64)) for unit in (1.0, scale))
    assert scaled.solved.all()
    assert torch.allclose(plain.y, scaled.y, atol=1e-5)
    assert torch.allclose(plain.multipliers.equality, scale * scaled.multipliers.equality, atol=1e-4)


def test_an_answer_does_not_depend_on_its_batch():
    """Beside copies of itself, and not alone: products of matrices of another size are rounded otherwise on some machines."""
    problem = Quadratic()
    x = quadratics(5, problem)
    starts = torch.zeros(2, 5, 6, dtype=F64)
    starts[1] = 0.5
    together = solved(problem, x, starts)
    for i in range(5):
        alike = solved(problem, x[[i] * 5], starts[:, [i] * 5])
        assert torch.allclose(together.y[i], alike.y[i], rtol=0, atol=1e-12)
        assert torch.equal(together.iterations[i], alike.iterations[i])
        assert together.status[i] == alike.status[i]


def test_float64_refines_float32():
    problem = Quadratic()
    x = quadratics(6, problem)
    single = solved(problem, x.float(), torch.zeros(1, 6, 6))
    exact = solved(problem, x, single.y.double()[None])
    assert single.y.dtype is torch.float32
    assert single.solved.all()
    assert exact.solved.all()
    assert (exact.violation <= 1e-6).all()
    assert exact.violation.max() < single.violation.max()
    assert exact.residual.max() < single.residual.max()
    assert torch.allclose(single.y.double(), exact.y, atol=5e-3)


class Ring(Problem[Tensor]):
    """The point nearest to (2, 0) with |y| >= inner and |y| <= outer: where x = (inner, outer) crosses, there is none."""

    domain = Box([-3.0, -3.0], [3.0, 3.0])

    def contexts(self, count: int) -> Tensor:
        return torch.rand(count, 2) + torch.tensor([0.0, 1.0])

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return (y - y.new_tensor([2.0, 0.0])).square().sum(-1)

    def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        square = y.square().sum(-1, keepdim=True)
        return y[:, :0], torch.cat([x[:, :1] ** 2 - square, square - x[:, 1:2] ** 2], -1)


def test_an_item_without_feasible_points_is_infeasible_alone():
    x = torch.tensor([[0.5, 1.0], [1.5, 1.0], [0.5, 1.5]], dtype=F64)
    starts = torch.tensor([[0.3, 0.4], [-0.5, 0.2], [-1.0, -2.0]], dtype=F64)[:, None].expand(-1, 3, -1)
    found = solved(Ring(), x, starts)
    assert found.status[0] == found.status[2] == "solved"
    assert torch.allclose(found.y[[0, 2]], torch.tensor([[1.0, 0.0], [1.5, 0.0]], dtype=F64), atol=1e-5)
    assert found.status[1].startswith("infeasible: the violation, 0.625, is stationary there")
    assert found.solved.tolist() == [True, False, True]
    assert found.cost[1].isnan()
    assert found.violation[1].item() == pytest.approx(0.625, abs=1e-3)  # the squares are 2.25 and 1: halfway between them
    assert within(Ring.domain, found.y).all()


def test_a_start_from_which_descent_gets_stuck_is_not_the_item():
    """At the origin the violation of |y| >= 0.5 is stationary: one start is stuck there, the other is not."""
    x = torch.tensor([[0.5, 1.0]], dtype=F64)
    alone = solved(Ring(), x, torch.zeros(1, 1, 2, dtype=F64) + torch.tensor([0.0, 0.7]))
    both = solved(Ring(), x, torch.tensor([[[0.0, 0.0]], [[0.0, 0.7]]], dtype=F64))
    assert alone.status == both.status == ["solved"]
    assert torch.allclose(alone.y, both.y, atol=1e-5)


def test_iterates_stay_in_a_domain_that_comes_with_each_item():
    class Boxed(Problem[Tensor]):
        """The largest sum with |y| <= 1, in the box [-x, x]."""

        def __init__(self) -> None:
            super().__init__()
            self.domain = Box(PerItem(2), PerItem(2))
            self.asked: list[Tensor] = []

        def contexts(self, count: int) -> Tensor:
            return torch.rand(count, 2) + 0.1

        def domain_data(self, x: Tensor) -> dict[str, Tensor]:
            return {"low": -x, "high": x}

        def cost(self, y: Tensor, x: Tensor) -> Tensor:
            self.asked.append((y.abs() - x).amax().detach())
            return -y.sum(-1)

        def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return y[:, :0], y.square().sum(-1, keepdim=True) - 1

    problem, x = Boxed(), torch.tensor([[0.6, 2.0], [0.5, 0.5], [2.0, 2.0]], dtype=F64)
    found = solved(problem, x, torch.zeros(1, 3, 2, dtype=F64))
    assert found.solved.all()
    assert torch.allclose(found.y, torch.tensor([[0.6, 0.8], [0.5, 0.5], [0.5**0.5] * 2], dtype=F64), atol=1e-5)
    assert max(problem.asked) <= 0
    reference = by_scipy(problem, x, torch.zeros(3, 2, dtype=F64))
    assert torch.allclose(found.y, reference.y, atol=1e-5)


def lagrangian(problem: Problem, x: Tensor) -> tuple[AugmentedLagrangian, Tensor, Multipliers]:
    torch.manual_seed(3)
    over = AugmentedLagrangian(Cost(problem), Constraints.of(problem))
    m, k = over.constraints.sizes
    held = Multipliers(
        torch.randn(len(x), m).double(), torch.rand(len(x), k).double(), torch.rand(len(x), m + k).double() + 0.5
    )
    return over, over.contexts(x, held), held


def test_the_augmented_lagrangian_is_what_it_is_called():
    problem = Quadratic()
    x = quadratics(7, problem)
    over, contexts, held = lagrangian(problem, x)
    y = torch.randn(7, 6, dtype=F64)
    h, g = problem.constraints(y, problem.layout.unpack(x))
    rho_h, rho_g = held.penalty.split([2, 4], -1)
    # Birgin and Martinez's form, less the constant
    square = (rho_h / 2 * (h + held.equality / rho_h) ** 2).sum(-1) + (
        rho_g / 2 * (g + held.inequality / rho_g).clamp_min(0) ** 2
    ).sum(-1)
    constant = (held.equality**2 / (2 * rho_h)).sum(-1) + (held.inequality**2 / (2 * rho_g)).sum(-1)
    assert torch.allclose(over(y, contexts), Cost(problem)(y, x) + square - constant)
    assert gradcheck(lambda at: over(at, contexts), y.requires_grad_())
    bare, parts = over.parts(contexts)
    assert torch.equal(bare, x)
    assert all(torch.equal(*pair) for pair in zip(parts, held, strict=True))
    # the update of the multipliers makes its gradient the Lagrangian's
    slope = Oracle(over, contexts).grad(y.detach())
    after = held.updated(h, g)
    still = over.contexts(x, after._replace(penalty=torch.full_like(held.penalty, 1e-12)))
    active = (after.inequality > 0).double()
    flat = Quadratic()
    flat.constraints = lambda y, x: tuple(
        part * keep for part, keep in zip(problem.constraints(y, x), (1.0, active), strict=True)
    )
    assert torch.allclose(Oracle(AugmentedLagrangian(Cost(flat), Constraints(flat, (2, 4))), still).grad(y.detach()), slope)


def test_oracles_of_objectives_under_constraints_read_nothing_hidden():
    class Hidden(Quadratic):
        hidden = ("label",)

        def contexts(self, count: int) -> dict[str, Tensor]:
            return super().contexts(count) | {"label": torch.full((count, 1), math.nan, dtype=F64)}

        def cost(self, y: Tensor, x: dict[str, Tensor]) -> Tensor:
            return super().cost(y, x) + (x["label"][:, 0] if "label" in x else 0)

    problem = Hidden()
    x = quadratics(3, problem)
    over, contexts, _ = lagrangian(problem, x)
    y = torch.zeros(3, 6, dtype=F64)
    for f, at in ((over, contexts), (Penalised(Cost(problem), over.constraints, 10.0), x)):
        assert f(y, at).isnan().all()
        assert f.oracle(at).value(y).isfinite().all()
        assert torch.equal(f.seen(at), x[:, :12])
        several = torch.randn(2, 3, 6, dtype=F64)
        oracle = f.oracle(at)
        assert torch.allclose(oracle.values(several), torch.stack([oracle.value(one) for one in several]))


def test_a_penalty_is_the_squared_violation():
    problem, x = Ring(), torch.tensor([[0.5, 1.0], [0.5, 1.0]])
    f = Penalised(Cost(problem), Constraints.of(problem), 10.0)
    cost, metrics = f.report(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), x)
    assert torch.allclose(cost, torch.tensor([5 * 9.0, 1.0]))
    assert metrics["violation"] == 1.5
    assert metrics["violation_max"] == 3
    assert metrics["cost"] == 0.5


class Wrong(Ring):
    """What `constraints` must not return."""

    def __init__(self, values: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.values = values

    def constraints(self, y: Tensor, x: Tensor):
        return self.values(y, x)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda y, x: y, r"Wrong.constraints: a Tensor is returned; a pair is needed, equalities \(B, m\) and"),
        (lambda y, x: (y, y, y), "3 values is returned; a pair"),
        (lambda y, x: (y, None), r"inequalities: a NoneType is returned; a tensor \(4, k\) is needed"),
        (lambda y, x: (y[:, 0], y), r"equalities: shape \(4,\) is returned for y of shape \(4, 2\); \(4, m\) is needed"),
        (lambda y, x: (y[:2], y), r"equalities: shape \(2, 2\) is returned"),
        (lambda y, x: (y, y > 0), "inequalities: torch.bool is returned; floating-point"),
        (lambda y, x: (y, y / 0 * 0), "inequality 0 is NaN at a point of Y"),
        (lambda y, x: (y - y.mean(0), y), "equality 0 of an item depends on the batch"),
        (lambda y, x: (y, y[:, :1] + x[:, :1].mean()), "inequality 0 of an item depends on the batch"),
    ],
)
def test_wrong_constraints_are_named(values, message):
    with pytest.raises(UserError, match=message):
        Constraints.of(Wrong(values))


def test_a_problem_in_float64_is_probed_in_float64():
    class Double(Ring):
        def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return y @ torch.ones(2, 1, dtype=F64), y[:, :0]

    assert Constraints.of(Double()).sizes == (1, 0)
    state = torch.get_rng_state()
    Constraints.of(Double())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_width_that_changes_is_named():
    constraints = Constraints.of(Wrong(lambda y, x: (y[:, :0], y if y[0, 0] < 100 else y[:, :1])))
    with pytest.raises(UserError, match=r"\(0, 1\) equalities and inequalities are returned; \(0, 2\), as before, are needed"):
        constraints(torch.full((2, 2), 200.0), torch.zeros(2, 2))


def test_problems_without_constraints_have_none():
    class Free(Ring):
        def constraints(self, y: Tensor, x: Tensor) -> None:
            return None

    assert Constraints.of(Free()) is None
    free = Constraints.none(Free())
    found = augmented_lagrangian(Cost(Free()), free, Free().domain, torch.zeros(1, 2), torch.zeros(1, 1, 2))
    assert found.status == ["solved"]
    assert torch.allclose(found.y, torch.tensor([[2.0, 0.0]]), atol=1e-3)
    assert free.violation(found.y, torch.zeros(1, 2)).tolist() == [0]


def test_bad_arguments_are_named():
    problem, x = Ring(), torch.tensor([[0.5, 1.0]])
    with pytest.raises(UserError, match=r"starts: shape \(1, 2\) is given; \(S, 1, 2\), S >= 1, is needed"):
        solved(problem, x, torch.zeros(1, 2))
    for name in ("tol", "outer", "inner"):
        with pytest.raises(UserError, match=f"{name}: 0 is given; a positive number"):
            solved(problem, x, torch.zeros(1, 1, 2), **{name: 0})
    with pytest.raises(UserError, match="method: 'BFGS' is given; allowed: SLSQP, trust-constr"):
        by_scipy(problem, x, torch.zeros(1, 2), "BFGS")
    with pytest.raises(UserError, match=r"y0: shape \(2, 2\) is given; \(1, 2\) is needed"):
        by_scipy(problem, x, torch.zeros(2, 2))


QUICK = {"hidden": (16,), "batch_size": 64, "steps": 5, "device": "cpu", "seed": 0}


class Disc(Problem[Tensor]):
    """The point of the unit disc that is nearest to x, where coordinates sum to 0: x projected onto the line, and shrunk."""

    domain = Box([-3.0, -3.0], [3.0, 3.0])

    def contexts(self, count: int) -> Tensor:
        return 2 * torch.randn(count, 2)

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return (y - x).square().sum(-1)

    def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return y.sum(-1, keepdim=True), y.square().sum(-1, keepdim=True) - 1

    def best(self, x: Tensor) -> Tensor:
        along = (x[:, 0] - x[:, 1]) / 2
        return along.clamp(-(0.5**0.5), 0.5**0.5)[:, None] * x.new_tensor([1.0, -1.0])


def trained(loss, steps, **keywords):
    return learner_class("amortize")(Disc(), loss=loss, **{**QUICK, "hidden": (32,), "steps": steps, **keywords}).learn(steps)


def test_learned_multipliers_violate_less_than_the_penalty_they_begin_with():
    torch.manual_seed(0)
    x, problem = Disc().contexts(500), Disc()
    constraints, distance, violation = Constraints.of(problem), {}, {}
    for name, loss in {
        "penalty": {"kind": "penalty", "weight": 2.0},
        "lagrangian": {"kind": "lagrangian", "weight": 2.0},
    }.items():
        y = trained(loss, 1200, learning_rate=3e-3).agent.act(x, explore=False).detach()
        distance[name] = (y - problem.best(x)).norm(dim=-1).mean().item()
        violation[name] = constraints.violation(y, x).mean().item()
    assert violation["lagrangian"] < 0.3 * violation["penalty"]
    assert distance["lagrangian"] < 0.5 * distance["penalty"]


def test_a_round_without_less_violation_raises_the_penalty():
    net, frozen = torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
    multipliers = Predicted(net, frozen, (1, 1), penalty=3.0, rate=0.5, bound=5.0, every=2, most=4.0)
    x, row = torch.zeros(4, 1), torch.ones(4, 1)
    seen = []
    for size in (1.0, 1.0, 0.5, 0.5, 0.45, 0.45, 1.0, 1.0, 1.0, 1.0):
        multipliers.follow(x, size * row, -0 * row)
        seen.append(multipliers.rho.item())
    assert seen == [3, 3, 3, 3, 3, 6, 6, 12, 12, 12]
    held = multipliers(x)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([100.0, -100.0]))
        frozen.load_state_dict(net.state_dict())
    held = multipliers(x)
    assert held.equality.max() == 5
    assert held.inequality.max() == 0
    before = frozen.bias.clone()
    with torch.no_grad():
        net.bias.zero_()
    multipliers.follow(x, row, row)
    assert torch.allclose(frozen.bias, before / 2)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_multipliers_learn_from_evaluate_alone_and_models_from_improve():
    agent = trained("lagrangian", 3).agent
    batch = Contexts(Disc().contexts(16))
    multipliers = agent.f.multipliers
    policy = [p.clone() for p in agent.owned]
    net = [p.clone() for p in multipliers.net.parameters()]
    metrics = agent.evaluate(batch)
    assert set(metrics) == {"multipliers/loss", "multipliers/penalty"}
    assert all(torch.equal(*pair) for pair in zip(policy, agent.owned, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(net, multipliers.net.parameters(), strict=True))
    net = [p.clone() for p in multipliers.net.parameters()]
    metrics = agent.improve(batch)
    assert {"model/cost", "model/violation", "model/violation_max"} <= set(metrics)
    assert all(torch.equal(*pair) for pair in zip(net, multipliers.net.parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(policy, agent.owned, strict=True))
    names = [name for name in agent.state_dict() if "frozen" in name]
    assert names
    assert all(name.startswith("model.multipliers.") for name in names)


@pytest.mark.parametrize("loss", ["penalty", {"kind": "lagrangian", "decay": 1.0}])
@pytest.mark.parametrize("model", ["full", "semi", "recurrent"])
def test_solvers_under_constraints_are_saved_and_predict_the_same(model, loss, tmp_path):
    solver = ra.amortize(Disc(), model=model, loss=loss, **QUICK)
    x = Disc().contexts(5)
    y = solver.predict(x)
    solver.save(tmp_path / "solver")
    again = ra.load_solver(tmp_path / "solver", Disc())
    assert torch.equal(again.predict(x), y)
    assert set(again.model.state_dict()) == set(solver.model.state_dict())


def test_steps_descend_on_the_penalised_cost():
    """Far outside, the penalty is what gradients show; the cost alone would leave x where it is."""
    solver = ra.amortize(Disc(), model={"kind": "semi", "steps": 20}, loss="penalty", **QUICK)
    x = torch.tensor([[2.5, 2.5]])
    start, *_, end = solver.model.iterates(x, solver.f.oracle(x))
    constraints = Constraints.of(Disc())
    assert constraints.violation(end, x).item() < 0.5 * constraints.violation(start, x).item() + 0.1


def test_an_update_under_constraints_compiles_to_the_same():
    eager, compiled = (trained("lagrangian", 30, compile=flag).agent for flag in (False, True))  # a fallback would warn
    for (name, one), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-5), name


def test_losses_that_do_not_fit_are_named(tmp_path):
    class Free(Disc):
        constraints = Problem.constraints

    for loss in ("objective", "iterates", "es"):
        with pytest.raises(
            UserError, match=f"loss={loss}: it ignores the constraints of Disc; loss=penalty or loss=lagrangian"
        ):
            ra.amortize(Disc(), loss=loss, **QUICK)
    for loss in ("penalty", "lagrangian"):
        with pytest.raises(UserError, match=f"loss={loss}: Free has no constraints; a problem with `constraints"):
            ra.amortize(Free(), loss=loss, **QUICK)
        with pytest.raises(UserError, match=f"loss={loss}: it needs a known problem"):
            learner_class("td3")("Pendulum-v1", loss=loss, device="cpu")
    with pytest.raises(UserError, match=r"loss=regress: Disc.solution is not known, and the search .* ignores constraints"):
        ra.amortize(Disc(), loss="regress", **QUICK)


class Shown(Disc):
    """With its solution, which a regression learns from."""

    def solution(self, x: Tensor) -> Tensor:
        return self.best(x)


def test_a_regression_is_of_models_that_do_not_ask_for_the_cost():
    """Steps on the cost, and a choice by it, would leave the feasible set that the solutions lie in."""
    x = Shown().contexts(200)
    violation = Constraints.of(Shown()).violation
    for model in ("full", "mip"):
        solver = ra.amortize(Shown(), model=model, loss="regress", **{**QUICK, "steps": 600, "learning_rate": 1e-2})
        assert violation(solver.predict(x), x).mean() < 0.1, model
    said = "loss=regress, model={}: the model asks for the cost, which knows nothing of the constraints of Shown"
    for model in ("choice", "semi", "recurrent", "latent"):
        with pytest.raises(UserError, match=said.format(model)):
            ra.amortize(Shown(), model=model, loss="regress", **QUICK)
    with pytest.raises(UserError, match=rf"Shown: what does not fit together\n  semi, regress: {said.format('semi')}"):
        report(Shown(), ["full", "semi"], ["regress"], **QUICK)
    looked = check(Shown())
    assert looked.ok  # cheaper points that meet no constraint are no objection to a solution
    (fit,) = (fit for fit in looked.losses if fit.name == "regress")
    assert fit.fits
    assert "models that do not ask for the cost" in fit.why


@pytest.mark.parametrize(
    ("solution", "said"),
    [(lambda x: x.clamp(-3, 3), "it violates the constraints by up to"), (lambda x: 0 * x, "was found in a few trials")],
)
def test_a_solution_is_checked_among_points_that_meet_the_constraints(solution, said):
    class Claimed(Disc):
        def solution(self, x: Tensor) -> Tensor:
            return solution(x)

        def constraints(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return y[:, :0], super().constraints(y, x)[1]

    (line,) = (line for line in check(Claimed()).lines if line.what == "solution")
    assert line.verdict == "fail"
    assert said in line.detail


def test_the_command_line_trains_under_constraints(tmp_path):
    quick = ["hidden=[8]", "steps=4", "eval_episodes=2", "eval_every=4", "log_every=1", "device=cpu"]
    words = ["train", "amortize", "env=rlamort/ObstacleArm-v0", *quick]
    rlamort(*words, "loss=penalty", "loss.weight=50", "dir=one", cwd=tmp_path)
    rlamort(*words, "loss=lagrangian", "loss.rate=0.1", "dir=two", cwd=tmp_path)
    records = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert "multipliers/penalty" in records
    assert "model/violation" in records
