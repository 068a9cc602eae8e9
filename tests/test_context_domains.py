"""Problems whose Y depends on x: every model, loss, solver and environment asks for C(x), and none for another item's."""

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import rlamort as ra
from rlamort.domain import Ball, Box, PerItem, Polyhedron, Product, Simplex
from rlamort.env.make import open_env
from rlamort.env.native import NativeEnv
from rlamort.env.one_step import open_problem, single, vector
from rlamort.errors import UserError
from rlamort.measure import fit
from rlamort.measure.check import check
from rlamort.measure.fit import report
from rlamort.objective import Cost
from rlamort.solve.certificate import DualityGap
from rlamort.solve.classical import best_found
from rlamort.solve.solver import Solver

N = 6
QUICK = {"steps": 10, "hidden": (16,), "batch_size": 16, "seed": 0}


class Dispatch(ra.Problem):
    """Power of N units at the least cost; demand is met exactly."""

    domain = Polyhedron(torch.eye(N), 0.0, 2.0, torch.ones(1, N), PerItem(1))
    convex = True

    def __init__(self):
        super().__init__()
        self.register_buffer("slope", torch.linspace(0.1, 1.1, N))

    def contexts(self, count):
        return {"price": 1 + torch.rand(count, N), "demand": 2 + 8 * torch.rand(count, 1)}

    def domain_data(self, x):
        return {"b": x["demand"]}

    def cost(self, y, x):
        return (x["price"] * y + 0.5 * self.slope * y.square()).sum(-1)


class Wavy(Dispatch):
    """The same without convexity."""

    convex = False

    def cost(self, y, x):
        return super().cost(y, x) + (3 * y).sin().sum(-1)


class Mixed(ra.Problem):
    """A product of sets, of which two depend on x."""

    domain = Product([Simplex(3), Box(PerItem(2), PerItem(2)), Ball(2, PerItem())])
    convex = True

    def contexts(self, count):
        return torch.randn(count, 7)

    def domain_data(self, x):
        return {"1.low": -x[:, :2].abs(), "1.high": x[:, 2:4].abs() + 0.1, "2.radius": 0.1 + x[:, 4].abs()}

    def cost(self, y, x):
        return (y - x).square().sum(-1)


def contexts(kind, count=20):
    torch.manual_seed(0)
    return kind().contexts(count)


def violation(problem, y, x):
    return problem.domain.at(problem.layout.pack(x)).violation(y)


@pytest.mark.parametrize("kind", [Dispatch, Mixed])
@pytest.mark.parametrize("model", ["full", "choice", "semi", "recurrent", "latent"])
def test_every_model_predicts_in_its_items_set(kind, model):
    solver, x = ra.amortize(kind, model=model, **QUICK), contexts(kind)
    y = solver.predict(x)
    assert violation(solver.problem, y, x).max() < 1e-5
    alone = torch.cat([solver.predict({k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1])
                       for i in range(5)])  # fmt: skip
    torch.testing.assert_close(y[:5], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["regress", "iterates", "es"])
def test_every_loss_trains_under_constraints(loss):
    solver, x = ra.amortize(Dispatch, loss=loss, **QUICK), contexts(Dispatch)
    assert violation(solver.problem, solver.predict(x), x).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_item_is_certified_and_feasible(dtype):
    solver, x = ra.amortize(Dispatch, **QUICK), contexts(Dispatch, 200)
    answer = solver.solve(x, rtol=1e-4, dtype=dtype)
    assert {status.split(":")[0] for status in answer.status} <= {"predicted", "re-solved"}
    assert answer.violation.max() < (1e-6 if dtype is torch.float32 else 1e-12)
    assert answer.kind == "duality gap"
    exact = solver.exact(solver.rows(x).double())
    best = Dispatch().double().cost(exact, {k: v.double() for k, v in x.items()})
    assert (answer.cost.double() - best <= answer.bound.double() + 1e-6 * best.abs()).all()
    assert (answer.cost.double() - best >= -1e-5 * best.abs()).all()


def test_the_gap_by_projections_is_a_bound_on_that_by_linear_programs():
    problem = Dispatch().double()
    x = problem.layout.pack({k: v.double() for k, v in contexts(Dispatch, 10).items()})
    domain = problem.domain.at(x)
    for scale in (1e-6, 1e-3, 1.0):
        best = Solver(ra.amortize(Dispatch, **QUICK).model, problem).exact(x)
        y = domain.nearest(best + scale * torch.randn(10, N, dtype=torch.float64))
        slope = Cost(problem).oracle(x).grad(y)
        exact = (slope * (y - domain.linear(slope))).sum(-1)
        bound = DualityGap(Cost(problem), problem.domain).bound(y, x)
        assert (bound >= exact - 1e-9).all()
        assert (Cost(problem)(y, x) - Cost(problem)(best, x) <= bound + 1e-12).all()


