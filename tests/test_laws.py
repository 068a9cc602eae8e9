"""The laws of docs/design.md that hold between the nouns, in float64 where they are exact."""

import copy
import math

import pytest
import torch
from drawn import drawn
from torch import nn

from rlamort.agent import Adam, descend
from rlamort.config import fields, read_row
from rlamort.critic import Critic, polyak
from rlamort.domain import Box, Domain, Gaussian, SquashedGaussian
from rlamort.losses import objective, td_target
from rlamort.model import Full
from rlamort.objective import MaxQ, Objective, Soft, Temperature
from rlamort.source import Batch

# methods that learn from transitions: each is put through the laws
LEARNERS = ("sac", "td3", "ddpg", "tqc", "iapo")


def learner(name, spec, **fields):
    """The agent of one, with small networks."""
    return drawn(name, spec, **{"hidden": (16, 16), **fields})


def having(*keys):
    """Those of them that have all of these keys."""
    return [name for name in LEARNERS if all(key.split(".")[0] in fields(read_row(name)) for key in keys)]


@pytest.fixture(params=LEARNERS)
def agent(request, spec, device):
    torch.manual_seed(0)
    return learner(request.param, spec).to(device)


def batch_for(agent, count=32, seed=1):
    made = torch.Generator().manual_seed(seed)
    d, n = agent.spec.x_dim, agent.domain.dim
    device = agent.device
    return Batch(
        torch.randn(count, d, generator=made).to(device),
        (torch.rand(count, n, generator=made) * 2 - 1).to(device),
        torch.randn(count, generator=made).to(device),
        torch.full((count,), 0.99, device=device),
        (torch.rand(count, generator=made) < 0.2).to(device),
        torch.randn(count, d, generator=made).to(device),
    )


class Quadratic(Objective):
    def report(self, y, x):
        return 0.5 * (y - x).square().sum(-1), {}


class Free(Domain):
    """A Y without bounds, for the laws about losses."""

    def __init__(self, dim):
        super().__init__()
        self.dim = self.inputs = dim

    def project(self, v):
        return v


class Constant(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.y = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x):
        return self.y.expand(len(x), -1)


def test_constant_model_with_objective_loss_is_gradient_descent():
    """Remark 1 of the tutorial, with Adam's step made a plain one by looking at its gradient alone."""
    x = torch.randn(1, 3, dtype=torch.float64)
    model = Full(Constant(3), Free(3))
    y = torch.zeros(1, 3, dtype=torch.float64)
    f = Quadratic()
    for _ in range(5):
        loss, _ = objective(model, f, Batch(x, x, x[:, 0], x[:, 0], x[:, 0] > 0, x))
        (gradient,) = torch.autograd.grad(loss, [model.net.y])
        y.requires_grad_()
        (plain,) = torch.autograd.grad(f(y, x).sum(), y)
        assert torch.equal(gradient, plain[0])
        with torch.no_grad():
            model.net.y -= 0.1 * gradient
            y = (y - 0.1 * plain).detach()
    assert torch.equal(model(x), y)


