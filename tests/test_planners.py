"""Updates over plans: laws of what is drawn, of what is kept, and of weights."""

import math

import numpy as np
import pytest
import torch
from rlamort.agents.plan import MPC
from rlamort.envs.cartpole import CART, GRAVITY, HALF, POLE, CartPole

from rlamort import parts
from rlamort.agent import Player
from rlamort.domain import Box, CappedSimplex, Simplex
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.objective import Objective, Oracle
from rlamort.update import Cem, Clipped, Coloured, Icem, Mppi, SoftTop, Truncated, White

N = 6
BOX = Box([-1.0] * N, [1.0] * N)


class Waves(Objective):
    """A nonconvex cost, NaN above a wall."""

    def __init__(self, wall=math.inf):
        self.wall = wall

    def report(self, y, x):
        cost = ((y - x).square() + 0.3 * (5 * y).sin()).sum(-1)
        return torch.where(y[:, 0] > self.wall, math.nan, cost), {}


@pytest.mark.parametrize("horizon", [1, 7, 12])
def test_noise_of_any_colour_has_unit_variance_and_is_redder_the_larger_its_exponent(horizon):
    torch.manual_seed(0)
    y, neighbours = torch.zeros(3, 2 * horizon, dtype=torch.float64), []
    for exponent in (0.0, 1.0, 3.0):
        noise = Coloured(horizon, exponent)(20_000, y)
        assert noise.shape == (20_000, 1, 2 * horizon)
        torch.testing.assert_close(noise.square().mean((0, 1)), torch.ones_like(y[0]), atol=0.06, rtol=0)
        plans = noise.view(20_000, horizon, 2)
        neighbours.append((plans * plans.roll(1, 1)).mean().item())
        assert abs((plans[..., 0] * plans[..., 1]).mean()) < 0.02  # actions' coordinates are independent
    if horizon > 1:
        assert abs(neighbours[0]) < 0.02
        assert neighbours == sorted(neighbours)
        assert neighbours[2] > 0.5


def test_noise_without_colour_is_white():
    torch.manual_seed(0)
    coloured = Coloured(4, 0.0)(5, torch.zeros(1, 8, dtype=torch.float64))
    torch.manual_seed(0)
    torch.testing.assert_close(coloured, torch.randn(5, 4, 2, dtype=torch.float64).flatten(1)[:, None])


def test_the_spectrum_falls_with_the_frequency_as_it_says():
    torch.manual_seed(0)
    noise = Coloured(32, 2.0)(40_000, torch.zeros(1, 32, dtype=torch.float64))[:, 0]
    power = torch.fft.rfft(noise).abs().square().mean(0)[1:]
    falls = power[0] / power
    torch.testing.assert_close(falls, torch.arange(1.0, 17, dtype=torch.float64) ** 2, rtol=0.06, atol=0)


def test_truncated_samples_are_those_of_a_normal_that_fall_into_the_box():
    torch.manual_seed(0)
    mean, std = torch.tensor([[0.9, -0.2, 0.0]]), torch.tensor([[0.8, 0.3, 5.0]])
    box, x = Box([-1.0, -1.0, -0.5], [1.0, 1.0, 0.5]), torch.zeros(1, 1)
    noise = White()(40_000, mean)
    drawn = Truncated(box)(mean, std, noise, x)[:, 0]
    every = mean + std * torch.randn(4_000_000, 3)
    for i in range(3):
        kept = every[(every[:, i] > box.low[i]) & (every[:, i] < box.high[i]), i]
        quantiles = torch.linspace(0.05, 0.95, 7)
        torch.testing.assert_close(drawn[:, i].quantile(quantiles), kept[:200_000].quantile(quantiles), atol=0.02, rtol=0)
    assert ((drawn > box.low) & (drawn < box.high)).float().mean() > 0.999  # clipping leaves a third on the boundary
    assert (Clipped(box)(mean, std, noise, x)[:, 0, 0] == 1).float().mean() > 0.3
    wide = Truncated(BOX)(torch.ones(1, N), torch.full((1, N), 1e-6), 9 * torch.ones(2, 1, N), x)
    assert BOX.violation(wide.flatten(0, 1)).max() == 0
    assert wide.isfinite().all()


def test_spread_may_be_smoothed_as_variance():
    ys = torch.randn(50, 2, N, dtype=torch.float64)
    weights, mean, std = torch.full((50, 2, 1), 1 / 50).double(), torch.zeros(2, N).double(), torch.full((2, N), 3.0).double()
    _, fitted = Cem(BOX, 50, 8).refit(ys, weights, mean, std)
    for power in (1.0, 2.0):
        _, smooth = Cem(BOX, 50, 8, smoothing=0.1, power=power).refit(ys, weights, mean, std)
        torch.testing.assert_close(smooth**power, 0.9 * fitted**power + 0.1 * std**power)


