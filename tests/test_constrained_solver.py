"""Problems with constraints as a user meets them: solve, certificates, reports, environments."""

import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort.constraints import Constraints
from rlamort.domain import Box
from rlamort.env.make import open_env
from rlamort.env.one_step import single, vector
from rlamort.errors import UserError
from rlamort.measure import fit
from rlamort.measure.check import check
from rlamort.measure.fit import compare, report
from rlamort.objective import Cost
from rlamort.problem import Problem
from rlamort.solve.by_scipy import by_scipy
from rlamort.solve.constrained import UnderConstraints, estimated

QUICK = {"steps": 40, "hidden": (16,), "batch_size": 32, "seed": 0}


class Pipe(Problem):
    """The cheapest flow y through two pipes in series, nonlinear in the pressure x."""

    domain = Box([0.1, 0.1, 0.1], [3.0, 3.0, 3.0])
    violation_penalty = 10.0

    def contexts(self, count):
        return 0.5 + torch.rand(count, 2)

    def cost(self, y, x):
        return (y - 2).square().sum(-1) + x[:, 0] * y[:, 2]

    def constraints(self, y, x):
        return (y[:, 0] * y[:, 1] - x[:, 1])[:, None], (y.square().sum(-1) - 4)[:, None]


class Unpriced(Pipe):
    violation_penalty = 0.0


class Broken(Pipe):
    """No point meets the constraints where the pressure is above 1."""

    def constraints(self, y, x):
        h, g = super().constraints(y, x)
        return h + torch.where(x[:, :1] > 1, 100.0, 0.0), g


def violation(y, x, kind=Pipe):
    return Constraints.of(kind()).violation(y, x)


@pytest.fixture(scope="module")
def solver():
    return ra.amortize(Pipe, loss="lagrangian", **QUICK)


def test_solutions_are_those_of_scipy_and_their_violation_is_said(solver):
    torch.manual_seed(0)
    x = Pipe().contexts(12)
    answer = solver.solve(x, tol=1e-4)
    assert answer.kind == "KKT residual"
    assert set(answer.status) <= {"predicted", "re-solved"}
    assert answer.violation.max() < 1e-5
    torch.testing.assert_close(answer.violation, violation(answer.y, x), rtol=1e-3, atol=1e-6)
    best = by_scipy(Pipe(), x.double(), answer.y.double())
    torch.testing.assert_close(answer.cost.double(), best.cost, rtol=1e-4, atol=1e-4)
    elsewhere = by_scipy(Pipe(), x.double(), torch.full((12, 3), 0.7, dtype=torch.float64))
    assert (answer.cost.double() <= elsewhere.cost + 1e-4).all()
    wide = solver.solve(x, tol=1e-6, dtype=torch.float64)
    assert wide.violation.max() < 1e-6
    assert (wide.cost - best.cost).abs().max() < 1e-5


class Steep(Pipe):
    """The same in other units, of which a rounding of y to float32 is many."""

    def constraints(self, y, x):
        h, g = super().constraints(y, x)
        return 1e5 * h, 1e5 * g


class Measured(Steep):
    """With a residual that rounding moves."""

    def residual(self, y, x):
        return self.constraints(y, x)[0].abs()[:, 0]


def test_rows_that_are_steep_are_met_where_rounding_leaves_no_nearer_point():
    """They were compared in their own units: every item was said to have no feasible point."""
    torch.manual_seed(0)
    solver, x = ra.amortize(Steep, loss="penalty", **QUICK), Pipe().contexts(12)
    answer = solver.solve(x, tol=1e-4)
    best = by_scipy(Pipe(), x.double(), answer.y.double())
    torch.testing.assert_close(answer.cost.double(), best.cost, rtol=1e-4, atol=1e-4)
    assert answer.violation.max() > 1e-4  # which no solution in float32 avoids
    torch.testing.assert_close(answer.bound, answer.violation)
    floor = "failed: KKT residual 1.0e-04 is below what float32 solutions reach here"
    assert all(
        status == "re-solved" if bound <= 1e-4 else status.startswith(floor)
        for status, bound in zip(answer.status, answer.bound, strict=True)
    )
    assert set(solver.solve(x, tol=1e-4, dtype=torch.float64).status) == {"re-solved"}
    rough = solver.solve(x, certify=True)
    assert rough.bound.isinf().all()  # a violation is one, in whatever units
    assert all(status.startswith("failed: no point") for status in rough.status)


