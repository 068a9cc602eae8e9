"""Reference solvers, certificates and what a user gets: known solutions, true bounds, and no item that takes others down."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import scipy.optimize
import torch
from test_best import Leaky
from torch import nn

import rlamort.solve.classical
from rlamort.domain import Box, CappedSimplex, Euclid, PerItem, Polyhedron, Simplex, Sphere
from rlamort.errors import Fault, UserError
from rlamort.measure.fit import report
from rlamort.measure.table import _seconds_to, measure
from rlamort.model import Expert, Full, Unroll
from rlamort.nets import mlp
from rlamort.objective import Cost
from rlamort.parts.losses import _solved
from rlamort.problem import Problem
from rlamort.solve.by_scipy import by_scipy
from rlamort.solve.certificate import Conformal, DualityGap, Tolerance, solve_from
from rlamort.solve.classical import LBFGS, PROJECTED, Minimiser, adam, best_found, descent, minimisers, solution_of
from rlamort.solve.precision import LARGE, widened
from rlamort.solve.solver import Solver
from rlamort.update import Cem, Gradient, InChart

TOLERANCE = {"projected gradient": 1e-12, "L-BFGS": 1e-12, "Adam at 0.1": 1e-3, "Adam at 1.0": 1e-5, "CEM": 1e-3}
QUICK = [PROJECTED._replace(iterations=60), LBFGS._replace(iterations=20)]
SIGMOID = adam(1.0, 40)  # which stays in Y whatever `nearest` says


class Portfolio(Problem):
    """min -<x, y> + |y|^2 / 2 on the simplex, whose solution is the point of the simplex nearest to x."""

    domain = Simplex(20)
    convex = True

    def contexts(self, count):
        return torch.randn(count, 20)

    def cost(self, y, x):
        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)


class Told(Portfolio):
    """The same, with its solution, which cannot be had where x_0 > 5."""

    def solution(self, x):
        if bool((x[:, 0] > 5).any()):
            raise ArithmeticError("no solution above 5")
        return self.domain.nearest(x)


class Wells(Problem):
    """(y^2 - 1)^2 + x y on [-2, 2]: two wells, the better one on the side of -x."""

    domain = Box([-2.0], [2.0])

    def contexts(self, count):
        return torch.rand(count, 1) + 0.1

    def cost(self, y, x):
        return ((y.square() - 1).square() + x * y).sum(-1)


class Eigen(Problem):
    """min y'Ay on the sphere: the smallest eigenvalue of A, the context."""

    domain = Sphere(4)

    def contexts(self, count):
        a = torch.randn(count, 4, 4)
        return {"a": a + a.mT, "shift": torch.randint(3, (count,))}

    def cost(self, y, x):
        return torch.einsum("bi,bij,bj->b", y, x["a"], y) + x["shift"]


class Steps(Problem):
    """A cost without a gradient: f falls in steps."""

    domain = Box([-1.0, -1.0], [1.0, 1.0])

    def contexts(self, count):
        return torch.rand(count, 2) - 0.5

    def cost(self, y, x):
        return (10 * (y - x).detach()).round().abs().sum(-1)


class Root(Problem):
    """y^3 + y = x, by least squares; its residual tells how wrong y is. Not convex, not bounded."""

    domain = Euclid(1)

    def contexts(self, count):
        return 2 * torch.randn(count, 1)

    def cost(self, y, x):
        return self.residual(y, x).square()

    def residual(self, y, x):
        return (y**3 + y - x).abs().sum(-1)


def smallest(problem, x):
    given = problem.layout.unpack(x)
    return torch.linalg.eigvalsh(given["a"])[:, 0] + given["shift"]


def made(kind, device="cpu", dtype=torch.float64, hidden=8):
    """An untrained solver."""
    torch.manual_seed(0)
    problem = kind()
    net = mlp(problem.layout.dim, [hidden], problem.domain.inputs)
    return Solver(Full(net, problem.domain), problem).to(device, dtype)


