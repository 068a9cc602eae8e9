"""From a user's problem to a solver: training, tables, certificates, files, and what is said when something is wrong."""

import gymnasium
import pytest
import torch
from rlamort.envs.energy import EnergyRegression
from test_cli import rlamort
from torch import nn

import rlamort as ra
from rlamort.config import methods, read_row
from rlamort.env.one_step import vector
from rlamort.errors import Diverged, UserError
from rlamort.losses import Downstream, OverIterates, Regress, Smoothed, objective
from rlamort.measure.check import MODELS, check, misfit
from rlamort.measure.evaluate import evaluate
from rlamort.measure.fit import behind, compare, report
from rlamort.measure.table import Row
from rlamort.measure.trainings import pairs, require_trainings
from rlamort.model import Expert, Full, Unroll
from rlamort.objective import Cost
from rlamort.parts.labels import Solved
from rlamort.problem import draw
from rlamort.run.learner import Learner, learner_class
from rlamort.run.restore import resume
from rlamort.source import Contexts
from rlamort.update import Gradient, Update

QUICK = {"hidden": (16,), "batch_size": 32, "steps": 60}


class Portfolio(ra.Problem):
    """Its solution is the point of the simplex nearest to x, since the cost is |y - x|^2 / 2 but for a constant."""

    domain = ra.Simplex(6)
    convex = True

    def contexts(self, count):
        return torch.randn(count, 6)

    def cost(self, y, x):
        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)


class Known(Portfolio):
    def solution(self, x):
        return self.domain.nearest(x)


class Learnt(ra.Problem):
    """f(y; x) = |y - x|^2 + |w - 3|^2: the problem's own parameter has its optimum at 3, whatever y is."""

    domain = ra.Euclid(2)

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def contexts(self, count):
        return {"x": torch.randn(count, 2)}

    def cost(self, y, x):
        return (y - x["x"]).square().sum(-1) + (self.w - 3).square()


class Steps(ra.Problem):
    """A cost that is flat almost everywhere, so that its gradient says nothing."""

    domain = ra.Box([-1.0, -1.0], [1.0, 1.0])

    def contexts(self, count):
        return torch.rand(count, 2) - 0.5

    def cost(self, y, x):
        return ((y - x).abs() * 20).round().sum(-1)


@pytest.mark.parametrize("model", ["full", "choice", "semi", "recurrent", "latent"])
@pytest.mark.parametrize("loss", ["objective", "regress", "iterates", "es"])
def test_every_model_learns_by_every_loss(model, loss, device):
    torch.manual_seed(0)
    solver = ra.amortize(Known, model=model, loss=loss, device=str(device), learning_rate=1e-2, **QUICK)
    x = solver.draw(200)
    exact = solver.f(Known().to(device).domain.nearest(x), x)
    naive = solver.f(torch.full((200, 6), 1 / 6, device=device), x) - exact
    gap = solver.f(solver.predict(x), x) - exact
    assert gap.min() > -1e-5
    assert gap.mean() < 0.8 * naive.mean()


@pytest.mark.parametrize(("model", "more"), [("semi", {}), ("recurrent", {}), ("recurrent", {"update": {"head": "gated"}})])
def test_steps_may_begin_in_the_middle_of_the_domain(model, more, device):
    """And learn to leave it, though no network predicts where to begin."""
    torch.manual_seed(0)
    solver = ra.amortize(
        Known, model={"kind": model, "init": "middle", **more}, device=str(device), learning_rate=1e-2, **QUICK
    )
    x = solver.draw(200)
    path = solver.model.iterates(x, solver.f.oracle(x))
    middle = torch.full((200, 6), 1 / 6, device=device)
    torch.testing.assert_close(path[0], middle)
    exact = solver.f(Known().to(device).domain.nearest(x), x)
    assert (solver.f(path[-1], x) - exact).mean() < 0.5 * (solver.f(middle, x) - exact).mean()


@pytest.mark.parametrize("loss", ["objective", "rl"])
def test_steps_are_converted_as_every_other_key_is(loss):
    solver = ra.amortize(Portfolio, loss=loss, steps="2", hidden=(8,), batch_size="4")
    assert solver.facts["steps"] == 2