def drawn(update, y, h, x, oracle, seed=0):
    torch.manual_seed(seed)
    return update(y, h, x, oracle)


@pytest.mark.parametrize("wall", [math.inf, 0.2])
def test_mppi_without_temperature_takes_the_best_sample_and_with_much_the_mean(wall):
    torch.manual_seed(1)
    x, y = torch.rand(4, N) - 0.5, torch.zeros(4, N)
    oracle = Oracle(Waves(wall), x)
    torch.manual_seed(0)
    ys = Clipped(BOX)(y, torch.full_like(y, 0.5), White()(32, y), x)
    costs = oracle.values(ys).nan_to_num(torch.inf)
    best = ys.gather(0, costs.argmin(0)[None, :, None].expand(1, -1, N))[0]
    cold, _ = drawn(Mppi(BOX, 32, 0.5, 1e-6), y, (), x, oracle)
    torch.testing.assert_close(cold, best)
    hot, _ = drawn(Mppi(BOX, 32, 0.5, 1e9), y, (), x, oracle)
    sound = costs.isfinite()[..., None]
    torch.testing.assert_close(hot, (ys * sound).sum(0) / sound.sum(0))


def test_items_whose_samples_all_cost_nan_stay_where_they_are():
    x, y = torch.zeros(2, N), 0.1 * torch.ones(2, N)
    oracle = Oracle(Waves(-9.0), x)
    assert torch.equal(Mppi(BOX, 8)(y, (), x, oracle)[0], y)
    update = Icem(Cem(BOX, 8, 3), 2)
    again, h = update(y, update.start(y, x, oracle), x, oracle)
    assert torch.equal(again, y)
    assert all(part.isnan().sum() == 0 for part in h)


def test_icem_keeps_the_best_point_that_it_has_met_and_no_iterate_is_worse():
    torch.manual_seed(0)
    x, y = torch.rand(3, N) - 0.5, 0.3 * torch.ones(3, N)
    oracle, update = Oracle(Waves(0.6), x), Icem(Cem(BOX, 12, 4, sigma=0.5), keep=3)
    h, before = update.start(y, x, oracle), oracle.value(y)
    assert torch.equal(update.value(y, h, oracle), before)
    for _ in range(8):
        mean, std, kept, _, _ = h
        state = torch.get_rng_state()
        met = torch.cat([update.cem.draw(mean, std, x), mean[None], kept.transpose(0, 1)])
        torch.set_rng_state(state)
        y, h = update(y, h, x, oracle)
        least = oracle.values(met).nan_to_num(torch.inf).amin(0)
        torch.testing.assert_close(oracle.value(y), least)
        torch.testing.assert_close(update.value(y, h, oracle), least)
        assert (least <= before).all()
        before = least
        assert torch.equal(h[2][:, 0], y)


