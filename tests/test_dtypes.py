"""Contexts of any dtype, as NumPy's float64: networks see torch's default one, and what users hold is taken as it is."""

import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort.domain import Simplex
from rlamort.env.iterate import IterateEnv
from rlamort.env.one_step import OneStep, single
from rlamort.errors import UserError
from rlamort.measure.check import check
from rlamort.measure.fit import compare, report
from rlamort.model import Full, Unroll
from rlamort.nets import Zeros
from rlamort.objective import Cost
from rlamort.problem import Problem, draw, presented, unseen
from rlamort.run.learner import learner_class
from rlamort.solve.classical import best_found, solution_of
from rlamort.update import Anderson, Lbfgs
from rlamort.update.parametric import ParametricStep

QUICK = {"hidden": (16,), "batch_size": 16, "steps": 12}
DATA = np.random.default_rng(0).normal(size=(64, 4))  # NumPy's default dtype


class Alone(Problem):
    """A data set of float64, of which some is held out."""

    domain = Simplex(4)
    convex = True

    def contexts(self, count):
        return torch.from_numpy(DATA[:48])[torch.randint(48, (count,))]

    def held_out(self, count):
        return torch.from_numpy(DATA[48:])[torch.randint(16, (count,))]

    def cost(self, y, x):
        return 0.5 * y.square().sum(-1) - (x * y).sum(-1)


class Mixed(Problem):
    """Parts of every kind, in a dict."""

    domain = Simplex(4)
    convex = True

    def contexts(self, count):
        return {
            "gain": torch.randn(count, 4, dtype=torch.float64),
            "risk": 1 + torch.rand(count, 4),
            "kind": torch.randint(3, (count,)),
            "open": torch.rand(count) > 0.5,
            "half": torch.rand(count, 1, dtype=torch.float16),
        }

    def cost(self, y, x):
        assert (x["kind"].dtype, x["open"].dtype) == (torch.int64, torch.bool)
        assert y.dtype == x["gain"].dtype == x["risk"].dtype == x["half"].dtype
        return (x["risk"] * y.square() - x["gain"] * y).sum(-1) + x["kind"] * x["open"] * x["half"][:, 0]


class Told(Alone):
    """All that it returns is float64, whatever it is given."""

    def cost(self, y, x):
        return super().cost(y.double(), x.double())

    def solution(self, x):
        return self.domain.nearest(x.double())

    def residual(self, y, x):
        return (y.double() - self.solution(x)).norm(dim=-1)

    def map(self, y, x):
        return self.domain.nearest(y.double() - 0.5 * (y.double() - x.double()))


KINDS = [Alone, Mixed, Told]
TRAININGS = [
    {"model": "full"},
    {"model": "full", "dataset_size": 8},
    {"model": "semi"},
    {"model": "choice"},
    {"model": "latent"},
    {"model": "full", "loss": "regress"},
    {"model": "full", "loss": {"kind": "es", "pairs": 2}},
    {"model": "recurrent", "loss": "iterates"},
    {"model": "full", "loss": "rl", "warmup_steps": 4},
]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_in_the_dtype_of_networks(kind):
    problem = kind()
    assert check(problem).ok, str(check(problem))
    assert {presented(problem, 3, drawn=given).dtype for given in (draw, unseen)} == {torch.get_default_dtype()}
    assert OneStep(problem, 3, torch.device("cpu")).reset(0).dtype == torch.get_default_dtype()
    learner = learner_class("amortize")(problem, dataset_size=5, **QUICK)
    assert learner.source.data.x.dtype == learner.source.sample(3).x.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", TRAININGS, ids=lambda fields: ", ".join(map(str, fields.values())))
def test_every_training_takes_them(kind, fields):
    solver = ra.amortize(kind, **QUICK, **fields)
    assert {p.dtype for p in solver.parameters() if p.is_floating_point()} == {torch.get_default_dtype()}
    x = kind().contexts(5)
    assert solver.predict(x).dtype == torch.get_default_dtype()
    answer = solver.solve(x, tol=1e-3, certify=True)
    assert answer.bound.max() <= 1e-3
    assert answer.y.dtype == answer.cost.dtype == answer.bound.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_class_gives_is_taken_as_it_is_and_as_networks_see_it(kind):
    solver, x = ra.amortize(kind, **QUICK), kind().contexts(5)
    expected = solver.predict(x)
    parts = x if isinstance(x, dict) else {"": x}
    arrays = {name: part.numpy() for name, part in parts.items()}
    narrow = {name: part.float() if part.is_floating_point() else part for name, part in parts.items()}
    for given in (arrays, narrow):
        assert torch.equal(solver.predict(given if isinstance(x, dict) else given[""]), expected)


def test_a_dtype_that_is_neither_is_named():
    solver = ra.amortize(Alone, **QUICK)
    with pytest.raises(UserError, match=r"x: torch\.float16 is given; torch\.float32 or torch\.float64 is needed"):
        solver.predict(torch.zeros(2, 4, dtype=torch.float16))


