"""Meta-learning: solutions that are networks, and MAML by its row alone."""

import math

import pytest
import torch
from drawn import drawn
from rlamort.envs.tasks import Sinusoids
from torch import nn

from rlamort.domain import Box, ContextDomain, PerItem, Product, Weights
from rlamort.env.one_step import OneStep
from rlamort.errors import UserError
from rlamort.losses import objective
from rlamort.nets import mlp
from rlamort.run.learner import learner_class
from rlamort.source import Contexts


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return Sinusoids(hidden_widths=(6, 6))


def maml(problem, **fields):
    agent = drawn("maml", OneStep(problem, 1, torch.device("cpu")).spec, **fields)
    return agent.double(), problem.layout.pack(problem.contexts(4)).double()


def test_a_vector_of_parameters_is_the_network():
    net, other = mlp(3, [5], 2), mlp(3, [5], 2)
    weights = Weights(net)
    assert weights.dim == weights.inputs == sum(p.numel() for p in net.parameters())
    inputs = torch.randn(2, 7, 3)
    found = weights.apply(torch.stack([weights.ravel(net), weights.ravel(other)]), inputs)
    torch.testing.assert_close(found, torch.stack([net(inputs[0]), other(inputs[1])]))
    assert not list(weights.parameters())


def test_it_begins_where_the_network_would():
    weights = Weights(nn.Linear(50, 40))
    torch.manual_seed(3)
    first = weights.initial()
    torch.manual_seed(3)
    fresh = nn.Linear(50, 40)
    assert torch.equal(first, weights.ravel(fresh))
    assert not torch.equal(first, weights.initial())


def test_so_does_it_as_a_factor():
    weights = Weights(nn.Linear(5, 4))
    for domain in (Product([Box([0.0], [1.0]), weights]), Product([Box(PerItem(1), [1.0]), weights])):
        torch.manual_seed(3)
        first = weights.initial()
        torch.manual_seed(3)
        assert torch.equal(ContextDomain(domain, None).initial(), torch.cat([torch.zeros(1), first]))


@pytest.mark.parametrize(
    ("module", "said"), [(nn.ReLU(), "a ReLU is given"), (nn.BatchNorm1d(3), "it has the buffer running_mean")]
)
def test_what_is_no_vector_of_parameters_is_named(module, said):
    with pytest.raises(UserError, match=rf"Weights.module: {said}"):
        Weights(module)


@pytest.mark.parametrize("steps", [1, 3])
def test_its_gradient_is_a_finite_difference(problem, steps):
    """... with second derivatives, through the steps; without them it is another."""
    agent, x = maml(problem, **{"model.steps": steps, "model.update.rate": 0.05})
    f, model, v = agent.f, agent.model, agent.model.init.v
    (slope,) = torch.autograd.grad(objective(model, f, Contexts(x))[0], v)
    move = torch.randn_like(v)
    ends = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            v += h * move
            ends.append(objective(model, f, Contexts(x))[0].item())
            v -= h * move
    assert (slope @ move).item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    first, _ = maml(problem, **{"model.steps": steps, "model.update.rate": 0.05, "model.adjoint": "first_order"})
    with torch.no_grad():
        first.model.init.v.copy_(v)
    (other,) = torch.autograd.grad(objective(first.model, f, Contexts(x))[0], first.model.init.v)
    assert (other - slope).norm() > 1e-4 * slope.norm()


def test_query_sets_reach_the_loss_alone(problem):
    agent, x = maml(problem)
    poisoned = x.clone()
    poisoned[:, problem.layout.seen.dim :] = math.nan
    first, second = (agent.model(agent.f.seen(one), agent.f.oracle(one)) for one in (x, poisoned))
    assert torch.equal(first, second)
    assert agent.loss(agent.model, agent.f, Contexts(x))[0].isfinite()
    assert agent.loss(agent.model, agent.f, Contexts(poisoned))[0].isnan()


def test_the_row_learns():
    """From 4.2, the variance of the waves, to less than half of it in 700 updates; a start that is not learned stays there."""
    learner = learner_class("maml")("rlamort/Sinusoids-v0", seed=0, steps=700, threads=1)
    before = -sum(learner.score(256).returns) / 256
    learner.learn(700)
    after = -sum(learner.score(256).returns) / 256
    assert after < 0.6 * before
    learner.close()