def rows(kind, count, device="cpu", dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    problem = kind()
    return problem.layout.pack(problem.contexts(count)).to(device, dtype)


@pytest.mark.parametrize("solver", minimisers(), ids=lambda solver: solver.name)
def test_each_solver_alone_reaches_the_smallest_eigenvalue(solver, device):
    problem, x = Eigen().to(device), rows(Eigen, 16, device)
    v = torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    torch.manual_seed(0)
    *_, ys = itertools.islice(solver.iterates(Cost(problem), problem.domain, x, v), solver.iterations)
    lowest = torch.stack([problem.cost(y, problem.layout.unpack(x)) for y in ys]).amin(0)  # from six starts, whatever the draws
    assert (lowest - smallest(problem, x)).max() < TOLERANCE[solver.name]


def test_best_found_is_the_solution_where_none_is_given(device):
    problem, x = Portfolio().to(device), rows(Portfolio, 10, device)
    found = best_found(Cost(problem), problem.domain, x, starts=2)
    torch.testing.assert_close(found.y, problem.domain.nearest(x), rtol=0, atol=1e-7)
    assert (found.cost - problem.cost(problem.domain.nearest(x), x)).abs().max() < 1e-8
    assert found.label == "best found"
    assert found.agreement > 0.5
    assert problem.domain.violation(found.y).max() < 1e-12


def test_descent_matches_scipy_on_an_ill_conditioned_quadratic():
    scales = torch.logspace(0, 3, 8, dtype=torch.float64)

    class Bowl(Problem):
        domain = Box([0.0] * 8, [1.0] * 8)

        def contexts(self, count):
            return torch.randn(count, 8, dtype=torch.float64)

        def cost(self, y, x):
            mixed = (y - x).cumsum(-1)
            return (scales * mixed.square()).sum(-1)

    torch.manual_seed(0)
    problem = Bowl()
    x = problem.contexts(4)
    *_, y = itertools.islice(descent(Cost(problem), problem.domain, x, torch.full_like(x, 0.5)), 1000)
    for one, of in zip(y, x, strict=True):

        def fun(point, of=of):
            at = torch.from_numpy(point)[None].requires_grad_()
            value = problem.cost(at, of[None])
            return value.item(), torch.autograd.grad(value.sum(), at)[0][0].numpy()

        theirs = scipy.optimize.minimize(fun, np.full(8, 0.5), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 8, tol=1e-14)
        assert fun(one.numpy())[0] <= theirs.fun * (1 + 1e-6)


def test_the_better_of_two_wells_is_found(device):
    problem, x = Wells().to(device), rows(Wells, 20, device)
    found = best_found(Cost(problem), problem.domain, x)
    grid = torch.linspace(-2, 2, 100_001, dtype=torch.float64, device=device)
    best = torch.stack([((grid**2 - 1) ** 2 + one * grid).min() for one in x[:, 0]])
    assert (found.y < 0).all()
    assert (found.cost - best).max() < 1e-8
    timid = adam(0.03, 300)  # which stays in the well where it starts
    assert 0.2 < best_found(Cost(problem), problem.domain, x, solvers=[timid]).agreement < 0.8


def test_best_found_on_the_sphere(device):
    problem, x = Eigen().to(device), rows(Eigen, 20, device)
    found = best_found(Cost(problem), problem.domain, x, starts=4, solvers=QUICK)
    assert (found.cost - smallest(problem, x)).abs().max() < 1e-8


def test_a_cost_without_gradients_is_solved_and_said():
    problem, x = Steps(), rows(Steps, 10)
    found = best_found(Cost(problem), problem.domain, x, starts=2)
    assert (found.cost == 0).all()
    assert any("projected gradient failed" in message for message in found.messages)


def test_the_reference_of_an_item_does_not_depend_on_its_neighbours():
    problem, x = Wells(), rows(Wells, 3)
    some = [*QUICK, Minimiser("CEM", Cem, InChart, 5)]
    together = best_found(Cost(problem), problem.domain, x, starts=3, solvers=some)
    torch.rand(7)
    before = torch.get_rng_state()
    alone = [best_found(Cost(problem), problem.domain, one, starts=3, solvers=some) for one in x.split(1)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(together.y, torch.cat([one.y for one in alone]), rtol=0, atol=1e-12)


class Chosen(Problem):
    """Two of five things, the cheapest: a linear cost, whose gradient steps grow without end."""

    domain = CappedSimplex(5, 2)
    convex = True

    def contexts(self, count):
        return torch.randn(count, 5)

    def cost(self, y, x):
        return (x * y).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_is_in_y_and_the_optimum_of_the_linear_program(dtype):
    """What was found: 580 of 1,000 outside, by up to 1.34, and a gap of 0.27 in place of 0.015."""
    solver, x = made(Chosen, dtype=dtype), rows(Chosen, 40, dtype=dtype)
    exact = x.sort(-1).values[:, :2].sum(-1)
    assert solver.reference(x).label == "quadratic program"
    torch.testing.assert_close(solver.reference(x).cost, exact, rtol=0, atol=1e-6)
    found = best_found(solver.f, solver.problem.domain, x)
    assert found.label == "best found"
    assert found.messages == ()
    assert solver.problem.domain.violation(found.y).max() < 1e-6
    torch.testing.assert_close(found.cost, exact, rtol=0, atol=1e-5)
    row = measure("full", solver, x, found, training_seconds=1.0, sizes=(1,), repeats=1, limit=60)
    assert row.gap == pytest.approx((solver.f(solver.predict(x), x) - exact).mean().item(), abs=1e-5)
    assert solver.solve(x, tol=1e-4).bound.max() <= 1e-4


class Led(Problem):
    """Lower the further up, so that whatever leaves Y looks better; the solution is (1, 1)."""

    domain = Leaky(2)

    def contexts(self, count):
        return 1 + torch.rand(count, 2)

    def cost(self, y, x):
        return -(x * y).sum(-1)


class LedTold(Led):
    """With a solution that is outside for half of the contexts."""

    def solution(self, x):
        return torch.where(x[:, :1] > 1.5, 3.0, 1.0).expand(-1, 2)


def test_a_projection_that_lies_leads_no_reference_out_of_y():
    problem, x = Led(), rows(Led, 20)
    found = best_found(Cost(problem), problem.domain, x, starts=3, extra=torch.full_like(x, 0.75))
    assert problem.domain.violation(found.y).max() == 0
    assert (found.cost - Cost(problem)(torch.ones_like(x), x)).max() < 0.02
    (said,) = [message for message in found.messages if message.startswith("projected gradient:")]
    assert re.fullmatch(r"projected gradient: \d+ of its points lie outside Leaky, and are excluded", said)
    assert (found.cost <= Cost(problem)(torch.full_like(x, 0.75), x)).all()


def test_nothing_that_is_given_is_taken_from_outside_y():
    problem, x = Led(), rows(Led, 20)
    f = Cost(problem)
    outside = best_found(f, problem.domain, x, starts=2, extra=torch.full_like(x, 9.0), solvers=[SIGMOID])
    assert problem.domain.violation(outside.y).max() == 0
    assert "the predictions: 20 of its points lie outside Leaky, and are excluded" in outside.messages
    told = LedTold()
    wrong = x[:, 0] > 1.5
    found = best_found(f, told.domain, x, starts=2, solution=solution_of(told), solvers=[SIGMOID])
    assert told.domain.violation(found.y).max() == 0
    assert found.label == f"solution; best found for {int(wrong.sum())} of 20"
    assert f"Led.solution: {int(wrong.sum())} of its points lie outside Leaky, and are excluded" in found.messages
    assert (found.y[~wrong] == 1).all()


def test_where_nothing_in_y_is_found_there_is_no_reference():
    class Nowhere(Leaky):
        def violation(self, y):
            return 1 + y.abs().amax(-1)

    problem, x = Led(), rows(Led, 3)
    found = best_found(Cost(problem), Nowhere(2), x, starts=2, solvers=[SIGMOID])
    assert found.cost.isnan().all()
    assert found.y.isnan().all()


def test_no_rival_wins_from_outside_y():
    """Projected gradient goes where Y is not at its first step, so that all its costs are lower than any in Y."""
    solver = made(Led)
    solver.model = Full(nn.Sequential(nn.Linear(2, 2).double()), solver.problem.domain)
    nn.init.zeros_(solver.model.net[0].weight)
    nn.init.constant_(solver.model.net[0].bias, 1.0)
    x = solver.draw(20)
    row = measure("full", solver, x, solver.reference(x), training_seconds=1.0, sizes=(1,), repeats=2, limit=60)
    assert row.rival[1] == "L-BFGS"
    assert math.isfinite(row.rival_seconds[1])
    assert _seconds_to(PROJECTED, solver, [x], 1, 60) == math.inf


def test_predictions_outside_y_have_no_gap_and_no_bound():
    solver, x = made(Led, dtype=torch.float32), rows(Led, 10, dtype=torch.float32)
    reference = solver.reference(x)
    predicted = torch.full((10, 2), 0.5)
    predicted[:4] = 5.0
    solver.model = Expert(lambda given: predicted[: len(given)])
    row = measure("expert", solver, x, reference, training_seconds=1.0, sizes=(1,), repeats=1, limit=1)
    assert (row.failed, row.infeasibility) == (4, pytest.approx(4 * 2**0.5))
    assert row.gap > 0
    solver.conformal = Conformal(1.0, 0.95, 99)
    answer = solver.solve(x, tol=2.0)
    assert answer.status == ["re-solved"] * 4 + ["predicted"] * 6
    assert solver.problem.domain.violation(answer.y).max() == 0
    solver.problem.convex = True
    assert DualityGap(solver.f, Box([0.0, 0.0], [1.0, 1.0])).bound(predicted, x)[:4].isinf().all()


def test_what_is_no_tensor_is_no_solution():
    class Arrayed(Portfolio):
        def solution(self, x):
            return x.numpy()

    with pytest.raises(UserError, match=r"Arrayed\.solution: a ndarray is returned; a tensor"):
        made(Arrayed).reference(rows(Arrayed, 2))


def test_more_contexts_than_a_chunk_are_solved_alike(monkeypatch):
    problem, x = Portfolio(), rows(Portfolio, 4)
    whole = best_found(Cost(problem), problem.domain, x, starts=2, solvers=QUICK)
    monkeypatch.setattr(rlamort.solve.classical, "CHUNK", 3)
    torch.testing.assert_close(
        whole.y, best_found(Cost(problem), problem.domain, x, starts=2, solvers=QUICK).y, rtol=0, atol=1e-12
    )


def test_a_problems_own_solution_is_taken_where_it_has_one():
    problem, x = Told(), rows(Told, 10)
    found = best_found(Cost(problem), problem.domain, x, solution=solution_of(problem))
    assert (found.label, found.agreement) == ("solution", 1.0)
    assert torch.equal(found.y, problem.domain.nearest(x))
    x[3, 0] = 6.0
    found = best_found(Cost(problem), problem.domain, x, starts=2, solution=solution_of(problem), solvers=QUICK)
    assert found.label == "solution; best found for 1 of 10"
    assert "Told.solution raised ArithmeticError: no solution above 5" in found.messages
    assert (found.cost - problem.cost(problem.domain.nearest(x), x)).abs().max() < 1e-8


def test_predictions_are_never_better_than_the_reference():
    problem, x = Steps(), rows(Steps, 10)
    found = best_found(Cost(problem), problem.domain, x, starts=1, extra=x)
    assert (found.cost <= problem.cost(x, x)).all()


def test_failing_solvers_are_reported_and_all_of_them_a_fault():
    class Stiff(Problem):
        domain = Box([-1.0], [1.0])

        def contexts(self, count):
            return torch.randn(count, 1)

        def cost(self, y, x):
            return (y - x).square().sum(-1).detach()

    problem, x = Stiff(), rows(Stiff, 3)
    with pytest.raises(Fault, match=r"Stiff: every reference solver failed; projected gradient failed: RuntimeError"):
        best_found(Cost(problem), problem.domain, x, solvers=QUICK)


def test_an_item_without_a_cost_leaves_the_others_alone(device):
    problem, x = Portfolio().to(device), rows(Portfolio, 5, device)
    x[2] = math.nan
    found = best_found(Cost(problem), problem.domain, x, starts=2, solvers=QUICK)
    good = torch.tensor([0, 1, 3, 4], device=device)
    assert found.cost[2].isnan()
    torch.testing.assert_close(found.y[good], problem.domain.nearest(x[good]), rtol=0, atol=1e-6)


def test_the_duality_gap_bounds(device):
    problem, x = Portfolio().to(device), rows(Portfolio, 200, device)
    f = Cost(problem)
    gap = f(y := problem.domain.project(torch.randn_like(x)), x) - f(problem.domain.nearest(x), x)
    bound = DualityGap(f, problem.domain).bound(y, x)
    assert (bound >= gap).all()
    assert (bound < 100 * gap).all()
    assert DualityGap(f, problem.domain).bound(problem.domain.nearest(x), x).max() < 1e-12
    assert DualityGap(f, problem.domain).bound(2 * y, x).isinf().all()  # no claim for what is not in Y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certified_answers_from_an_untrained_network(device, dtype):
    solver = made(Portfolio, device, dtype)
    x = rows(Portfolio, 300, device, dtype)
    answer = solver.solve(x, tol=1e-4, certify=True)
    best = solver.problem.domain.nearest(x)
    assert answer.kind == "duality gap"
    assert set(answer.status) == {"re-solved"}
    assert answer.bound.max() <= 1e-4
    assert (answer.cost - solver.f(best, x)).max() <= 1e-4 + 1e-6
    assert solver.problem.domain.violation(answer.y).max() < 1e-6


def test_good_predictions_are_kept():
    solver = made(Portfolio)
    solver.model = Unroll(solver.model, Gradient(1.0), 1, solver.problem.domain)  # one step solves this problem
    answer = solver.solve(rows(Portfolio, 20), tol=1e-4)
    assert set(answer.status) == {"predicted"}
    assert answer.bound.max() <= 1e-4
    assert answer.y.requires_grad is False


def test_an_answer_does_not_depend_on_its_neighbours():
    solver, x = made(Portfolio), rows(Portfolio, 6)
    together = solver.solve(x, tol=1e-6)
    alone = torch.cat([solver.solve(one, tol=1e-6).y for one in x.split(1)])
    torch.testing.assert_close(together.y, alone, rtol=0, atol=1e-12)


def test_a_failing_item_says_so_and_takes_nobody_down(device):
    solver, x = made(Portfolio, device), rows(Portfolio, 6, device)
    x[1, 3], x[4, 0] = math.nan, math.inf
    answer = solver.solve(x, tol=1e-4)
    assert [status.split(":")[0] for status in answer.status] == [
        "re-solved",
        "failed",
        "re-solved",
        "re-solved",
        "failed",
        "re-solved",
    ]
    assert answer.status[1] == "failed: context is not finite"
    assert answer.y[[1, 4]].isnan().all()
    assert answer.y[[0, 2, 3, 5]].isfinite().all()
    assert torch.equal(solver.predict(x).isnan().any(-1), torch.tensor([False, True, False, False, True, False], device=device))


def test_a_cost_that_is_nan_for_an_item_is_a_status():
    class Holed(Portfolio):
        def cost(self, y, x):
            return super().cost(y, x) + torch.where(x[:, 0] > 0, 0.0, math.nan)

    solver, x = made(Holed), rows(Holed, 4)
    for answer in (solver.solve(x), solver.solve(x, tol=1e-4)):
        bad = [status == "failed: cost is not finite" for status in answer.status]
        assert bad == (x[:, 0] <= 0).tolist()
        assert 0 < sum(bad) < 4


def test_a_network_that_is_nan_is_only_slower():
    solver = made(Portfolio)
    nn.init.constant_(solver.model.net[0].weight, math.nan)
    answer = solver.solve(rows(Portfolio, 4), tol=1e-4)
    assert set(answer.status) == {"re-solved"}


def test_what_cannot_be_reached_is_a_failure_with_its_bound():
    solver = made(Told)
    answer = solver.solve(0.05 * rows(Told, 8), tol=1e-30, max_iterations=10)  # inside the simplex, where rounding is left
    assert any(status.startswith("failed: duality gap") for status in answer.status)
    assert (answer.bound < 1e-8).all()


def test_a_raising_solution_is_not_needed_for_a_certificate():
    solver, x = made(Told), rows(Told, 5)
    x[2, 0] = 9.0
    assert solver.solve(x, tol=1e-5).bound.max() <= 1e-5


def test_a_residual_is_the_certificate_where_the_problem_has_one():
    solver = made(Root)
    x = rows(Root, 40)
    answer = solver.solve(x, tol=1e-6)
    roots = torch.tensor([scipy.optimize.brentq(lambda y, c=c: y**3 + y - c, -5, 5) for c in x[:, 0].tolist()])
    assert answer.kind == "residual"
    assert answer.bound.max() <= 1e-6
    torch.testing.assert_close(answer.y[:, 0], roots.double(), rtol=0, atol=1e-5)


def test_where_nothing_is_asked_nothing_is_claimed():
    answer = made(Portfolio).solve(rows(Portfolio, 3))
    assert answer.kind == "none"
    assert answer.bound.isinf().all()
    assert answer.status == ["predicted"] * 3


def test_the_conformal_bound_covers_fresh_contexts():
    solver = made(Wells)
    torch.manual_seed(3)
    conformal = solver.calibrate(99, level=0.9)
    x = solver.draw(400)
    answer = solver.solve(x, certify=True)
    gap = answer.cost - best_found(solver.f, solver.problem.domain, x, starts=4, solvers=QUICK).cost
    covered = (gap <= answer.bound).double().mean().item()
    # of 400, given a quantile of 99: the share is Beta(90, 10), and then binomial; four standard deviations
    assert abs(covered - 0.9) < 4 * math.sqrt(0.09 / 101 + 0.09 / 400)
    assert answer.kind == "split-conformal (statistical, 90 %)" == conformal.kind


def test_the_conformal_rank_has_its_finite_sample_correction(monkeypatch):
    solver = made(Wells)
    gaps = torch.arange(1.0, 20.0, dtype=torch.float64)
    x = solver.draw(19)
    monkeypatch.setattr(solver, "draw", lambda count: x)
    costs = solver.f(solver.predict(x), x) - gaps[torch.randperm(19)]
    monkeypatch.setattr(solver, "reference", lambda x, y: rlamort.solve.classical.Reference(y, costs, "", 1.0, ()))
    assert solver.calibrate(19, 0.95).quantile == pytest.approx(19.0)  # ceil(20 * 0.95) = 19
    assert solver.calibrate(19, 0.5).quantile == pytest.approx(10.0)
    with pytest.raises(UserError, match=r"count: 18 is given; for level 0.95, at least 19 are needed"):
        solver.calibrate(18, 0.95)


def test_without_another_certificate_poor_items_are_the_reference():
    solver, x = made(Wells), rows(Wells, 10)
    solver.conformal = Conformal(1.0, 0.95, 99)
    answer = solver.solve(x, tol=0.5)
    assert set(answer.status) == {"re-solved"}
    assert (answer.y < 0).all()
    assert set(solver.solve(x, tol=2.0).status) == {"predicted"}


def test_ten_thousand_contexts_are_two_forward_passes():
    solver, calls = made(Portfolio, dtype=torch.float32), []
    solver.model.register_forward_hook(lambda *call: calls.append(call))
    x = torch.randn(10_000, 20)
    x[9_000, 3] = torch.nan
    y = solver.predict(x)
    assert y.shape == (10_000, 20)
    assert len(calls) == 2  # chunks that a CPU's caches hold
    assert y[9_000].isnan().all()
    torch.testing.assert_close(y[8_990:9_000], solver.predict(x[8_990:9_000]))


def test_dict_contexts_and_numpy_arrays_are_taken(device):
    solver = made(Eigen, device, torch.float32)
    x = solver.problem.contexts(3)
    theirs = solver.predict({key: part.numpy() for key, part in x.items()})
    ours = solver.predict({key: part.to(device) for key, part in x.items()})
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, solver.predict({"shift": x["shift"].to(device), "a": x["a"].numpy().astype(np.float64)}))
    assert torch.equal(ours, solver.predict({"shift": x["shift"].numpy().astype(np.float64), "a": x["a"].to(device)}))


A, SHIFT = torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("kind", "x", "message"),
    [
        (Portfolio, torch.zeros(3, 19), r"x: shape \(3, 19\) is given; \(B, 20\), B >= 1, is needed"),
        (Portfolio, torch.zeros(20), r"x: shape \(20,\) is given"),
        (Portfolio, torch.zeros(0, 20), r"x: shape \(0, 20\) is given"),
        (Portfolio, torch.zeros(3, 20, dtype=torch.float64), "x: torch.float64 is given; torch.float32 is needed"),
        (Portfolio, torch.zeros(3, 20, device="meta"), "x: it is on meta; cpu is needed"),
        (Portfolio, [[0.0] * 20], "x: a list is given; a tensor, or a NumPy array, is needed"),
        (Portfolio, np.array([["a"] * 20]), "x: an array of <U1 is given; real numbers are needed"),
        (Portfolio, np.full((1, 20), 1j), "x: an array of complex128 is given; real numbers are needed"),
        (Portfolio, {"x": torch.zeros(3, 20)}, "x: a dict is given; a tensor is needed"),
        (Eigen, A, "x: a Tensor is given; a dict with the keys a, shift is needed"),
        (Eigen, {"a": A}, "x: the key 'shift' is missing"),
        (Eigen, {"a": A, "shift": SHIFT, "shfit": SHIFT}, "x: the key 'shfit' is not known. Did you mean shift?"),
        (Eigen, {"a": A, "shift": SHIFT[:1]}, r"x\['shift'\]: 1 contexts are given; x\['a'\] has 2"),
        (Eigen, {"a": A, "shift": SHIFT.float()}, r"x\['shift'\]: torch.float32 is given; torch.int64 is needed"),
        (Eigen, {"a": A, "shift": np.array([1.0, 2.9])}, r"x\['shift'\]: numbers of float64 are given that are none of"),
        (Eigen, {"a": A, "shift": np.array([1.0, np.nan])}, r"x\['shift'\]: numbers of float64 are given that are none"),
        (Eigen, {"a": A, "shift": SHIFT + 2**24 + 1}, r"x\['shift'\]: numbers of torch.int64 .* do not survive in"),
        (Eigen, {"a": A[:, 0], "shift": SHIFT}, r"x\['a'\]: shape \(2, 4\) is given; \(B, 4, 4\)"),
    ],
)
def test_contexts_that_do_not_fit_are_named(kind, x, message):
    with pytest.raises(UserError, match=message):
        made(kind, dtype=torch.float32).predict(x)