def test_a_method_that_is_missing_is_named():
    class Unfinished(ra.Problem):
        domain = ra.Simplex(3)

    with pytest.raises(UserError, match=r"Unfinished.contexts: it is not defined; contexts\(count\)"):
        ra.amortize(Unfinished, steps=1)
    Unfinished.contexts = lambda self, count: torch.randn(count, 3)
    with pytest.raises(UserError, match=r"Unfinished.cost: it is not defined; cost\(y, x\)"):
        ra.amortize(Unfinished, steps=1)


def test_certified_answers_are_that_good_even_untrained():
    solver = ra.amortize(Portfolio(), model="full", seed=3, hidden=(8,), batch_size=4, steps=1)
    x = torch.randn(500, 6)
    solved = solver.solve(x, tol=1e-4, certify=True)
    exact = ra.Simplex(6).nearest(x)
    gap = solved.cost - solver.f(exact, x)
    assert solved.kind == "duality gap"
    assert (solved.bound <= 1e-4).all()
    assert (gap <= solved.bound + 1e-6).all()
    assert {status.split(":")[0] for status in solved.status} <= {"predicted", "re-solved"}


def test_a_policy_is_a_model(tmp_path):
    solver = ra.amortize(Steps, loss="rl", steps=120, warmup_steps=50, batch_size=32, hidden=(16,))
    y = solver.predict(torch.rand(5, 2))
    assert y.shape == (5, 2)
    assert (y.abs() <= 1).all()
    solver.save(tmp_path / "kept")
    assert torch.equal(
        ra.load_solver(tmp_path / "kept", Steps).predict(torch.full((1, 2), 0.3)), solver.predict(torch.full((1, 2), 0.3))
    )


@pytest.mark.parametrize("loss", ["objective", "es"])
def test_what_is_learnt_together_moves_together_and_is_what_is_measured(loss):
    learner = learner_class("amortize")(Learnt, loss=loss, learning_rate=3e-2, **QUICK)
    before = learner.score(64).returns
    learner.learn(400)
    assert learner.agent.problem is learner.source.problem
    assert learner.agent.problem.w.item() == pytest.approx(3, abs=0.2)
    assert sum(learner.score(64).returns) > sum(before) + 64 * 8  # the evaluation sees the w that was learnt


@pytest.mark.parametrize("model", ["full", "semi"])
def test_evolution_strategies_give_the_parameters_of_a_cost_its_own_gradient(model):
    """Also beside steps that ask for the cost, and reach its parameters besides."""
    agent = learner_class("amortize")(Learnt, model=model, loss="es", **QUICK).agent
    batch = Contexts(draw(agent.problem, 5))
    (slope,) = torch.autograd.grad(agent.loss(agent.model, agent.f, batch)[0], agent.problem.w)
    assert slope.item() == pytest.approx(2 * (0 - 3))


UNREACHED = {
    "full": ("EnergyRegression", {}, r"loss=objective, model=full: no gradient reaches EnergyRegression.energy.0.weight and 4"),
    "choice": ("EnergyRegression", {"model": "choice", "loss": "es"}, "loss=es, model=choice: no gradient reaches EnergyReg"),
    "first order": ("EnergyRegression", {"model": "recurrent"}, "model=recurrent: no gradient reaches EnergyRegression.energy"),
    "regress": ("EnergyRegression", {"loss": "regress"}, r"regress: it has no gradient for .* \(energy.0.weight and 4 more\)"),
    "rl": ("EnergyRegression", {"loss": "rl"}, r"EnergyRegression: rewards have no gradient for the parameters .*energy.0"),
    "the model": ("Sphere", {"model": {"kind": "Unroll", "adjoint": "implicit"}}, "gradient reaches model.update.rate.log"),
    "no model": ("Sphere", {"model": "middle"}, "loss=objective, model=middle: there is nothing to train"),
}


