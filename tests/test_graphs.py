"""Functions recorded as CUDA graphs, here by a stand-in that refuses what a graph could not hold (see fake_cuda.py)."""

import copy

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from test_cuda import FITTED, PLANNER, SMALL

from rlamort.host.graphs import SHAPES, Recorded, Recording, close
from rlamort.run.learner import learner_class


def noisy(x, *kept):
    return (x * 2 + torch.randn_like(x), *kept)


def test_a_recorded_function_draws_and_returns_what_the_function_does(monkeypatch):
    with fake_cuda(monkeypatch):
        inputs = [(torch.ones(shape, device=CUDA) * number,) for number in range(4) for shape in ((3,), (2,))]
        found = {}
        for name, function in {"plain": noisy, "recorded": Recorded(noisy, "f")}.items():
            torch.manual_seed(0)
            with torch.no_grad():
                found[name] = [function(*given)[0].cpu() for given in inputs]
        assert all(torch.equal(one, other) for one, other in zip(found["plain"], found["recorded"], strict=True))
        assert [type(one) for one in function.known.values()] == [Recording, Recording]
        assert copy.deepcopy(function).known == {}


def test_results_are_not_overwritten_by_the_next_call(monkeypatch):
    with fake_cuda(monkeypatch), torch.no_grad():
        recorded = Recorded(lambda x: (x + 1,), "f")
        results = [recorded(torch.full((2,), float(number), device=CUDA))[0] for number in range(3)]
        assert [one.tolist() for one in results] == [[1, 1], [2, 2], [3, 3]]


def test_few_shapes_are_recorded(monkeypatch):
    with fake_cuda(monkeypatch), torch.no_grad():
        recorded = Recorded(lambda x: (x + 1,), "f")
        found = [recorded(torch.zeros(count, device=CUDA))[0].sum().item() for count in range(1, SHAPES + 3)]
        assert found == list(range(1, SHAPES + 3))
        assert len(recorded.known) == SHAPES


@pytest.mark.parametrize(
    "work", [lambda x: (x * x.sum().item(),), lambda x: (x + torch.ones(2).to(CUDA),)], ids=["reads", "copies"]
)
def test_what_a_graph_cannot_hold_is_called_as_it_is_and_said_once(monkeypatch, work):
    with fake_cuda(monkeypatch), torch.no_grad():
        x, recorded = torch.ones(2, device=CUDA), Recorded(work, "plans")
        with pytest.warns(UserWarning, match="plans: it goes on uncaptured, which is slow on a GPU .*capturing") as said:
            results = [recorded(x)[0].tolist() for _ in range(3)]
        assert results == [[2, 2]] * 3
        assert len(said) == 1


def test_a_function_that_a_python_value_changes_is_not_recorded(monkeypatch):
    calls = []

    def counted(x):
        calls.append(1)
        return (x * len(calls),)

    with fake_cuda(monkeypatch), torch.no_grad():
        recorded = Recorded(counted, "f")
        with pytest.warns(UserWarning, match="what was recorded gives other results"):
            recorded(torch.ones(2, device=CUDA))
        assert recorded.known == {(torch.Size([2]),): counted}


def test_gradients_flow_through_the_function_itself(monkeypatch):
    with fake_cuda(monkeypatch):
        x = torch.ones(2, device=CUDA, requires_grad=True)
        (y,) = Recorded(noisy, "f")(x)
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("row", "solver"), [("pets", "cem"), ("poplin_a", "icem"), ("poplin_p", "cem"), ("mpc", "icem"), ("mpc", "mppi")]
)
def test_plans_are_recorded(monkeypatch, row, solver):
    fitted = {} if row == "mpc" else {**FITTED, "fit_every": 8}
    with fake_cuda(monkeypatch):
        fields = {**SMALL, "max_episode_steps": 5, **fitted, "warmup_steps": 8 if fitted else 0, "planner": solver}
        fields = {name: value for name, value in fields.items() if not name.startswith("model.")}
        env = "rlamort.envs.cartpole:CartPole"
        learner = learner_class(row)(env, device="cuda", **{**fields, "horizon": PLANNER["horizon"], "samples": 16})
        learner.learn(10)
        learner.score()
        known = learner.agent.plans_of.known
        assert len(known) == 2
        assert all(isinstance(one, Recording) for one in known.values())


def test_close_is_by_norms():
    one = torch.tensor([1.0, 1e-3])
    assert close(one, torch.tensor([1.0, 2e-3]))
    assert not close(one, torch.tensor([1.1, 1e-3]))