def test_arguments_out_of_range_are_named():
    solver, x = made(Portfolio), rows(Portfolio, 2)
    for tol in (0, "1e-4"):
        with pytest.raises(UserError, match=f"tol: {tol!r} is given; a positive number"):
            solver.solve(x, tol=tol)
    with pytest.raises(UserError, match="max_iterations: 0 is given"):
        solver.solve(x, tol=1.0, max_iterations=0)
    with pytest.raises(UserError, match=r"level: 1\.5 is given"):
        solver.calibrate(level=1.5)
    with pytest.raises(UserError, match="starts: 0 is given"):
        best_found(solver.f, solver.problem.domain, x, starts=0)


def test_what_the_problem_returns_is_checked():
    class Wide(Portfolio):
        def cost(self, y, x):
            return y

    class Wider(Portfolio):
        def residual(self, y, x):
            return y

        def solution(self, x):
            return x[:, :3]

    solver, x = made(Wide), rows(Wide, 2)
    with pytest.raises(UserError, match=r"Wide.cost: shape \(2, 20\)"):
        solver.solve(x)
    solver = made(Wider)
    with pytest.raises(UserError, match=r"Wider.residual: shape \(2, 20\)"):
        solver.solve(x, certify=True)
    Wider.residual = lambda self, y, x: y.norm(dim=-1).numpy()
    with pytest.raises(UserError, match=r"Wider.residual: a ndarray is returned; one number per item, \(2,\), is needed"):
        solver.solve(x, certify=True)
    with pytest.raises(UserError, match=r"Wider.solution: shape \(2, 3\) is returned for 2 contexts; \(2, 20\) is needed"):
        solver.reference(x)


