"""Learning from everything that was collected: fits between rounds, and ensembles of dynamics that come of them."""

import copy

import numpy as np
import pytest
import torch
from conftest import Count
from test_resume import assert_resumed

import rlamort as ra
from rlamort import nets
from rlamort.agent import Adam, Agent
from rlamort.dynamics import Ensemble, Normal, Squared, Trajectory
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.fits.dynamics import fit, open_loop
from rlamort.norm import EnsembleLayerNorm
from rlamort.run.rounds import Eager
from rlamort.source import Replay
from rlamort.train import Clock, Journal, Schedule, train


def played(name, steps, count=1, **fields):
    """A replay of random actions."""
    env = open_env(name, count=count)
    env.reset(0)
    torch.manual_seed(0)
    source = Replay(env, buffer_size=fields.pop("buffer_size", 2 * steps), **fields)
    while source.collected < steps:
        source.collect(lambda: env.domain.uniform(count))
    return source


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(("count", "size"), [(1, 1_000), (3, 1_000), (1, 31), (3, 61)])
def test_everything_is_each_transition_once_oldest_first(count, size, n_step):
    """Count's rewards say episode and step; rings of 31 and of 20 frames a row have been round several times."""
    source = played(lambda: Count((3, 1, 4)), 150, count, buffer_size=size, n_step=n_step)
    batch = source.everything()
    assert len(batch.x) == len(source)
    assert all(len(part) == len(source) for part in batch)
    steps = (100 * batch.x[:, 0] + batch.x[:, 1]).tolist()
    for row in range(count):
        first, last = int(source.size[:row].sum()), int(source.size[: row + 1].sum())
        assert steps[first:last] == sorted(set(steps[first:last]))
    if n_step == 1:
        assert torch.equal(batch.reward, 100 * batch.x[:, 0] + batch.x[:, 1] + 1)
    found = {tuple(one.tolist()) for one in torch.cat([batch.x, batch.reward[:, None], batch.x_next], -1)}
    sampled = source.sample(300)
    assert {tuple(one.tolist()) for one in torch.cat([sampled.x, sampled.reward[:, None], sampled.x_next], -1)} <= found


@pytest.mark.parametrize(("every", "count", "calls"), [(0, 1, []), (40, 1, [40, 80, 120]), (50, 3, [51, 102, 150])])
def test_the_loop_fits_as_often_as_the_agent_says(every, count, calls):
    class Fitting(Agent):
        fit_every = every

        def act(self, x, explore):
            return x[:, :1].clamp(-1, 1)

        def fit(self, source):
            met.append(source.collected)
            return {"fitted": torch.tensor(float(len(source.everything().x)))}

        def evaluate(self, batch):
            return {}

        improve = evaluate

    met = []
    env = open_env(Count, count=count)
    env.reset(0)
    source, clock = Replay(env, buffer_size=1_000), Clock()
    agent = Fitting(env.spec, normalise=False)
    train(agent, source, Schedule(150, 0, 100, 1, 8, 10**6, 10**6), clock, Eager(agent, lambda: source.sample(8)), Journal())
    assert met == calls
    assert clock.metrics == ({"fitted": torch.tensor(float(calls[-1]))} if calls else {})


def test_members_may_each_be_given_an_input_of_their_own():
    torch.manual_seed(0)
    net = nets.Ensemble(4, 3, (8, 8), 2, EnsembleLayerNorm)
    h = torch.randn(4, 5, 3)
    apart = net(h)
    assert apart.shape == (4, 5, 2)
    for e in range(4):
        torch.testing.assert_close(apart[e], net(h[e])[e])
    assert torch.equal(net(h[0].expand(4, 5, 3)), net(h[0]))