def test_soft_becomes_max_q_as_noise_and_temperature_vanish(spec):
    """Propositions 1 and 2 of the tutorial."""
    torch.manual_seed(0)
    critic = Critic(3, 2, (16,), 2).double()
    x, mean = torch.randn(64, 3, dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    density, exact = SquashedGaussian(2, log_std_low=-30), MaxQ(critic)(mean.tanh(), x)
    gaps = []
    for log_std in (-2.0, -5.0, -9.0, -13.0):
        lam = torch.cat([mean, torch.full_like(mean, log_std)], -1)
        soft = Soft(MaxQ(critic), density, Temperature(math.exp(log_std)).double())
        gaps.append((soft(lam, x) - exact).abs().max().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3
    assert torch.equal(
        Soft(MaxQ(critic), density, Temperature(0.0))(torch.cat([mean, torch.full_like(mean, -30)], -1), x).isnan().any(),
        torch.tensor(False),
    )


def test_soft_at_temperature_one_is_the_negative_elbo():
    """Against the closed form of a linear-Gaussian model, through a density that is not squashed."""

    class NegativeLogJoint(Objective):
        def report(self, y, x):
            normal = torch.distributions.Normal
            return -(normal(y @ W.T, 1.0).log_prob(x).sum(-1) + normal(0.0, 1.0).log_prob(y).sum(-1)), {}

    torch.manual_seed(0)
    W = torch.randn(5, 2, dtype=torch.float64)
    x, lam = torch.randn(1, 5, dtype=torch.float64), 0.3 * torch.randn(1, 4, dtype=torch.float64)
    mean, std = lam[:, :2], lam[:, 2:].exp()
    reconstruction = -torch.distributions.Normal(mean @ W.T, 1.0).log_prob(x).sum(-1) + 0.5 * (std**2 @ (W**2).T).sum(-1)
    prior, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, std)
    exact = reconstruction + torch.distributions.kl_divergence(q, prior).sum(-1)
    soft = Soft(NegativeLogJoint(), Gaussian(2), Temperature(1.0))
    draws = soft(lam.expand(400_000, -1), x)
    assert abs(draws.mean() - exact).item() < 5 * draws.std().item() / 400_000**0.5


def test_actor_step_leaves_the_critic_alone(agent):
    """Neither a value nor a gradient of what f is made of moves when the policy does."""
    batch = batch_for(agent)
    agent.update(batch, True)
    before = copy.deepcopy(agent.critic.state_dict())
    agent.improve(batch)
    assert all(torch.equal(value, before[name]) for name, value in agent.critic.state_dict().items())
    assert all(p.grad is None for p in agent.parameters())


def test_critic_step_leaves_the_policy_alone(agent):
    before = copy.deepcopy(agent.model.state_dict())
    agent.evaluate(batch_for(agent))
    assert all(torch.equal(value, before[name]) for name, value in agent.model.state_dict().items())


def test_updates_return_detached_scalars(agent):
    for value in agent.update(batch_for(agent), True).values():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.device == agent.device


def test_truncation_bootstraps_and_termination_does_not():
    value = torch.tensor([5.0, 5.0, float("nan")])
    terminated = torch.tensor([False, True, True])  # the first was truncated: that is no business of the target
    batch = Batch(value, value, torch.ones(3), torch.full((3,), 0.5), terminated, value)
    assert td_target(batch, value).tolist() == [3.5, 1.0, 1.0]


def test_td_on_a_one_step_problem_is_regression_on_the_cost():
    """When every transition terminates, the critic's target is -f, whatever its discount."""
    reward = torch.randn(8)
    batch = Batch(reward, reward, reward, torch.full((8,), 0.99), torch.ones(8, dtype=torch.bool), reward)
    assert torch.equal(td_target(batch, torch.randn(8)), reward)


def test_ddpg_is_td3_with_one_critic_no_smoothing_and_no_delay(spec):
    """The row ddpg.yaml against an update written out by hand from Lillicrap et al., algorithm 1, with torch.optim."""
    torch.manual_seed(0)
    agent = learner("ddpg", spec)
    actor, critic = copy.deepcopy(agent.model), copy.deepcopy(agent.critic)
    target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_adam, critic_adam = (torch.optim.Adam(m.parameters(), 1e-3) for m in (actor, critic))
    for seed in range(10):
        batch = batch_for(agent, seed=seed)
        agent.update(batch, True)
        with torch.no_grad():
            q_next = target_critic(batch.x_next, target_actor(batch.x_next))[0]
            target = batch.reward + 0.99 * (~batch.terminated) * q_next
        critic_adam.zero_grad()
        (critic(batch.x, batch.y)[0] - target).square().mean().backward()
        critic_adam.step()
        actor_adam.zero_grad()
        (-critic(batch.x, actor(batch.x))[0].mean()).backward()
        actor_adam.step()
        with torch.no_grad():
            for target_net, net in ((target_actor, actor), (target_critic, critic)):
                for t, p in zip(target_net.parameters(), net.parameters(), strict=True):
                    t += 0.005 * (p - t)
    for ours, theirs in ((agent.model, actor), (agent.target_model, target_actor), (agent.target_critic, target_critic)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-6)


def test_pessimism_of_one_over_two_critics_is_their_minimum(spec):
    torch.manual_seed(0)
    critic = Critic(3, 2, (16,), 2)
    x, y = torch.randn(100, 3), torch.randn(100, 2, requires_grad=True)
    cost = MaxQ(critic, beta=1.0)(y, x)
    torch.testing.assert_close(-cost, critic(x, y).amin(0), rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(-cost.sum(), y)
    (theirs,) = torch.autograd.grad(critic(x, y).amin(0).sum(), y)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_pessimism_over_one_critic_has_a_finite_gradient(spec):
    critic = Critic(3, 2, (16,), 1)
    y = torch.randn(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(MaxQ(critic, beta=1.0)(y, torch.randn(4, 3)).sum(), y)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LEARNERS)
def test_answers_do_not_depend_on_neighbours(name, spec):
    """df_i/dy_j = 0 for i != j, and a batch is solved as its rows are."""
    torch.manual_seed(0)
    agent = learner(name, spec).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    together = agent.act(x, explore=False)
    alone = torch.cat([agent.act(x[i : i + 1], explore=False) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    f = MaxQ(agent.critic)
    jacobian = torch.autograd.functional.jacobian(lambda y: f(y, x), together)  # (5, 5, n)
    off_diagonal = jacobian[~torch.eye(5, dtype=torch.bool)]
    assert torch.equal(off_diagonal, torch.zeros_like(off_diagonal))


@pytest.mark.parametrize("name", LEARNERS)
def test_actor_gradient_is_a_finite_difference(name, spec):
    torch.manual_seed(0)
    exact = {"model.adjoint": "unrolled"} if name == "iapo" else {}  # as a row it leaves second derivatives out
    agent = learner(name, spec, **exact).double()
    batch = Batch(*(t.double() if t.is_floating_point() else t for t in batch_for(agent)))

    def loss():
        torch.manual_seed(7)  # common random numbers
        return objective(agent.model, agent.f, batch)[0]

    weight = next(agent.model.parameters())
    (gradient,) = torch.autograd.grad(loss(), [weight])
    for i, j in ((0, 0), (3, 1), (9, 2)):
        values = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                weight[i, j] += h
                values.append(loss().item())
                weight[i, j] -= h
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_descend_moves_its_parameters_as_torch_adam_does():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    mine, adam = Adam(ours.parameters(), 1e-2), torch.optim.Adam(theirs.parameters(), 1e-2)
    for _ in range(20):
        x = torch.randn(8, 3)
        descend(ours(x).square().mean(), ours.parameters(), mine)
        adam.zero_grad()
        theirs(x).square().mean().backward()
        adam.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-7)


def test_polyak_moves_every_parameter_by_its_share():
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(target.parameters(), source.parameters(), strict=True)]
    polyak(target, source, 0.1)
    for t, e in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(t, e)


def test_squashed_density_integrates_to_one_and_matches_torch():
    lam = torch.tensor([[0.7, -0.3]], dtype=torch.float64)
    density = SquashedGaussian(1)
    torch.manual_seed(0)
    y, logq = density.sample(lam.expand(1000, -1))
    base = torch.distributions.Normal(lam[:, :1], lam[:, 1:].exp())
    reference = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform())
    torch.testing.assert_close(logq, reference.log_prob(y).sum(-1), rtol=1e-6, atol=1e-6)
    grid = torch.linspace(-1 + 1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)[:, None]
    assert torch.trapezoid(reference.log_prob(grid)[:, 0].exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-3)


def test_squashed_density_is_finite_far_out():
    lam = torch.tensor([[50.0, -50.0, 2.0, 2.0]], requires_grad=True)
    y, logq = SquashedGaussian(2).sample(lam)
    (gradient,) = torch.autograd.grad((y.sum() + logq.sum()), lam)
    assert logq.isfinite().all()
    assert gradient.isfinite().all()


def test_density_bounds_hold_and_the_median_is_that_of_the_samples():
    density = SquashedGaussian(1)
    assert density.parameters.project(torch.tensor([[0.0, 99.0]]))[0, 1] == 2
    assert density.parameters.project(torch.tensor([[0.0, -99.0]]))[0, 1] == -20
    lam = torch.tensor([[0.8, 0.0]])
    torch.manual_seed(0)
    samples, _ = density.sample(lam.expand(100_001, -1))
    assert samples.median().item() == pytest.approx(density.median(lam).item(), abs=0.01)


def test_box_maps_both_ways_and_reaches_its_bounds():
    box = Box([-0.4, 1.0], [0.4, 5.0])
    assert torch.allclose(box.decode(torch.tensor([[-1.0, 1.0]])), torch.tensor([[-0.4, 5.0]]))
    y = box.uniform(1000)
    assert (y >= torch.tensor([-0.4, 1.0])).all()
    assert (y <= torch.tensor([0.4, 5.0])).all()
    assert torch.allclose(box.decode(box.encode(y)), y, atol=1e-6)
    assert torch.allclose(box.project(torch.zeros(1, 2)), torch.tensor([[0.0, 3.0]]))