def test_a_certificate_that_needs_a_gradient_says_so():
    class Flat(Portfolio):
        def cost(self, y, x):
            return super().cost(y, x).detach()

    with pytest.raises(UserError, match=r"Flat\.cost: this certificate needs its gradient"):
        made(Flat).solve(rows(Flat, 2), certify=True)


def test_an_export_equals_eager(tmp_path):
    solver = made(Portfolio, dtype=torch.float32)
    solver.export(tmp_path / "portfolio.pt2")
    read = torch.export.load(tmp_path / "portfolio.pt2").module()
    for count in (1, 3, 50):
        x = torch.randn(count, 20)
        torch.testing.assert_close(read(x), solver.predict(x))


def test_a_semi_amortized_model_cannot_be_exported(tmp_path):
    solver = made(Portfolio)
    solver.model = Unroll(solver.model, Gradient(0.5), 2, solver.problem.domain)
    with pytest.raises(UserError, match="a Unroll model evaluates the cost or its gradients"):
        solver.export(tmp_path / "portfolio.pt2")


def test_a_saved_solver_answers_the_same(tmp_path):
    solver, x = made(Wells), rows(Wells, 5)
    solver.conformal = Conformal(0.25, 0.9, 50)
    solver.facts = {"hidden": 8}
    solver.save(tmp_path / "wells")

    def build(facts):
        return Full(mlp(1, [facts["hidden"]], 1), Wells().domain)

    read = Solver.load(tmp_path / "wells", Wells(), build)
    assert torch.equal(read.double().predict(x), solver.float().double().predict(x))
    assert read.conformal.quantile == 0.25
    with pytest.raises(UserError, match="no agent is saved there"):
        Solver.load(tmp_path / "nothing", Wells(), build)