@pytest.mark.parametrize(("name", "fields", "said"), UNREACHED.values(), ids=list(UNREACHED))
def test_what_would_not_be_trained_is_said_before_any_work(name, fields, said, monkeypatch):
    monkeypatch.setattr(Learner, "learn", None)
    with pytest.raises(UserError, match=said):
        ra.amortize(f"rlamort/{name}-v0", **fields)


@pytest.mark.parametrize("method", ["td3", "sb3/sac"])
def test_agents_that_see_rewards_alone_need_a_frozen_problem(method):
    kind = learner_class(method)
    with pytest.raises(UserError, match=r"env=Learnt: rewards have no gradient for the parameters of Learnt.*\(w\); freeze"):
        kind(Learnt)
    with pytest.raises(UserError, match="freeze them"):
        kind(vector(Learnt, num_envs=1))
    kind(Learnt().requires_grad_(False)).close()


FROZEN = {"rl": {"warmup_steps": 5}, "regress": {}, "labels": {"labels": "search", "dataset_size": 4}}


@pytest.mark.parametrize("kind", FROZEN)
def test_what_only_training_needs_is_not_asked_of_what_is_loaded(kind, tmp_path, monkeypatch):
    """A frozen problem, labels, and the device; the class makes one that is not frozen."""
    loss = {"kind": "regress", "teacher": "labels"} if kind == "labels" else kind
    fields = {**QUICK, "steps": 10, **FROZEN[kind]}
    solver = ra.amortize(Learnt().requires_grad_(False), loss=loss, **fields)
    solver.facts["device"] = "cuda:7"
    solver.save(tmp_path / "kept")
    monkeypatch.setattr(Solved, "__call__", None)
    again, x = ra.load_solver(tmp_path / "kept", Learnt), solver.problem.contexts(3)
    assert torch.equal(again.predict(x), solver.predict(x))


def test_an_agent_of_a_frozen_problem_is_loaded_and_scored_but_not_trained_on_another(tmp_path):
    frozen = Learnt().requires_grad_(False)
    learner = learner_class("td3")(frozen, hidden=(8,), batch_size=4, warmup_steps=5).learn(10)
    learner.save(tmp_path / "kept")
    assert "over 4" in "".join(evaluate(str(tmp_path / "kept"), 4, None, {"env": Learnt}))
    with pytest.raises(UserError, match="freeze them"):
        ra.load(tmp_path / "kept", Learnt).learn(10)
    ra.load(tmp_path / "kept", frozen).learn(10)


@pytest.mark.parametrize("kind", [Learnt, EnergyRegression])
def test_check_says_what_trains_the_parameters_of_a_problem(kind):
    """Every pair that fits learns, and of what does not fit no pair does."""
    looked = check(kind())
    models = {fit.name for fit in looked.models if fit.fits}
    losses = {fit.name for fit in looked.losses if fit.fits}
    assert models == (set(MODELS) if kind is Learnt else {"semi", "latent"})
    assert losses == {"objective", "iterates", "es"}
    for loss in losses:
        for model in MODELS:
            if model in models:
                learner_class("amortize")(kind, model=model, loss=loss, **QUICK).learn(2)
            else:
                assert misfit(kind(), model, loss)


def test_asking_what_is_trained_changes_nothing():
    before = torch.get_rng_state()
    agent = learner_class("amortize")(Portfolio, model={"kind": "full", "norm": "batch"}, loss="es", **QUICK).agent
    assert torch.equal(torch.get_rng_state(), before)
    state = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    agent.require_trained()
    assert all(torch.equal(tensor, state[name]) for name, tensor in agent.state_dict().items())
    assert all(p.grad is None for p in agent.parameters())


class Corners(ra.Problem):
    """Second derivatives at y = x are not finite, and y = x is where training leads."""

    domain = ra.Box([-1.0, -1.0], [1.0, 1.0])

    def contexts(self, count):
        return torch.randn(count, 2).sign()

    def cost(self, y, x):
        return (y - x).norm(dim=-1)