def test_icems_population_shrinks_to_twice_its_elites():
    x, y, counts = torch.zeros(2, N), torch.zeros(2, N), []

    class Counting(Waves):
        def report(self, y, x):
            counts.append(len(y) // 2)
            return super().report(y, x)

    update, oracle = Icem(Cem(BOX, 30, 7), keep=2, shrink=1.5), Oracle(Counting(), x)
    h = update.start(y, x, oracle)
    for _ in range(4):
        y, h = update(y, h, x, oracle)
    assert counts == [1, 31, 21, 15, 15]  # the mean is one more


def test_icem_goes_on_from_the_elites_of_the_plan_before():
    """Moved on by one action: without new samples the next plan is the best of what was kept."""
    env = open_env("Pendulum-v1", count=3)
    x = env.reset(0)
    part = parts.Icem(8, 4, 3, sigma=1e-6, colour=0.0)
    agent = MPC(env.spec, model=parts.Unroll(parts.Previous(), part, 1), horizon=4)
    assert [tuple(one.shape) for one in agent.start(3)] == [(3, 4), (3, 2, 4)]
    torch.manual_seed(0)
    previous, kept = 2 * torch.rand(3, 4) - 1, 2 * torch.rand(3, 2, 4) - 1
    begun = torch.cat([previous[:, None], kept], 1)
    costs = torch.stack([agent.f(plan, x) for plan in begun.unbind(1)])
    y, (plan, again) = agent.play(x, (previous, kept), True)
    best = begun[torch.arange(3), costs.argmin(0)]
    assert (costs.argmin(0) > 0).any()
    torch.testing.assert_close(y, best[:, :1], atol=1e-4, rtol=0)
    torch.testing.assert_close(plan, torch.cat([best[:, 1:], best[:, -1:]], 1), atol=1e-4, rtol=0)
    assert again.shape == kept.shape
    assert not torch.equal(again, kept)
    forgetful = MPC(env.spec, model=parts.Unroll(parts.Previous(), parts.Icem(remember=False), 1), horizon=4)
    assert len(forgetful.start(3)) == 1


def test_soft_elites_sum_to_k_and_their_gradients_are_right_where_they_saturate():
    torch.manual_seed(0)
    costs = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    for temperature in (1.0, 0.1, 0.02):
        select = SoftTop(temperature)
        weights = select(costs, 4)
        torch.testing.assert_close(weights.sum(-1), torch.full((3,), 4.0, dtype=torch.float64), rtol=1e-9, atol=0)
        assert torch.autograd.gradcheck(lambda c, select=select: select(c, 4), costs, eps=1e-7, atol=1e-6, rtol=1e-5)
        assert torch.autograd.gradgradcheck(lambda c, select=select: select(c, 4), costs, eps=1e-6, atol=1e-4, rtol=1e-3)
    v = torch.tensor([[900.0, -900.0, 500.0, -3.0, 0.0]], requires_grad=True)
    for i in range(5):
        (slope,) = torch.autograd.grad(CappedSimplex(5, 2).project(v)[0, i], v)
        assert slope.abs().max() < 1e-6  # saturated: neither NaN nor noise


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mppi(BOX, temperature=0.0), "update.temperature: 0.0 given; above 0"),
        (lambda: Icem(Cem(BOX, 8, 3), 4), "update.keep: 4 given; at least 1 and at most the 3 elites"),
        (lambda: Icem(Cem(BOX, 8, 3, selection=SoftTop()), 2), "a selection by HardTop"),
        (lambda: Icem(Cem(BOX, 8, 3), 2, shrink=0.5), "update.shrink: 0.5 given; at least 1 is needed"),
        (lambda: Truncated(Simplex(3)), "bounds=truncated: a box is needed, not Simplex"),
        (lambda: parts.Icem()(parts.Setting(BOX, 3, ()), 1), "update.colour=2: solutions are no plans here"),
        (lambda: parts.Cem(samples=8)(parts.Setting(BOX, 3, ()), 1), "update.elites: 8 given; .* fewer than the 8 samples"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("update", [parts.Icem(32), parts.Mppi(32, colour=1.0), parts.Ilqr()])
def test_the_cart_pole_is_swung_up_by_each_planner(update):
    """From hanging; its environment does what its equations say."""
    env = open_env("rlamort.envs.cartpole:CartPole", count=2)
    x = env.reset(5)
    assert (x[:, 2] < -0.9).all()
    agent = MPC(env.spec, model=parts.Unroll(parts.Previous(), update, 1), horizon=30)
    torch.manual_seed(0)
    player = Player(agent, 2)
    for _ in range(50):
        y = player(env.x, explore=False)
        expected = agent.f.dynamics(env.x, y)
        step = env.step(y)
        torch.testing.assert_close(step.x_next, expected.x_next, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.reward, expected.reward, rtol=1e-5, atol=1e-5)
    assert (step.x_next[:, 2] > 0.8).all()


def test_a_cart_pole_shows_where_its_pole_is():
    env = CartPole(render_mode="rgb_array")
    env.reset(seed=0)
    for position, cos, sin in ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (-40.0, 0.0, -1.0), (2.4, -1.0, 0.0)):
        env.x[:] = position, 0.0, cos, sin, 0.0
        picture = env.render().astype(float)
        assert picture.shape == (400, 600, 3)
        row, column = np.argwhere(picture[..., 0] > picture[..., 2] + 60).mean(0)  # of its middle; 120 pixels a metre
        assert (row, column) == pytest.approx((200 - 60 * cos, 300 + 120 * np.clip(position, -1.4, 1.4) + 60 * sin), abs=3)


def test_a_cart_pole_that_nobody_pushes_keeps_its_energy():
    """Kinetic energy of cart and pole, and the pole's height; steps of 0.05 s err by a few hundredths."""
    env = CartPole()
    x = torch.tensor([[0.0, 0.0, math.cos(2.0), math.sin(2.0), 0.5]], dtype=torch.float64)
    energies = []
    for _ in range(60):
        _, speed, cos, _, turn = x[0].tolist()
        kinetic = (CART + POLE) * speed**2 / 2 + POLE * HALF * speed * turn * cos + 2 / 3 * POLE * HALF**2 * turn**2
        energies.append(kinetic + POLE * GRAVITY * HALF * cos)
        x = env.dynamics(x, torch.zeros(1, 1, dtype=torch.float64))[0]
    swing = 2 * POLE * GRAVITY * HALF
    assert max(energies) - min(energies) < 0.08 * swing