def test_measuring_holds_a_model_against_the_reference():
    solver = made(Told, dtype=torch.float32)
    solver.model = Unroll(solver.model, Gradient(0.9), 3, solver.problem.domain)
    x = rows(Told, 60, dtype=torch.float32)
    reference = solver.reference(x)
    row = measure("semi", solver, x, reference, training_seconds=10.0, sizes=(1, 30), repeats=3, limit=50)
    gap = solver.f(solver.predict(x), x) - reference.cost
    assert row.gap == pytest.approx(gap.mean().item(), abs=1e-7)
    assert row.low < row.gap < row.high
    assert row.p99 == pytest.approx(np.quantile(gap, 0.99), abs=1e-7)
    assert row.infeasibility < 1e-5
    assert row.failed == 0
    assert set(row.rival.values()) <= {"projected gradient", "L-BFGS", "solution"}
    saved = row.rival_seconds[1] - row.seconds[1]
    assert row.break_even == (math.inf if saved <= 0 else pytest.approx(10.0 / saved))
    assert len(row.head()) == len(row.cells())
    with pytest.raises(UserError, match="x: 1 contexts"):
        measure("semi", solver, x[:1], reference, training_seconds=0.0)


def test_a_rival_that_never_gets_there_is_said():
    solver = made(Wells)
    solver.model = Full(nn.Sequential(nn.Linear(1, 1).double()), solver.problem.domain)
    nn.init.zeros_(solver.model.net[0].weight)
    nn.init.constant_(solver.model.net[0].bias, -0.55)  # near the better well
    x = solver.draw(20)
    row = measure("full", solver, x, solver.reference(x), training_seconds=1.0, sizes=(1,), repeats=3, limit=1)
    assert math.isinf(row.rival_seconds[1])
    assert "never reached" in row.cells()