def test_a_training_that_diverges_gives_no_solver():
    fields = QUICK | {"steps": 300, "learning_rate": 1e-2}
    with pytest.raises(Diverged, match=r"model\..* is no longer finite"):
        ra.amortize(Corners, model="semi", **fields)
    solver = ra.amortize(Corners, model={"kind": "semi", "adjoint": "first_order"}, **fields)  # as `rlamort check` says
    x = Corners().contexts(50)
    assert (solver.predict(x) - x).abs().max() < 0.1


def test_a_solver_that_is_not_finite_is_not_saved(tmp_path):
    solver = ra.amortize(Portfolio, **QUICK | {"steps": 1})
    nn.init.constant_(solver.model.net[1][0].bias, torch.nan)
    with pytest.raises(Diverged, match=r"^model\.net\.1\.0\.bias is no longer finite"):
        solver.save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_solver_comes_back_from_its_folder(tmp_path):
    solver = ra.amortize(Portfolio, model="semi", **QUICK)
    solver.save(tmp_path / "kept")
    again = ra.load_solver(tmp_path / "kept", Portfolio)
    x = torch.randn(7, 6)
    assert torch.equal(again.predict(x), solver.predict(x))
    assert again.training_seconds == solver.training_seconds
    with pytest.raises(UserError, match="kept"):
        ra.load_solver(tmp_path / "kept", Learnt)
    with pytest.raises(UserError, match=r"kept: it holds a solver, which rlamort\.load_solver\('.*kept', Problem\) loads"):
        ra.load(tmp_path / "kept")


def test_answers_in_float64_need_nothing_of_a_problem_but_that_its_cost_is():
    """With no tensor of its own, with one that is float64, and with one that only a copy in float64 has so."""

    class Scaled(Portfolio):
        def __init__(self, dtype):
            super().__init__()
            self.register_buffer("scale", torch.ones((), dtype=dtype))

        def cost(self, y, x):
            return self.scale * super().cost(y, x)

    class Single(Portfolio):
        def cost(self, y, x):
            return super().cost(y, x).float()

    x = torch.randn(5, 6)
    for problem in (Portfolio(), Scaled(torch.float32), Scaled(torch.float64)):
        solver = ra.amortize(problem, model="full", loss="objective", **QUICK | {"steps": 1})
        answer = solver.solve(x, tol=1e-12, dtype=torch.float64)
        assert answer.y.dtype is torch.float64
        assert answer.bound.max() <= 1e-12
        assert set(answer.status) <= {"predicted", "re-solved"}
    with pytest.raises(UserError, match=r"Single\.cost does not give float64"):
        ra.amortize(Single(), model="full", **QUICK | {"steps": 1}).solve(x, tol=1e-3, dtype=torch.float64)


@pytest.mark.parametrize("method", ["sphere", "sac"])
def test_a_run_on_a_problem_resumes_bit_for_bit(method, tmp_path):
    """Amortized, and as an environment that SAC acts in."""
    fields = {
        "env": "rlamort/Sphere-v0",
        "hidden": (16,),
        "batch_size": 16,
        "log_every": 10,
        "eval_every": 20,
        "eval_episodes": 8,
    }
    fields |= {"steps": 40, "warmup_steps": 0 if method == "sphere" else 10}
    whole = learner_class(method)(**fields, dir=str(tmp_path / "whole")).learn(40)
    half = learner_class(method)(**fields, dir=str(tmp_path / "half")).learn(20)
    half.close()
    again, exactness = resume(tmp_path / "half", {})
    again.learn(20, reset_num_timesteps=False)
    assert exactness == "exact"
    states = zip(whole.agent.state_dict().values(), again.agent.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    whole.close()
    again.close()


def test_a_saved_agent_of_a_registered_problem_loads_without_being_told(tmp_path):
    learner = learner_class("sphere")("rlamort/Sphere-v0", **QUICK).learn(5)
    learner.save(tmp_path / "kept")
    x = learner.source.sample(3).x
    assert torch.equal(ra.load(tmp_path / "kept").agent.act(x, explore=False), learner.agent.act(x, explore=False))


@pytest.mark.parametrize("name", [name for name in methods() if read_row(name)["source"] == "rlamort.source.Fresh"])
def test_every_row_of_a_problem_runs(name):
    """Rows bring their own problem; that of a user's takes any."""
    env = read_row(name).get("env", Portfolio)
    learner = learner_class(name)(env, batch_size=4, eval_episodes=2, compile=False)
    before = {key: value.clone() for key, value in learner.agent.state_dict().items()}
    learner.learn(3)
    after = learner.agent.state_dict()
    learned = [key for key in after if key.startswith("model.")] or list(after)  # an energy is the problem's, and all there is
    assert any(not torch.equal(before[key], after[key]) for key in learned)


def test_a_dataset_holds_its_contexts():
    learner = learner_class("amortize")(Portfolio, dataset_size=5, **QUICK)
    rows = {tuple(row.tolist()) for row in learner.source.sample(200).x}
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("row", "env"), [("amortize", Portfolio), pytest.param("sphere", "rlamort/Sphere-v0", marks=pytest.mark.slow)]
)
def test_the_captured_update_is_the_eager_one(row, env):
    """Where an update cannot be captured, or differs, that is a warning, which is an error here."""
    pair = [learner_class(row)(env, compile=compile, **QUICK).learn(30) for compile in (False, True)]
    for one, other in zip(*(learner.agent.state_dict().values() for learner in pair), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-4)


