"""In which space gradient steps refine a prediction, and that none makes it worse."""

import json
import math

import pytest
import torch

import rlamort as ra
from rlamort import parts
from rlamort.measure.check import check
from rlamort.objective import Cost
from rlamort.run.learner import learner_class
from rlamort.solve.refine import refinement, repeats


class Entropic(ra.Problem):
    """min <x, y> + 0.3 sum y log(16 y) on a simplex: the gradient is infinite where a coordinate is 0."""

    domain = ra.Simplex(16)

    def contexts(self, count):
        return torch.randn(count, 16)

    def cost(self, y, x):
        return (x * y).sum(-1) + 0.3 * (math.log(16) * y - torch.special.entr(y)).sum(-1)

    def solution(self, x):
        return torch.softmax(-x / 0.3, -1)


class Barrier(ra.Problem):
    """min <x, y> - 0.05 sum (log y + log(1 - y)) on a box, whose minima lie close to its border."""

    domain = ra.Box([0.0] * 8, [1.0] * 8)

    def contexts(self, count):
        return 3 * torch.randn(count, 8)

    def cost(self, y, x):
        return (x * y).sum(-1) - 0.05 * (y.clamp(min=1e-6).log() + (1 - y).clamp(min=1e-6).log()).sum(-1)

    def solution(self, x):
        b = x.double() + 0.1  # x y^2 - (x + 0.1) y + 0.05 = 0
        root = (b.square() - 0.2 * x).sqrt()
        first, second = 0.1 / (b + root), 0.1 / (b - root)
        return torch.where((first > 0) & (first < 1), first, second).float()


class Reciprocal(ra.Problem):
    """min sum (x / y + y) over the orthant: infinite at its border, where no solution lies."""

    domain = ra.Orthant(8)

    def contexts(self, count):
        return 4 * torch.rand(count, 8) + 0.1

    def cost(self, y, x):
        return (x / y + y).sum(-1)

    def solution(self, x):
        return x.sqrt()


class Portfolio(ra.Problem):
    """Its solutions lie on the border of the simplex, which the chart never reaches."""

    domain = ra.Simplex(20)

    def contexts(self, count):
        return torch.randn(count, 20)

    def cost(self, y, x):
        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)

    def solution(self, x):
        return self.domain.nearest(x)


SPACES = {Entropic: "chart", Barrier: "chart", Reciprocal: "solution", Portfolio: "solution"}


def gap(problem, solver):
    torch.manual_seed(99)
    x = problem.contexts(500)
    cost, best = problem.cost(solver.predict(x), x), problem.cost(problem.solution(x), x)
    return ((cost - best).mean() / best.abs().mean()).item()


@pytest.mark.parametrize("kind", SPACES)
def test_semi_is_never_worse_than_full_at_equal_training(kind):
    """500 updates; at 1,500 the gaps are 8.8e-4, 7e-4, 1.1e-6 and 4.8e-5, and those of full 2.5e-3, 2.7e-2, 7e-4, 7.3e-2."""
    full, semi = (ra.amortize(kind, model=model, steps=500, seed=0, threads=1) for model in ("full", "semi"))
    assert semi.facts["model"]["space"] == SPACES[kind]
    assert gap(kind(), semi) < gap(kind(), full)


@pytest.mark.parametrize("kind", SPACES)
def test_check_says_which_space(kind):
    (semi,) = (fit for fit in check(kind()).models if fit.name == "semi")
    assert semi.fits
    assert ("space=chart" if SPACES[kind] == "chart" else "taken in Y") in semi.why


@pytest.mark.parametrize("space", ["solution", "chart"])
@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", SPACES)
def test_no_step_ends_above_where_it_began(kind, rate, space):
    torch.manual_seed(0)
    problem = kind()
    f, x = Cost(problem), problem.contexts(50)
    model = parts.Refined(parts.Full(hidden=()), 6, space=space, rate=rate)(parts.Setting.of(problem, ()))
    with torch.no_grad():
        costs = torch.stack([f(y, x) for y in model.iterates(x, f.oracle(x))])
    assert costs.isfinite().all()
    assert (costs[1:] <= costs[:-1]).all()


def test_what_is_tried_leaves_no_trace_and_what_was_chosen_is_kept(tmp_path):
    problem = Entropic()
    x, before = problem.contexts(100), torch.get_rng_state()
    first, again = (refinement(Cost(problem), problem.domain, x) for _ in range(2))
    assert first == again
    assert torch.equal(before, torch.get_rng_state())
    solver = ra.amortize(Entropic, model="semi", steps=30, hidden=[8])
    solver.save(tmp_path / "solver")
    assert torch.equal(ra.load_solver(tmp_path / "solver", Entropic).predict(x), solver.predict(x))
    learner = learner_class("amortize")(Entropic, model="semi", hidden=[8], dir=str(tmp_path / "run")).learn(20)
    assert (learner.config.values["model"].space, learner.config.values["model"].rate) == ("chart", 10.0)
    assert "space: chart" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_problem_may_keep_the_network_that_it_gives():
    """Its size is found out with a copy of the problem, so what the problem keeps is real."""

    class Keeping(Entropic):
        def __init__(self):
            super().__init__()
            self.kept = []  # a list, so that it is not the problem's own parameter too

        def network(self, hidden, candidates):
            self.kept = self.kept or [torch.nn.Linear(16, 16 * candidates)]
            return self.kept[0]

    learner = learner_class("amortize")(Keeping, hidden=[8]).learn(5)
    assert {tensor.device.type for tensor in learner.agent.state_dict().values()} == {learner.device.type}


def test_a_saved_solver_of_absurd_sizes_is_refused_before_it_is_made(tmp_path):
    ra.amortize(Entropic, model="semi", steps=20, hidden=[8]).save(tmp_path / "solver")
    file = tmp_path / "solver" / "agent.json"
    facts = json.loads(file.read_text())
    facts["facts"]["hidden"] = [10**6, 10**6]
    file.write_text(json.dumps(facts))
    with pytest.raises(ra.UserError, match=r"amortize: networks of these sizes take .* smaller ones are needed"):
        ra.load_solver(tmp_path / "solver", Entropic)


def test_a_step_size_is_that_of_y_and_a_space_may_be_asked_for():
    given = learner_class("amortize")(Entropic, model={"kind": "semi", "rate": 0.2}, hidden=[8])
    assert (given.agent.chosen["model"].space, given.agent.chosen["model"].rate) == ("solution", 0.2)
    asked = learner_class("amortize")(Entropic, model={"kind": "semi", "space": "solution"}, hidden=[8])
    assert asked.agent.chosen["model"].space == "solution"


def test_a_cost_that_draws_cannot_say_which_iterate_is_best():
    class Noisy(Portfolio):
        def cost(self, y, x):
            return super().cost(y, x) + 0.1 * torch.randn(len(y))

    x = Portfolio().contexts(10)
    assert repeats(Cost(Portfolio()), Portfolio.domain, x)
    assert not repeats(Cost(Noisy()), Portfolio.domain, x)