def test_solve_from_stops_where_the_certificate_holds():
    problem, x = Portfolio(), rows(Portfolio, 50)
    f = Cost(problem)
    loose = solve_from(
        f, problem.domain, x, problem.domain.project(x * 0), Tolerance(0.3), DualityGap(f, problem.domain), iterations=100
    )
    tight = solve_from(
        f, problem.domain, x, problem.domain.project(x * 0), Tolerance(1e-9), DualityGap(f, problem.domain), iterations=100
    )
    assert loose[1].max() <= 0.3
    assert tight[1].max() <= 1e-9


class Dispatch(Problem):
    """30 units at the least cost; what is missing to the demand costs 50 times its square, so that conditions are 1e4."""

    domain = Box([0.0] * 30, [2.0] * 30)
    convex = True

    def __init__(self):
        super().__init__()
        self.register_buffer("slope", torch.linspace(0.1, 1.1, 30))

    def contexts(self, count):
        return {"price": 1 + torch.rand(count, 30), "demand": 10 + 40 * torch.rand(count, 1)}

    def cost(self, y, x):
        missing = y.sum(-1, keepdim=True) - x["demand"]
        return (x["price"] * y + 0.5 * self.slope * y.square()).sum(-1) + 50 * missing.square().sum(-1)


def test_what_float32_cannot_hold_is_solved_in_float64_and_said():
    """Certificates are computed in float64 of the solution as it is returned, so each is true, and none is rounding alone."""
    solver = made(Dispatch, dtype=torch.float32)
    torch.manual_seed(0)
    x = solver.problem.contexts(60)
    exact = {name: part.double() for name, part in x.items()}
    best = made(Dispatch, dtype=torch.float64).solve(exact, tol=1e-8)
    assert set(best.status) == {"re-solved"}
    wide = solver.solve(x, tol=1e-4, dtype=torch.float64)
    assert wide.y.dtype is torch.float64
    assert set(wide.status) == {"re-solved"}
    assert ((wide.cost - best.cost) <= wide.bound + 1e-8).all()
    relative = solver.solve(x, rtol=1e-4)
    assert relative.y.dtype is torch.float32
    assert set(relative.status) == {"re-solved"}
    assert (relative.bound <= 1e-4 * relative.cost * (1 + 1e-6)).all()
    narrow = solver.solve(x, tol=1e-4)
    floor = [status for status in narrow.status if "below what float32 solutions reach here" in status]
    assert floor
    assert all("dtype=torch.float64 does it" in status for status in floor)
    assert all(status == "re-solved" or status in floor for status in narrow.status)
    # the bound is of the rounded solution, and its cost in float64 does not exceed it
    problem = made(Dispatch, dtype=torch.float64).problem
    cost = problem.cost(narrow.y.double(), exact)
    assert (cost - best.cost <= narrow.bound.double() * (1 + 1e-6) + 1e-8).all()
    assert solver.problem.slope.dtype is torch.float32
    assert all(answer.violation.max() == 0 for answer in (wide, relative, narrow))