@pytest.mark.parametrize("likelihood", [Normal, Squared])
def test_futures_are_followed_by_each_member_and_the_mean_is_what_follows(likelihood):
    torch.manual_seed(0)
    ensemble = Ensemble(3, 2, (8,), 4, likelihood).double()
    ensemble.standardise(torch.randn(50, 9, dtype=torch.float64) * 3 + 1)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    first = ensemble.futures(x, y[:, :2])
    assert first.x_next.shape == (4, 5, 3)
    torch.testing.assert_close(ensemble(x, y[:, :2]).x_next, first.x_next.mean(0))
    second = ensemble.futures(first.x_next, y[:, 2:])
    for e in range(4):
        torch.testing.assert_close(second.x_next[e], ensemble.futures(first.x_next[e], y[:, 2:]).x_next[e])
    plain, tailed = (Trajectory(ensemble, 2, 0.9, tail)(y, x) for tail in (None, lambda x: x.sum(-1)))
    torch.testing.assert_close(plain, -(first.reward + 0.9 * second.reward).mean(0))
    torch.testing.assert_close(tailed, plain - 0.81 * second.x_next.sum(-1).mean(0))


def test_the_normal_loss_is_the_negative_log_likelihood_within_its_bounds():
    torch.manual_seed(0)
    loss, given, target = Normal(2).double(), torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(3, 7, 2).double()
    mean, log = given.chunk(2, -1)
    with torch.no_grad():
        loss.low.fill_(-50)
        loss.high.fill_(50)
    normal = torch.distributions.Normal(mean, (log / 2).exp())
    expected = -2 * normal.log_prob(target) - np.log(2 * np.pi)
    torch.testing.assert_close(loss(given, target), expected.mean((1, 2)) + 0.01 * 100)
    with torch.no_grad():
        loss.low.fill_(-1)
        loss.high.fill_(1)
    assert loss(1e6 * given, torch.zeros(3, 7, 2)).isfinite().all()


def learned(source, likelihood, epochs, hidden=(64, 64)):
    """An ensemble fitted to a replay."""
    spec = source.env.spec
    ensemble = Ensemble(spec.x_dim, len(spec.low), hidden, 5, likelihood)
    metrics = fit(ensemble, Adam(ensemble.parameters(), 1e-3), source.everything(), epochs, 64)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    return ensemble


@torch.no_grad()
def errors(ensemble, batch):
    """Root mean square errors of the next state, coordinates in units of their change, of an ensemble and of no change; and
    of the reward, beside the reward's standard deviation."""
    moved, scale = ensemble(batch.x, batch.y), (batch.x_next - batch.x).std(0)
    ours, none = (((one - batch.x_next) / scale).square().mean().sqrt().item() for one in (moved.x_next, batch.x))
    return ours, none, (moved.reward - batch.reward).square().mean().sqrt().item(), batch.reward.std().item()


@pytest.mark.parametrize("likelihood", [Normal, Squared])
def test_an_ensemble_learns_the_pendulum(likelihood):
    ensemble = learned(played("Pendulum-v1", 1_000), likelihood, 20)
    env = open_env("Pendulum-v1")
    env.reset(99)
    held = Replay(env, buffer_size=1_000)
    for _ in range(300):
        held.collect(lambda: env.domain.uniform(1))
    ours, none, reward, spread = errors(ensemble, held.everything())
    assert ours < 0.25 * none
    assert reward < 0.25 * spread


def test_open_loop_error_is_that_of_predictions_fed_back():
    source = played("Pendulum-v1", 400)
    ensemble = learned(source, Squared, 10)
    sequences = source.sequences(50, 6)
    states = sequences.x[:, 0].expand(5, -1, -1)
    with torch.no_grad():
        for t in range(6):
            states = ensemble.futures(states, sequences.y[:, t]).x_next
    error = (states - sequences.x_next[:, -1]) / sequences.x_next[:, -1].std(0, correction=0)
    (measured,) = open_loop(ensemble, sequences).values()
    torch.testing.assert_close(measured, error.square().mean().sqrt())
    assert measured < 0.5  # the mean state has 1
    assert measured > 1.2 * open_loop(ensemble, source.sequences(50, 1))["dynamics/open_loop_error"]