def test_references_of_a_nonconvex_cost_are_feasible():
    problem, x = Wavy(), contexts(Wavy, 8)
    rows = problem.layout.pack(x)
    found = best_found(Cost(problem), problem.domain, rows, starts=4)
    assert violation(problem, found.y, x).max() < 1e-5
    many = problem.domain.at(rows).nearest(3 * torch.randn(200, 8, N))
    values = torch.stack([problem.cost(y, x) for y in many])
    assert (found.cost <= values.amin(0) + 1e-4).all()


def test_an_item_without_a_point_says_so_alone():
    solver, x = ra.amortize(Dispatch, **QUICK), contexts(Dispatch, 6)
    x["demand"][2] = 100.0  # of six units of 2
    answer = solver.solve(x, rtol=1e-4)
    assert answer.status[2] == "infeasible: no point satisfies its constraints, which is proven"
    assert answer.violation[2] > 1
    rest = [i for i in range(6) if i != 2]
    assert all(answer.status[i] in ("predicted", "re-solved") for i in rest)
    fine = {k: v[rest] for k, v in x.items()}
    torch.testing.assert_close(answer.cost[rest], solver.solve(fine, rtol=1e-4).cost, rtol=1e-4, atol=1e-4)


def test_the_kkt_residual_certifies_where_no_gap_can():
    solver, x = ra.amortize(Wavy, **QUICK), contexts(Wavy, 20)
    answer = solver.solve(x, tol=1e-4, by="KKT residual")
    assert answer.kind == "KKT residual"
    assert set(answer.status) <= {"predicted", "re-solved"}
    with pytest.raises(UserError, match=r"by: duality gap is given, and Wavy does not declare `convex = True`"):
        solver.solve(x, tol=1e-4, by="duality gap")
    with pytest.raises(UserError, match=r"rtol: 0.001 is given; it is relative to the cost, and .* a KKT residual"):
        solver.solve(x, rtol=1e-3, by="KKT residual")
    with pytest.raises(UserError, match=r"by: dual is given"):
        solver.solve(x, tol=1e-4, by="dual")


def test_check_reports_on_sets_that_depend_on_x():
    found = check(Dispatch())
    assert found.ok, str(found)
    assert "6 coordinates from 5 unconstrained numbers" in str(found)
    assert "it is a quadratic program, which is solved exactly" in str(found)
    assert "quadratic program" not in str(check(Wavy()))


def test_a_report_has_gap_and_violation(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "HELD_OUT", 20)
    found = report(Dispatch, ("full",), out=tmp_path, **QUICK)
    assert "reference: quadratic program" in str(found)
    assert found.data["rows"][0]["infeasibility"] < 1e-5


@pytest.mark.parametrize("kind", [Dispatch, Mixed])
def test_gymnasium_and_agents_act_in_c_of_x(kind):
    check_env(single(kind), skip_render_check=True)
    rows = vector(kind(), 4)
    x, _ = rows.reset(seed=0)
    rows.action_space.seed(0)
    action = rows.action_space.sample()
    problem = kind()
    y = problem.domain.at(torch.from_numpy(x)).act(torch.from_numpy(action))
    _, reward, *_ = rows.step(action)
    np.testing.assert_allclose(reward, -problem.cost(y, problem.layout.unpack(torch.from_numpy(x))), rtol=1e-5)
    assert problem.domain.at(torch.from_numpy(x)).violation(y).max() < 1e-5
    env = NativeEnv(open_problem(kind), solutions=True)
    env.reset(seed=0)
    assert np.isfinite(env.step(np.full(kind().domain.dim, 100.0, np.float32))[1])
    bandit = open_env(kind, count=3)
    bandit.reset(0)
    assert bandit.step(bandit.domain.uniform(3)).reward.isfinite().all()
    fields = {"hidden": [8], "num_envs": 2, "warmup_steps": 4, "batch_size": 8, "buffer_size": 60, "eval_episodes": 2}
    ra.TD3(kind, seed=0, **fields).learn(20).score()


def test_a_solver_of_such_a_problem_is_kept(tmp_path):
    solver, x = ra.amortize(Dispatch, **QUICK), contexts(Dispatch)
    solver.save(tmp_path / "kept")
    assert torch.equal(ra.load_solver(tmp_path / "kept", Dispatch).predict(x), solver.predict(x))


def test_data_that_are_missing_or_wrong_are_named():
    class Forgot(Dispatch):
        domain_data = ra.Problem.domain_data

    class Wrong(Dispatch):
        def domain_data(self, x):
            return {"b": x["demand"][:, 0]}

    for kind, message in ((Forgot, "Forgot.domain_data: it is not defined"), (Wrong, "Wrong.domain_data: 'b': shape")):
        with pytest.raises(UserError, match=message):
            ra.amortize(kind, **QUICK)
        assert not check(kind()).ok