def test_a_problem_that_stays_in_float32_is_certified_there():
    class Stubborn(Portfolio):
        def cost(self, y, x):
            return super().cost(y.float(), x.float())

    solver, x = made(Stubborn, dtype=torch.float32), rows(Stubborn, 10, dtype=torch.float32)
    assert solver.solve(x, tol=1e-3).bound.max() <= 1e-3
    with pytest.raises(UserError, match=r"dtype: torch.float64 is given, but Stubborn.cost does not give float64"):
        solver.solve(x, tol=1e-3, dtype=torch.float64)


def test_the_copy_in_float64_follows_what_is_learned():
    solver, x = made(Dispatch, dtype=torch.float32), made(Dispatch, dtype=torch.float32).problem.contexts(5)
    before = solver.solve(x, rtol=1e-4).cost
    with torch.no_grad():
        solver.problem.slope.mul_(2)
    assert (solver.solve(x, rtol=1e-4).cost > before).all()


class Priced(Portfolio):
    """The same at constants of every kind that Python has."""

    size = 1

    def __init__(self):
        super().__init__()
        self.risk, self.fees, self.tax = 0.1, [0.1], np.full(self.size, 0.1)
        self.register_buffer("held", torch.full((self.size,), 0.1))

    def cost(self, y, x):
        return super().cost(y, x) + (self.risk + self.fees[0] + float(self.tax[0]) + self.held[0]) * y.square().sum(-1)


class Tabled(Priced):
    """In tables that are too large for a copy at every call."""

    size = LARGE


def _replaced(problem):
    del problem.held  # whose address is then free for the next
    problem.register_buffer("held", torch.full((problem.size,), 5.0))


CHANGES = {
    "an attribute": lambda problem: setattr(problem, "risk", 5.0),
    "an entry of a list": lambda problem: problem.fees.__setitem__(0, 5.0),
    "an entry of an array": lambda problem: problem.tax.__setitem__(0, 5.0),
    "a buffer, in place": lambda problem: problem.held.fill_(5.0),
    "a buffer, below its version": lambda problem: problem.held.data.fill_(5.0),
    "another buffer": _replaced,
}


@pytest.mark.parametrize("kind", [Priced, Tabled])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_costs_and_certificates_are_of_the_problem_as_it_is(change, kind):
    """A copy in float64 that was kept gave the costs, the bounds and the exact solutions of the constants before."""
    solver, x = made(kind, dtype=torch.float32), rows(kind, 4, dtype=torch.float32)
    scipy_of = by_scipy(solver.problem, x, solver.predict(x)).cost
    before = solver.solve(x, tol=1e-4)
    torch.testing.assert_close(before.cost.double(), scipy_of, rtol=0, atol=1e-4)
    change(solver.problem)
    best = solver.problem.domain.nearest(x / 11.6)  # |y|^2 has the factor 5.8 now
    answer = solver.solve(x, tol=1e-4)
    torch.testing.assert_close(answer.y, best, rtol=0, atol=1e-2)
    torch.testing.assert_close(answer.cost, solver.f(answer.y, x), rtol=1e-6, atol=1e-6)
    assert (answer.cost - solver.f(best, x) <= answer.bound + 1e-6).all()
    torch.testing.assert_close(solver.reference(x).y, best, rtol=0, atol=1e-5)
    torch.testing.assert_close(_solved(solver.problem, lambda x: x)(x), best, rtol=0, atol=1e-5)