def test_a_fit_measures_first_and_draws_the_same_without_it():
    agent = ra.PETS("Pendulum-v1", hidden=[8], fit_epochs=1, fit_every=60, horizon=5, buffer_size=1_000).agent
    twin, source = copy.deepcopy(agent), played("Pendulum-v1", 100)
    torch.manual_seed(3)
    metrics = agent.fit(source)
    assert metrics["dynamics/open_loop_error"] > 0
    torch.manual_seed(3)
    losses = fit(twin.dynamics, twin.adam, source.everything(), twin.fits.epochs, twin.fits.batch_size)
    assert torch.equal(losses["dynamics/loss"], metrics["dynamics/loss"])
    agent.f.horizon = 61  # longer than what is new
    assert set(agent.fit(source)) == {"dynamics/loss", "dynamics/diverged"}


@pytest.mark.slow
def test_an_ensemble_learns_the_half_cheetah_from_random_actions():
    """4,000 transitions; held out are those of other episodes. No change has an error of about 1 by its units."""
    ensemble = learned(played("HalfCheetah-v5", 4_000), Normal, 40, (200, 200))
    env = open_env("HalfCheetah-v5")
    env.reset(99)
    held = Replay(env, buffer_size=3_000)
    for _ in range(2_000):
        held.collect(lambda: env.domain.uniform(1))
    ours, none, reward, spread = errors(ensemble, held.everything())
    print(f"half cheetah: {ours:.3f} beside {none:.3f} of no change; reward {reward:.3f} beside a spread of {spread:.3f}")
    assert ours < 0.5 * none
    assert reward < 0.5 * spread


def test_a_fit_moves_nothing_but_the_ensemble():
    source = played("Pendulum-v1", 100)
    env = source.env
    agent = ra.PETS("Pendulum-v1", hidden=[8], fit_epochs=1, buffer_size=1_000).agent
    before = copy.deepcopy(agent.state_dict())
    agent.fit(source)
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert {name.split(".")[0] for name in moved} == {"dynamics", "adam"}
    assert all(p.grad is None for p in agent.parameters())
    env.close()


SMALL = {"horizon": 4, "model": {"steps": 2, "update": {"samples": 8, "elites": 2}}, "hidden": [8], "fit_every": 60,
         "fit_epochs": 2, "warmup_steps": 30, "buffer_size": 300, "checkpoint_every": 70, "eval_every": 100, "log_every": 50,
         "eval_episodes": 1, "device": "cpu"}  # fmt: skip


def test_episodes_that_are_held_out_are_so_after_a_resume(tmp_path):
    """The ring of each environment keeps two or three of its episodes."""
    fields = {**SMALL, "num_envs": 3, "fit_hold_out": 2, "max_episode_steps": 15, "buffer_size": 120}
    again = assert_resumed(lambda dir: ra.PETS("Pendulum-v1", dir=dir, **fields), 240, 130, tmp_path)
    assert again.source.opened.tolist() == [6, 6, 6]
    assert again.source.episodes().min() > 3  # the oldest are gone


@pytest.mark.parametrize("at", [30, 61, 130])
def test_stopped_and_resumed_is_uninterrupted(at, tmp_path):
    again = assert_resumed(lambda dir: ra.PETS("Pendulum-v1", dir=dir, **SMALL), 200, at, tmp_path)
    assert int(again.agent.adam.steps) > 0


@pytest.mark.slow
def test_pets_balances_the_pendulum_within_five_episodes():
    """-152 after 800 steps, -154 after 1,000, five episodes each (seed 0)."""
    learner = ra.PETS("Pendulum-v1", seed=0, threads=1, hidden=[64, 64]).learn(1_000)
    assert np.mean(learner.score(5).returns) > -250


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("MPC", {"fit_every": 100}, "fit_every=100: with dynamics=Known 0 is needed"),
        ("PETS", {"fit_every": 0}, "fit_every=0: with dynamics=Ensemble 1 or more is needed"),
        ("PETS", {"n_step": 3}, "no choice there"),
    ],
)
def test_what_does_not_fit_is_said(method, fields, message):
    with pytest.raises(UserError, match=message):
        getattr(ra, method)("Pendulum-v1", **fields)