class Quadratic(ra.Problem):
    """f(y; x) = y' A y / 2 - x' y, with y* = A^-1 x."""

    domain = ra.Euclid(3)
    A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]], dtype=torch.float64)

    def contexts(self, count):
        return torch.randn(count, 3, dtype=torch.float64)

    def cost(self, y, x):
        return 0.5 * ((y @ self.A) * y).sum(-1) - (x * y).sum(-1)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    problem = Quadratic()
    return Full(nn.Linear(3, 3, dtype=torch.float64), problem.domain), Cost(problem), Contexts(draw(problem, 50))


def gradient(loss, model):
    return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_evolution_strategies_estimate_the_true_gradient(linear):
    """Of a quadratic the smoothed gradient is the gradient itself, and the antithetic estimate errs by noise alone."""
    model, f, batch = linear
    exact = gradient(objective(model, f, batch)[0], model)
    many = torch.stack([gradient(Smoothed(0.3, 64)(model, f, batch)[0], model) for _ in range(40)])
    error = many.mean(0) - exact
    assert (error.abs() <= 5 * many.std(0) / 40**0.5 + 1e-9).all()
    assert error.norm() < 0.05 * exact.norm()
    assert not torch.allclose(many[0], exact, rtol=1e-6)  # it is an estimate


def test_regression_on_the_solution_is_its_distance(linear):
    model, f, batch = linear
    exact = torch.linalg.solve(Quadratic.A, batch.x.T).T
    loss, _ = Regress(Expert(lambda x: torch.linalg.solve(Quadratic.A, x.T).T))(model, f, batch)
    assert loss.item() == pytest.approx((model(batch.x) - exact).square().sum(-1).mean().item())


def test_iterates_are_weighed(linear):
    model, f, batch = linear
    unrolled = Unroll(model, Gradient(0.1), 2, Quadratic.domain)
    costs = [f(y, batch.x).mean() for y in unrolled.iterates(batch.x, f.oracle(batch.x))]
    assert OverIterates()(unrolled, f, batch)[0].item() == pytest.approx((sum(costs) / 3).item())
    weighed = (0.25 * costs[0] + 0.5 * costs[1] + costs[2]) / 1.75
    assert OverIterates(0.5)(unrolled, f, batch)[0].item() == pytest.approx(weighed.item())
    assert OverIterates(0.0)(unrolled, f, batch)[0].item() == pytest.approx(costs[2].item())
    ends = 0.75 * costs[2] + 0.25 * costs[0]
    assert OverIterates(0.0, start=0.25)(unrolled, f, batch)[0].item() == pytest.approx(ends.item())
    assert torch.equal(OverIterates(0.0, start=0.25)(model, f, batch)[0], objective(model, f, batch)[0])  # it has no steps


