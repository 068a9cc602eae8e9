"""What a context hides reaches the loss alone: neither networks nor what solvers ask on their way ever read it."""

import math

import pytest
import torch

from rlamort import Problem, UserError, amortize, parts
from rlamort.domain import Box, Euclid
from rlamort.env.one_step import OneStep
from rlamort.losses import objective
from rlamort.model import Full, Unroll
from rlamort.nets import mlp
from rlamort.objective import Cost
from rlamort.run.learner import learner_class
from rlamort.update import Gradient

N = 2


class Noisy(Problem):
    """What is seen is the truth with noise; what is scored is the distance to the truth, which is hidden."""

    domain = Box([-3.0] * N, [3.0] * N)
    hidden = ("truth",)

    def contexts(self, count):
        truth = torch.randn(count, N)
        return {"truth": truth, "seen": truth + 0.1 * torch.randn(count, N)}

    def cost(self, y, x):
        return (y - x["truth"]).square().sum(-1)

    def support(self, y, x):
        assert set(x) == {"seen"}
        return (y - x["seen"]).square().sum(-1)


class Poisoned(Noisy):
    def contexts(self, count):
        x = super().contexts(count)
        return x | {"truth": torch.full_like(x["truth"], math.nan)}


def model_of(problem):
    torch.manual_seed(0)
    return Unroll(Full(mlp(N, [8], N), problem.domain), Gradient(0.1), 3, problem.domain)


def drawn(problem):
    torch.manual_seed(1)
    return problem.layout.pack(problem.contexts(5))


def test_poisoned_parts_change_nothing_but_the_loss():
    f, poisoned = Cost(Noisy()), Cost(Poisoned())
    model, x, bad = model_of(f.problem), drawn(f.problem), drawn(poisoned.problem)
    assert bad.isnan().any()
    assert not x.isnan().any()
    y = model(f.seen(x), f.oracle(x))
    assert torch.equal(y, model(poisoned.seen(bad), poisoned.oracle(bad)))
    for ask in ("value", "grad"):
        assert torch.equal(getattr(f.oracle(x), ask)(y), getattr(poisoned.oracle(bad), ask)(y))
    batch = type("Batch", (), {"x": x})
    assert objective(model, f, batch)[0].isfinite()
    assert objective(model, poisoned, type("Batch", (), {"x": bad}))[0].isnan()


def test_rows_hold_what_is_seen_first_and_come_back_whole():
    problem = Noisy()
    layout, x = problem.layout, problem.contexts(4)
    assert (layout.dim, layout.seen.dim, layout.keys) == (2 * N, N, ("seen", "truth"))
    back = layout.unpack(layout.pack(x))
    assert all(torch.equal(back[key], x[key]) for key in x)
    assert torch.equal(layout.seen.unpack(layout.pack(x)[:, :N])["seen"], x["seen"])


def test_an_environment_shows_what_is_seen_and_scores_by_all():
    env = OneStep(Noisy(), 3, torch.device("cpu"))
    shown = env.reset(0)
    assert shown.shape == (3, N)
    assert env.spec.x_dim == N
    posed = env.problem.layout.unpack(env.whole_x)
    step = env.step(shown)
    torch.testing.assert_close(step.reward, -(shown - posed["truth"]).square().sum(-1))
    other = OneStep(Noisy(), 3, torch.device("cpu"))
    other.restore(env.state())
    assert torch.equal(other.x, env.x)
    assert torch.equal(other.step(other.x).reward, env.step(env.x).reward)


@pytest.mark.parametrize("fields", [{}, {"model": "semi"}])
def test_it_is_learnt_from(fields):
    """A network that learns from the truth shrinks what it sees towards its mean: by 1 / (1 + 0.1^2)."""
    solver = amortize(Noisy(), steps=1_000, hidden=[16], seed=0, **fields)
    torch.manual_seed(0)
    x = Noisy().contexts(2048)
    error = (solver.predict(x) - x["truth"]).square().sum(-1).mean()
    assert error < 3 * N * 0.1**2
    agent = learner_class("amortize")(Noisy, hidden=[8])
    action, _ = agent.predict(torch.zeros(N).numpy())
    assert action.shape == (N,)


def test_answers_need_what_is_seen_and_scores_all():
    solver = amortize(Noisy(), steps=2, hidden=[8])
    seen = {"seen": torch.zeros(3, N)}
    assert solver.predict(seen).shape == (3, N)
    with pytest.raises(UserError, match=r"x: the key 'truth' is missing.*cost"):
        solver.solve(seen)


def test_an_export_takes_what_is_seen(tmp_path):
    solver = amortize(Noisy(), model="full", steps=2, hidden=[8])
    solver.export(tmp_path / "noisy.pt2")
    seen = torch.randn(5, N)
    read = torch.export.load(tmp_path / "noisy.pt2").module()
    torch.testing.assert_close(read(seen), solver.predict({"seen": seen}))


class Huber(Noisy):
    """No quadratic program, so that a search finds its solutions."""

    def cost(self, y, x):
        return torch.nn.functional.huber_loss(y, x["truth"], reduction="none", delta=0.5).sum(-1)


def test_a_regression_is_on_what_minimises_the_cost():
    """... which reads what is hidden, and not on what minimises the support of steps."""
    setting = parts.Setting.of(Huber(), (8,))
    truth = Huber().layout.unpack(setting.contexts[:50])["truth"].clamp(-3, 3)
    torch.testing.assert_close(parts.Solution()(setting)(setting.contexts[:50]), truth, atol=1e-3, rtol=0)


class Blind(Noisy):
    hidden = ("seen", "truth")


class Absent(Noisy):
    hidden = ("label",)


class Unsupported(Noisy):
    support = Problem.support


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Blind, "Blind.hidden: it hides every key"),
        (Absent, "Absent.hidden: 'label' is no key of its contexts; allowed: truth, seen"),
        (Unsupported, "Unsupported.support: its cost reads 'truth', which is hidden"),
    ],
)
def test_what_cannot_be_hidden_is_said_before_training(kind, said):
    with pytest.raises(UserError, match=said):
        amortize(kind(), steps=2, hidden=[8], model="semi")


class Broken(Noisy):
    def contexts(self, count):
        x = super().contexts(count)
        x["truth"][0] = math.nan
        return x


def test_a_label_that_is_missing_is_named():
    with pytest.raises(Exception, match=r"Broken\.contexts, truth: they hold nan"):
        OneStep(Broken(), 3, torch.device("cpu")).reset(0)


def test_nothing_is_hidden_unless_it_is_said():
    class Open(Problem):
        domain = Euclid(N)

        def contexts(self, count):
            return torch.randn(count, N)

        def cost(self, y, x):
            return (y - x).square().sum(-1)

    f = Cost(Open())
    x = torch.randn(3, N)
    assert f.seen(x) is x or torch.equal(f.seen(x), x)
    assert f.problem.layout.seen is f.problem.layout
