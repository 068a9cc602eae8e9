"""Energies and latent plans that are learned through the soft cross-entropy method, and plans by support points."""

import math

import pytest
import torch
from drawn import drawn
from rlamort.agents.plan import MPC
from rlamort.envs.cartpole import CartPole, CartPolePlan
from rlamort.envs.energy import EnergyRegression

from rlamort import parts
from rlamort.domain import Box, unit_box
from rlamort.env.make import open_env
from rlamort.env.one_step import OneStep
from rlamort.errors import UserError
from rlamort.losses import objective
from rlamort.measure.claims import dcem
from rlamort.model import Fitted, Interpolation, Previous, SupportPoints, Unroll
from rlamort.source import Contexts
from rlamort.update import Mppi

SMALL = {"samples": 12, "elites": 3}


def agent_of(method, problem, **fields):
    torch.manual_seed(0)
    agent = drawn(method, OneStep(problem, 1, torch.device("cpu")).spec, **fields)
    return agent.double(), problem.layout.pack(problem.contexts(4)).double()


def energy(update):
    torch.manual_seed(0)
    return agent_of("dcem_energy", EnergyRegression((6, 6)), **{"model.steps": 3, "model.update": update})


def latent(**fields):
    update = {"kind": "Cem", "temperature": 1.0, **SMALL}
    inner = {"kind": "Unroll", "init": "middle", "update": update, "steps": 2}
    return agent_of("dcem", CartPolePlan(6), hidden=(6,), model={"kind": "Latent", "dim": 2, "inner": inner, **fields})


def loss_of(agent, x):
    torch.manual_seed(3)  # the same noise at every call
    return objective(agent.model, agent.f, Contexts(x))[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: energy({"kind": "Cem", "sigma": 2.0, "temperature": 1.0, **SMALL}),
        lambda: energy({"kind": "Gradient", "rate": 0.1}),
        latent,
    ],
)
def test_gradients_through_the_solver_are_finite_differences(make):
    agent, x = make()
    owned = list(agent.owned)
    slopes = torch.autograd.grad(loss_of(agent, x), owned)
    move = [torch.randn_like(one) for one in owned]
    ends = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            for one, along in zip(owned, move, strict=True):
                one += h * along
            ends.append(loss_of(agent, x).item())
            for one, along in zip(owned, move, strict=True):
                one -= h * along
    slope = sum((one * along).sum() for one, along in zip(slopes, move, strict=True)).item()
    assert slope != 0
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_labels_reach_the_loss_alone():
    agent, x = energy({"kind": "Cem", "temperature": 1.0, **SMALL})
    poisoned = x.clone()
    poisoned[:, 1] = math.nan
    predicted = []
    for one in (x, poisoned):
        torch.manual_seed(0)
        predicted.append(agent.model(agent.f.seen(one), agent.f.oracle(one)))
    assert torch.equal(*predicted)
    assert loss_of(agent, poisoned).isnan()


def test_the_cost_of_a_plan_is_what_the_environment_pays():
    env, problem = CartPole(100.0), CartPolePlan(6)
    torch.manual_seed(0)
    x, y = problem.contexts(1), 2 * torch.rand(1, 6) - 1
    env.reset(seed=0)
    env.x = x[0].numpy()
    paid = sum(env.step(100 * action.numpy())[1] for action in y[0, :, None])
    assert problem.cost(y, x).item() == pytest.approx(-paid, rel=1e-5)


@pytest.mark.parametrize("reads", [True, False])
def test_a_decoder_may_read_the_start_or_not(reads):
    agent, x = latent(reads_context=reads)
    z = torch.randn(1, 2, dtype=torch.float64).expand(4, -1)
    plans = agent.model.point(z, x)
    assert torch.equal(plans[:1].expand(4, -1), plans) == (not reads)


def test_a_plan_goes_through_its_support_points():
    curve = Interpolation(9, 5).double()
    z = torch.randn(3, 10, dtype=torch.float64)
    plan = curve(z)
    torch.testing.assert_close(plan.view(3, 9, 2)[:, ::2].flatten(1), z)
    torch.testing.assert_close(curve.fit(plan), z)
    alike = curve(torch.ones(1, 10, dtype=torch.float64))
    assert (alike - 1).abs().max() < 0.2  # a kernel bends a little between its points
    every = Interpolation(6, 6)
    torch.testing.assert_close(every(z[:, :6].float()), z[:, :6].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Interpolation(4, 1)(torch.ones(1, 1))[0, 0], torch.tensor(1.0))


def test_plans_by_support_points_stay_in_the_box_and_begin_at_what_fits_the_one_before():
    curve, domain = Interpolation(7, 3), unit_box(7)
    over = unit_box(3)
    before = Fitted(Previous(domain), curve, over)
    model = SupportPoints(curve, Unroll(before, Mppi(over, 8, 2.0), 0, over), domain)
    plan = torch.tensor([[0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2]])
    fitted = model(torch.cat([torch.zeros(1, 2), plan], -1))
    assert (fitted - plan).abs().max() < 0.1
    torch.testing.assert_close(curve.fit(fitted), curve.fit(plan))
    wild = SupportPoints(curve, Unroll(before, Mppi(over, 8, 2.0), 1, over), Box([-0.1] * 7, [0.1] * 7))
    problem = CartPolePlan(7)
    x = torch.cat([problem.contexts(5), plan.expand(5, -1)], -1)
    assert wild(x, problem.trajectory.oracle(x[:, :5])).abs().max() <= 0.1 + 1e-6


def test_mpc_plans_by_support_points():
    env = open_env("Pendulum-v1", count=20)
    env.reset(0)
    agent = MPC(env.spec, model=parts.SupportPoints(points=4, update=parts.Mppi(32), steps=3), horizon=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = agent.model(torch.cat([env.x, torch.zeros(20, 12)], -1), agent.f.oracle(env.x))
    still, ours = (agent.f(y, env.x).mean().item() for y in (torch.zeros(20, 12), plan))
    assert ours < still - 5
    assert plan.abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interpolation(4, 5), "model.points: 5 given; at least 1 and at most the 4 actions"),
        (lambda: agent_of("dcem", CartPolePlan(6), model="kmppi"), "model=SupportPoints: solutions are no plans here"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_latent_space_is_drawn():
    agent, _ = latent()
    figure = dcem.figure(agent.float(), 2)
    assert len(figure.axes) == 6  # two of each, and the scales of f