@pytest.mark.parametrize(("loss", "learns"), [({"start": 0}, False), ({}, True), ({"kind": "iterates", "decay": 0}, False)])
def test_a_detached_start_needs_a_loss_that_scores_it(loss, learns):
    def build():
        return ra.AMORTIZE("rlamort/Arm-v0", model={"kind": "semi", "rate": 0.1}, loss=loss)

    if learns:
        build()
    else:
        with pytest.raises(UserError, match=r"loss=.*model.adjoint=detached the start would not be learned"):
            build()


def test_a_start_learns_where_steps_leave_nothing_to_learn(linear):
    """Newton's step solves the problem from anywhere, so that the last iterate has no gradient for the network."""
    model, f, batch = linear

    class Newton(Update):
        def forward(self, y, h, x, oracle):
            return torch.linalg.solve(Quadratic.A, x.T).T + 0 * y, h

    solved = Unroll(model, Newton(), 1, Quadratic.domain)
    alone = gradient(objective(model, f, batch)[0], model)
    assert not gradient(OverIterates(0.0)(solved, f, batch)[0], model).any()
    assert torch.allclose(gradient(OverIterates(0.0, start=0.25)(solved, f, batch)[0], model), 0.25 * alone)


def test_contexts_are_learnt_through_the_value_and_through_the_solution():
    """x = phi + e, y*(x) = A^-1 x: d/dphi E f(y*(x); x) = -E y*(x) (envelope theorem), d/dphi E g(y*(x)) = A^-T E g'(y*)."""
    torch.manual_seed(0)
    phi = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = phi + torch.randn(400, 3, dtype=torch.float64)
    model, f = Expert(lambda x: torch.linalg.solve(Quadratic.A, x.T).T), Cost(Quadratic())
    solution = model(x).detach()
    (value,) = torch.autograd.grad(objective(model, f, Contexts(x))[0], phi, retain_graph=True)
    torch.testing.assert_close(value, -solution.mean(0))
    downstream = Downstream(lambda y, x: (y - 1).square().sum(-1))
    (through,) = torch.autograd.grad(downstream(model, f, Contexts(x))[0], phi)
    torch.testing.assert_close(through, torch.linalg.solve(Quadratic.A.T, 2 * (solution - 1).mean(0)))


def test_the_report_holds_models_against_the_known_solution(tmp_path):
    found = report(Known, ["full", "semi"], ["objective"], tmp_path / "out", **QUICK)
    text = "\n".join(found.lines)
    assert "reference: solution" in text
    assert {row["name"] for row in found.data["rows"]} == {"full", "semi"}
    assert all(row["gap"] >= -1e-6 for row in found.data["rows"])
    assert "by duality gap" in text
    assert (tmp_path / "out" / "gaps.png").stat().st_size > 10_000
    assert ra.load_solver(tmp_path / "out" / "semi", Known).predict(torch.randn(2, 6)).shape == (2, 6)


def test_comparing_freezes_the_objective_and_shares_the_budget():
    found = compare(Known, ["full"], ["objective", "regress"], seeds=(0, 1), **QUICK)
    assert set(found.data) == {"full, objective", "full, regress"}
    assert all(len(one["gaps"]) == 2 and min(one["gaps"]) >= -1e-6 for one in found.data.values())


def test_comparing_says_what_it_does_and_does_what_was_asked(capsys, monkeypatch):
    """Regression needs a solver for every batch where no solution is known: nobody asked for that."""
    monkeypatch.setattr("rlamort.measure.fit.HELD_OUT", 20)
    assert set(compare(Known, seeds=(0,), **QUICK).data) == {"full, objective", "full, regress"}
    assert set(compare(Portfolio, seeds=(0,), **QUICK).data) == {"full, objective"}
    assert set(compare((Portfolio(), Portfolio()), seeds=(0,), **QUICK).data) == {"full, objective"}
    assert set(compare(Portfolio, losses=["regress"], seeds=(0,), **QUICK).data) == {"full, regress"}
    told = capsys.readouterr().out.splitlines()
    solving = "solving: 20 contexts held out, for the reference"
    assert told[:3] == [solving, "training: full, objective, seed 0", "training: full, regress, seed 0"]
    assert told.count(solving) == 4