@pytest.mark.parametrize("kind", KINDS)
def test_references_and_steps_take_what_methods_return(kind):
    problem = kind()
    f, x = Cost(problem), presented(problem, 6)
    found = best_found(f, problem.domain, x, starts=2, solution=solution_of(problem))
    assert found.y.dtype == found.cost.dtype == torch.get_default_dtype()
    updates = [Lbfgs(problem.domain), Anderson()] if kind is Told else [Lbfgs(problem.domain)]
    for update in updates:
        y = Unroll(Full(Zeros(4), problem.domain), update, 20, problem.domain)(x, f.oracle(x))
        assert y.dtype == torch.get_default_dtype()
        torch.testing.assert_close(f(y, x), found.cost, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_agents_and_gymnasium_take_them(kind):
    env = single(kind)
    observation, _ = env.reset(seed=0)
    assert observation.dtype == np.float32
    assert isinstance(env.step(env.action_space.sample())[1], float)
    learner = ra.TD3(kind, hidden=(16,), warmup_steps=4, batch_size=8, eval_episodes=2)
    learner.learn(12)
    assert np.isfinite(learner.score(2).returns).all()
    learner.close()


def test_reports_and_comparisons_take_them(monkeypatch):
    monkeypatch.setattr("rlamort.measure.fit.HELD_OUT", 20)
    for kind in KINDS:
        assert report(kind, ["full"], ["objective"], **QUICK).data["rows"][0]["failed"] == 0
        gaps = compare(kind, ["full"], ["objective", "regress"], seeds=(0,), **QUICK).data
        assert all(np.isfinite(one["gaps"]).all() for one in gaps.values())


class Rate(ParametricStep):
    """A gradient step whose size is decided."""

    decisions, inputs, outputs = 1, 4, 1

    def features(self, y, h, x, oracle):
        return y[:, None]

    def forward(self, u, y, h, x, oracle):
        return y - u[:, 0].exp() * oracle.grad(y), h


def test_a_solver_is_an_environment_for_them():
    problem, step = Told(), Rate()
    env = IterateEnv(problem, step, Full(Zeros(4), problem.domain), horizon=3, tol=1e-3, instances=2)
    env.reset(0)
    assert env.step(torch.zeros(env.count, step.outputs)).reward.dtype == torch.get_default_dtype()


def test_a_domain_of_the_class_moves_with_its_problem():
    """To another dtype, and so to another device: Python found the class's own in place of the problem's."""

    class Boxed(Problem):
        domain = ra.Box([0.0, 0.0], [1.0, 2.0])

    moved = Boxed().double()
    assert moved.domain is not Boxed.domain
    assert moved.domain.scale.dtype == torch.float64
    assert Boxed.domain.scale.dtype == torch.float32


class Held(Alone):
    """With a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("price", torch.tensor(0.5))

    def cost(self, y, x):
        assert y.dtype == x.dtype == self.price.dtype
        return super().cost(y, x) + self.price


@pytest.mark.parametrize("model", ["full", "semi"])
def test_all_is_float64_where_that_is_asked_for_and_nothing_outside(model, tmp_path):
    solver = ra.amortize(Held, **QUICK, dtype="float64", model=model, seed=0)
    assert {p.dtype for p in (*solver.parameters(), *solver.problem.buffers()) if p.is_floating_point()} == {torch.float64}
    assert torch.get_default_dtype() is torch.float32
    x = torch.from_numpy(DATA[:10])
    answer = solver.solve(x, tol=1e-12)
    assert answer.y.dtype is torch.float64
    assert answer.bound.max() <= 1e-12  # which no float32 could say
    solver.save(tmp_path / "solver")
    assert torch.equal(ra.load_solver(tmp_path / "solver", Held).predict(x), solver.predict(x))


def test_an_agent_of_a_problem_in_float64_is_saved_loaded_scored_and_resumed_so(tmp_path):
    fields = {"hidden": (8,), "batch_size": 8, "dtype": "float64", "seed": 0, "eval_episodes": 2, "checkpoint_every": 5}
    learner = ra.AMORTIZE(Held, **fields, dir=tmp_path / "run").learn(10)
    y, _ = learner.predict(DATA)
    assert y.dtype == np.float64
    assert learner.score(3).returns == learner.score(3).returns
    learner.save(tmp_path / "kept")
    learner.close()
    loaded = ra.load(tmp_path / "kept", env=Held)
    assert np.array_equal(loaded.predict(DATA)[0], y)
    again, exactness = ra.resume(tmp_path / "run", env=Held)
    assert exactness == "exact"
    again.learn(5, reset_num_timesteps=False)
    whole = ra.AMORTIZE(Held, **fields).learn(15)
    assert np.array_equal(again.predict(DATA)[0], whole.predict(DATA)[0])


def test_what_float64_is_not_for_is_said():
    with pytest.raises(UserError, match="dtype=float64: td3 has no choice there"):
        ra.TD3("Pendulum-v1", dtype="float64")
    with pytest.raises(UserError, match="dtype=float64: loss=rl trains TD3, whose replay is float32"):
        report(Held, ("full",), ("objective", "rl"), dtype="float64")
    with pytest.raises(UserError, match="dtype=half: "):
        check(Held(), dtype="half")
    problem = Held()
    assert check(problem, dtype="float64").ok
    assert problem.price.dtype is torch.float32  # a copy was checked