def test_a_residual_under_constraints_is_that_of_the_solution_as_it_is_returned():
    torch.manual_seed(0)
    solver, x = ra.amortize(Measured, loss="penalty", **QUICK), Pipe().contexts(12)
    answer = solver.solve(x, tol=1e-3)
    assert answer.kind == "residual"
    torch.testing.assert_close(answer.bound.double(), Measured().residual(answer.y.double(), x.double()))


def test_a_prediction_that_violates_is_never_certified(solver):
    x = Pipe().contexts(5)
    answer = solver.solve(x, certify=True)
    assert answer.violation.min() > 1e-3  # it has hardly learned
    assert answer.bound.isinf().all()
    assert {status.split(":")[0] for status in answer.status} == {"failed"}


def test_at_a_solution_estimated_multipliers_show_a_residual_of_0():
    x = Pipe().contexts(8).double()
    best = by_scipy(Pipe(), x, torch.full((8, 3), 0.7, dtype=torch.float64))
    problem = Pipe()
    constraints, f = Constraints.of(problem), Cost(problem)
    certificate = UnderConstraints(None, f, constraints, problem.domain)
    assert certificate.bound(best.y, x).max() < 1e-5
    found = estimated(f, constraints, best.y, x)
    torch.testing.assert_close(found.equality, best.multipliers.equality, rtol=1e-3, atol=1e-3)
    assert certificate.bound(best.y + 0.1, x).isinf().all()


def test_an_item_that_cannot_be_feasible_fails_alone():
    solver = ra.amortize(Broken, loss="penalty", **QUICK)
    x = torch.tensor([[0.6, 0.7], [1.2, 0.7], [0.9, 0.6]])
    answer = solver.solve(x, tol=1e-4)
    assert answer.status[1].startswith("failed: no point that satisfies its constraints was found")
    assert [status.split(":")[0] for status in (answer.status[0], answer.status[2])] == ["re-solved", "re-solved"]
    reference = solver.reference(x)
    assert reference.cost.isnan().tolist() == [False, True, False]
    assert reference.label == "augmented Lagrangian"


class Circle(Problem):
    """The point at a distance x_2 from 0 that is nearest to a target, known in closed form."""

    domain = Box([-2.0, -2.0], [2.0, 2.0])

    def contexts(self, count):
        return 0.5 + torch.rand(count, 3)

    def cost(self, y, x):
        return (y - x[:, :2]).square().sum(-1)

    def constraints(self, y, x):
        return y.square().sum(-1, keepdim=True) - x[:, 2:].square(), y[:, :0]


class Ring(Circle):
    """As the circle, whose inside is allowed, too."""

    def constraints(self, y, x):
        h, g = super().constraints(y, x)
        return g, h

    def solution(self, x):
        return torch.nn.functional.normalize(x[:, :2], dim=-1) * torch.minimum(x[:, 2:], x[:, :2].norm(dim=-1, keepdim=True))


class Partly(Circle):
    """Known of every third item; of the next it is the target itself, which is cheaper, and not feasible."""

    def solution(self, x):
        y = torch.nn.functional.normalize(x[:, :2], dim=-1) * x[:, 2:]
        kind = (100 * x[:, 2]).long()[:, None] % 3
        return torch.where(kind == 0, y, torch.where(kind == 1, x[:, :2], torch.nan))