class Stored(Portfolio):
    """The same on contexts that are data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("data", torch.randn(LARGE, 20))
        self.register_buffer("order", torch.randperm(LARGE))
        self.ages, self.drawn = [np.zeros(LARGE)], 0

    def contexts(self, count):
        self.drawn += 1
        return self.data[self.order[:count]]


class Anchored(Stored):
    """And a cost that reads them."""

    def cost(self, y, x):
        return super().cost(y, x) + 0 * self.data[0, 0]


@pytest.mark.parametrize(("kind", "reads"), [(Stored, 0), (Anchored, 1)])
def test_data_of_a_problem_are_widened_where_they_are_read_alone(kind, reads, monkeypatch):
    """All of it was copied, and then widened, at every call, though contexts are all that it is for."""
    solver, x = made(kind, dtype=torch.float32), rows(kind, 4, dtype=torch.float32)
    problem, large = solver.problem, []
    before = problem.layout, problem.drawn
    for owner, name in ((torch.Tensor, "__deepcopy__"), (torch.Tensor, "double"), (torch.Tensor, "clone")):
        plain = getattr(owner, name)

        def counted(tensor, *args, plain=plain):
            large.extend([tensor] if tensor.numel() >= LARGE else [])
            return plain(tensor, *args)

        monkeypatch.setattr(owner, name, counted)
    for asked in (
        lambda: solver.solve(x, tol=1e-4),
        lambda: solver.exact(x),
        lambda: _solved(problem, lambda x: x)(x),
        lambda: by_scipy(problem, x, solver.predict(x)),
    ):
        large.clear()
        asked()
        assert len(large) == reads
    assert (problem.layout, problem.drawn) == before
    assert problem.data.dtype is torch.float32


class Summed(Stored):
    """And a cost that reads all buffers but by their names, of a set of the user's own that holds the same data."""

    def __init__(self):
        super().__init__()
        self.domain = Held(self.data)
        self.tree = {"held": self.ages}
        self.ages.append(self.tree)  # which holds it again

    def contexts(self, count):
        np.random.default_rng(0).shuffle(self.ages[0])
        return super().contexts(count)

    def cost(self, y, x):
        sums = [buffer.double().sum() if buffer.dtype is torch.long else buffer.sum() for buffer in self.buffers()]
        by_name = dict(self.named_buffers())["data"].sum() - self.state_dict()["data"].sum()
        return super().cost(y, x) + 1e-3 * sums[0].to(y) * y[:, 0] + by_name.to(y)


class Held(Simplex):
    """With data of its own."""

    def __init__(self, data):
        super().__init__(20)
        self.register_buffer("data", data)


def test_large_data_are_float64_however_they_are_read():
    problem = Summed()
    x = problem.contexts(3)
    y = problem.domain.uniform(3)
    twin = widened(problem, y, x)
    assert twin is not problem
    assert twin.domain.data.dtype is torch.float64
    by_hand = copy.deepcopy(problem).double()
    torch.testing.assert_close(twin.cost(y.double(), x.double()), by_hand.cost(y.double(), x.double()), rtol=1e-12, atol=0)
    problem.ages[0][:] = np.arange(LARGE)
    twin.contexts(2)
    assert (problem.ages[0] == np.arange(LARGE)).all()  # what draws may shuffle, and not the user's
    assert problem.data.dtype is torch.float32


class Half(Problem):
    """The point of the orthant nearest to x, as a polyhedron that ends nowhere."""

    domain = Polyhedron(torch.eye(3), 0.0, math.inf)
    convex = True

    def contexts(self, count):
        return torch.randn(count, 3)

    def cost(self, y, x):
        return 0.5 * (y - x).square().sum(-1)


class Ended(Half):
    """The same, and the sum of an item ends, unless its context begins above 5."""

    domain = Polyhedron(torch.cat([torch.eye(3), torch.ones(1, 3)]), 0.0, PerItem(4))

    def domain_data(self, x):
        high = torch.full((len(x), 4), math.inf).to(x)
        high[:, 3] = torch.where(x[:, 0] > 5, math.inf, 1.0)
        return {"high": high}


class Rarely(Ended):
    """Every other item is unbounded."""

    def contexts(self, count):
        return super().contexts(count) + 10 * (torch.arange(count)[:, None] % 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_polyhedron_without_an_end_is_certified_by_the_kkt_residual(dtype):
    for kind in (Half, Rarely):
        solver, x = made(kind, dtype=dtype), rows(kind, 6, dtype=dtype)
        answer = solver.solve(x, tol=1e-4)
        assert answer.kind == "KKT residual"
        assert set(answer.status) <= {"predicted", "re-solved"}
        torch.testing.assert_close(answer.y, solver.problem.domain.at(x).nearest(x), rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="by: duality gap is given, and the set of Half is unbounded; KKT residual is allowed"):
        made(Half).solve(rows(Half, 2), tol=1e-4, by="duality gap")


def test_an_item_without_an_end_has_no_duality_gap_alone():
    solver, x = made(Ended), rows(Ended, 4)
    alone = solver.solve(x, tol=1e-4)
    x[2] = torch.tensor([6.0, 1.0, 1.0])
    answer = solver.solve(x, tol=1e-4)
    assert alone.kind == answer.kind == "duality gap"
    assert answer.status[2].startswith("failed: no duality gap is finite here")
    rest = [0, 1, 3]
    assert all(answer.status[i] in ("predicted", "re-solved") for i in rest)
    torch.testing.assert_close(answer.bound[rest], alone.bound[rest])
    certified = solver.solve(x, tol=1e-4, by="KKT residual")
    assert set(certified.status) <= {"predicted", "re-solved"}


def test_a_report_of_a_set_without_an_end_is_made(monkeypatch):
    monkeypatch.setattr("rlamort.measure.fit.HELD_OUT", 20)
    assert "KKT residual" in str(report(Half, ("full",), steps=10, hidden=(8,), batch_size=8, seed=0))


@pytest.mark.parametrize(
    ("field", "value"), [("tol", 0.0), ("rtol", -1.0), ("rtol", math.nan), ("dtype", torch.float16), ("max_iterations", 0)]
)
def test_what_solve_cannot_use_is_named(field, value):
    with pytest.raises(UserError, match=rf"^{field}: .* is needed"):
        made(Portfolio).solve(rows(Portfolio, 2), **{field: value})


def test_solving_draws_nothing_from_the_users_generator():
    solver, x = made(Portfolio), rows(Portfolio, 5)
    before = torch.get_rng_state()
    solver.solve(x, tol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)