def test_reporting_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr("rlamort.measure.fit.HELD_OUT", 20)
    report(Known, ["full"], **QUICK)
    told = ["training: full", "solving: 20 contexts held out, for the reference", "timing: full, and classical solvers"]
    assert capsys.readouterr().out.splitlines() == told


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iteration": 3}, "iteration: there is no such key"),
        ({"learning_rate": -1}, "learning_rate=-1: a number > 0 is needed"),
        ({"model": {"steps": 0}}, "model.steps=0: a whole number >= 1 is needed"),  # of the second model
        ({"seeds": (0, 0)}, r"seeds=\[0, 0\]: one or more are needed, each another"),
        ({"seeds": ()}, r"seeds=\[\]: one or more"),
        ({"seed": 1}, "seed=1: a comparison has seeds, a training each, as in seeds=0,1,2"),
    ],
)
@pytest.mark.filterwarnings("ignore:loss=rl")
def test_values_that_a_later_training_would_refuse_are_said_before_any_work(fields, message, capsys):
    for command in (report, compare) if not fields.keys() & {"seed", "seeds"} else (compare,):
        with pytest.raises(UserError, match=message):
            command(Known, ["full", "semi"], ["objective", "rl"] if "learning_rate" in fields else ["objective"], **fields)
        assert not capsys.readouterr().out


def test_one_seed_has_no_interval(monkeypatch):
    monkeypatch.setattr("rlamort.measure.fit.HELD_OUT", 20)
    (row,) = [line for line in compare(Portfolio, seeds=(0,), **QUICK).lines if line.startswith("| full")]
    assert [cell.strip() for cell in row.split("|")][4] == "-"


def test_wrong_names_and_wrong_problems_are_said_before_any_work():
    with pytest.raises(UserError, match=r"loss=objectiv.*Did you mean objective"):
        ra.amortize(Portfolio, loss="objectiv")
    with pytest.raises(UserError, match="model=ful"):
        report(Portfolio, ["ful"])
    with pytest.raises(UserError, match=r"iteration: there is no such key"):
        ra.amortize(Portfolio, iteration=3)
    with pytest.raises(UserError, match="a policy is a full model"):
        ra.amortize(Portfolio, loss="rl", model="semi")
    for command in (report, compare):
        with pytest.raises(UserError, match="nothing of semi by rl; model=full is needed"):
            command(Portfolio, ["semi"], ["rl"])
    with pytest.warns(UserWarning, match="left out: semi by rl"):
        assert pairs(["full", "semi"], ["rl"]) == [("full", "rl")]
    require_trainings(["full", "semi"], ["rl"], [0], {})  # which comes before, and leaves the warning to that
    with pytest.raises(UserError, match=r"loss=regress.*parameters of Learnt"):
        ra.amortize(Learnt, loss="regress")
    with pytest.raises(UserError, match=r"loss=regress: Outside\.solution returns points .* outside Simplex; points in it"):
        ra.amortize(Outside, loss="regress")
    with pytest.raises(UserError, match=r"objective: it does not fit Steps: .*gradient"):
        report(Steps, ["full"])
    with pytest.raises(UserError, match=r"(?s)Mixed.*batch"):
        report(Mixed)


class Outside(Portfolio):
    def solution(self, x):
        return x


class Mixed(Portfolio):
    def cost(self, y, x):
        return super().cost(y, x) - super().cost(y, x).mean()


def test_an_environment_whose_objective_is_not_known_cannot_be_amortized():
    with pytest.raises(UserError, match="Pendulum"):
        learner_class("amortize")("Pendulum-v1")