def test_a_reference_is_feasible_where_a_solution_is_not_known_or_wrong():
    torch.manual_seed(0)
    x = Circle().contexts(12)
    known, bare = (ra.amortize(kind, loss="penalty", **QUICK).reference(x, starts=2) for kind in (Partly, Circle))
    assert bare.label == "augmented Lagrangian"
    best = torch.nn.functional.normalize(x[:, :2], dim=-1) * x[:, 2:]
    for found in (known, bare):
        torch.testing.assert_close(found.y, best, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.cost, Circle().cost(found.y, x), rtol=1e-5, atol=1e-6)
    kinds = ((100 * x[:, 2]).long() % 3).tolist()
    assert set(kinds) == {0, 1, 2}
    assert known.label == f"solution; augmented Lagrangian for {12 - kinds.count(0)} of 12"
    wrong = f"Partly.solution: {kinds.count(1)} of 12 points violate the constraints, or lie outside Y, and are excluded"
    assert known.messages == (wrong,)


def test_a_known_solution_is_the_reference_and_the_rival(monkeypatch):
    class Known(Circle):
        def solution(self, x):
            return torch.nn.functional.normalize(x[:, :2], dim=-1) * x[:, 2:]

    monkeypatch.setattr(fit, "CONSTRAINED", 6)
    found = report(Known, ("full",), ("penalty",), **QUICK)
    assert "reference: solution" in str(found)
    assert found.data["rows"][0]["rival"][1] == "solution"


def test_check_holds_a_solution_against_feasible_points_alone():
    """It compared with the cheapest points of Y, so that a problem with constraints and a solution could not be amortized."""

    class Worse(Ring):
        def solution(self, x):
            return 0.3 * torch.nn.functional.normalize(x[:, :2] - 3, dim=-1)  # inside, and far from the target

    class Wrong(Ring):
        def solution(self, x):
            return x[:, :2]

    said = {kind: next(line for line in check(kind()).lines if line.what == "solution") for kind in (Ring, Worse, Wrong)}
    assert said[Ring].verdict == "pass", said[Ring].detail
    assert "where these meet the constraints" in said[Ring].detail
    assert "was found in a few trials" in said[Worse].detail
    assert "it violates the constraints by up to" in said[Wrong].detail


def test_kinds_that_ignore_constraints_are_refused(solver):
    x = Pipe().contexts(3)
    for kind in ("split-conformal", "duality gap"):
        with pytest.raises(UserError, match=f"by: {kind} is given"):
            solver.solve(x, tol=1e-3, by=kind)
    with pytest.raises(UserError, match="problem=Pipe: it has constraints"):
        compare(Pipe, **QUICK)


def test_a_report_has_gap_and_violation(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "CONSTRAINED", 6)
    found = report(Pipe, ("full",), ("penalty",), out=tmp_path, **QUICK)
    assert "reference: augmented Lagrangian; 100% of the contexts are solved" in str(found)
    (row,) = found.data["rows"]
    assert row["infeasibility"] > 1e-4
    assert row["rival"][1] == "augmented Lagrangian"
    assert "6 re-solved" in str(found)


def test_environments_say_the_violation_and_price_it_as_declared():
    rows = vector(Pipe(), 4)
    x, _ = rows.reset(seed=0)
    action = np.full((4, 3), 1.0, np.float32)
    _, reward, _, _, info = rows.step(action)
    y, context = torch.ones(4, 3), torch.from_numpy(x)
    h, g = Pipe().constraints(y, context)
    expected = Pipe().cost(y, context) + 5.0 * (h.square() + g.clamp_min(0).square()).sum(-1)
    np.testing.assert_allclose(reward, -expected, rtol=1e-6)
    np.testing.assert_allclose(info["violation"], violation(y, context), rtol=1e-6)
    env = single(Pipe)
    env.reset(seed=0)
    assert env.step(action[0])[4]["violation"] > 0
    ra.TD3(Pipe, seed=0, hidden=[8], warmup_steps=4, batch_size=8, buffer_size=60, eval_episodes=2).learn(20)
    with pytest.raises(UserError, match=r"Unpriced.violation_penalty: 0 is given; .* a weight above 0 is needed"):
        open_env(Unpriced, count=2)