def test_the_commands_a_user_types(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nimport rlamort as ra\n\n\nclass Mine(ra.Problem):\n    domain = ra.Simplex(4)\n    convex = True\n\n"
        "    def contexts(self, count):\n        return torch.randn(count, 4)\n\n"
        "    def cost(self, y, x):\n        return -(x * y).sum(-1) + y.square().sum(-1)\n"
        "\n\nclass Broken(Mine):\n    def cost(self, y, x):\n        return (x * y).sum()\n"
    )
    quick = ["steps=40", "hidden=[8]", "batch_size=16"]
    assert "pass   Mine.cost, batch independence" in rlamort("check", "mine:Mine", cwd=tmp_path).stdout
    assert "fail   Broken.cost" in rlamort("check", "mine:Broken", cwd=tmp_path, code=1).stdout
    told = rlamort("amortize", "mine:Mine", "model=semi", *quick, cwd=tmp_path).stdout
    assert "| semi" in told
    assert len(list(tmp_path.glob("runs/amortize-Mine-*/gaps.png"))) == 1
    told = rlamort("compare", "mine:Mine", "loss=es", "seeds=0,1", *quick, cwd=tmp_path).stdout
    assert "| full  | es " in told
    assert "Did you mean Mine" in rlamort("amortize", "mine:Min", cwd=tmp_path, code=2).stderr
    refused = rlamort("train", "amortize", "env=CartPole-v1", cwd=tmp_path, code=2).stderr
    assert "CartPole-v1: it is an environment with dynamics" in refused
    run = rlamort("train", "sphere", *quick, "eval_episodes=4", cwd=tmp_path).stdout.splitlines()[-1]
    assert "mean cost, lower is better: " in rlamort("eval", run, cwd=tmp_path).stdout


def test_a_problem_is_a_gymnasium_environment():
    env = gymnasium.make("rlamort/Sphere-v0")
    observation, _ = env.reset(seed=0)
    _, reward, terminated, _, _ = env.step(env.action_space.sample())
    assert terminated
    assert observation.shape == (16,)
    assert abs(reward) < 10


def test_a_choice_keeps_the_cheapest_candidate_and_learns_by_it_alone():
    """Two wells, at 1 and -1, of which the sign of x says the deeper: one network jumps, two candidates need not."""
    torch.manual_seed(0)
    solver = ra.amortize(Wells, model={"kind": "choice", "candidates": 2}, learning_rate=1e-2, **QUICK | {"steps": 300})
    x = torch.randn(400, 1)
    y = solver.predict(x)
    assert (solver.f(y, x) <= solver.f(x.sign(), x) + 0.05).all()
    with torch.no_grad():
        v = solver.model.net(x).view(400, 2)
    assert (solver.f(y, x) <= torch.stack([solver.f(v[:, i : i + 1], x) for i in range(2)]).amin(0) + 1e-6).all()


class Wells(ra.Problem):
    domain = ra.Euclid(1)

    def contexts(self, count):
        return torch.randn(count, 1)

    def cost(self, y, x):
        return ((y.square() - 1).square() - 0.5 * x.sign() * y).sum(-1)


def test_the_sphere_turns_with_its_contexts():
    """A rotation, a reflection and another order of the components move the prediction as they move the minimum."""
    torch.manual_seed(0)
    learner = learner_class("sphere")("rlamort/Sphere-v0", **QUICK)
    problem = learner.agent.problem
    x = problem.contexts(20)
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    order = torch.randperm(4)
    moved = {"z": x["z"][:, order] @ turn.T, "alpha": x["alpha"][:, order]}
    y, other = (learner.agent.act(problem.layout.pack(one), explore=False) for one in (x, moved))
    torch.testing.assert_close(other, y @ turn.T, rtol=1e-4, atol=1e-4)


def test_a_semi_amortized_model_that_is_behind_is_said():
    def row(name, gap):
        return Row(name, gap, gap - 0.1, gap + 0.1, gap, 1.0, 0.0, 0, "", 1.0, {}, {}, {}, 1.0)

    rows = [row("full", 1.0), row("semi", 2.0), row("latent", 1.15), row("choice", 5.0)]
    (line,) = behind(rows)
    assert line.startswith("semi is worse than full")
    assert behind([row("full, es", 1.0), row("semi, es", 2.0), row("semi, objective", 9.0)])[0].startswith("semi, es is worse")
    assert behind([row("semi", 2.0)]) == []
