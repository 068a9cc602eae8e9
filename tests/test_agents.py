"""The details that implementations of DDPG, TD3 and SAC commonly get wrong: one test each."""

import copy

import numpy as np
import pytest
import torch
from test_laws import LEARNERS, batch_for, learner

from rlamort.agents.sac import SAC
from rlamort.agents.td3 import TD3
from rlamort.losses import td_target
from rlamort.nets import Normaliser
from rlamort.objective import MaxQ


def values(module):
    return copy.deepcopy(list(module.parameters()))


def moved(module, before):
    return any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_td3_smoothing_noise_is_drawn_per_sample_and_clipped(spec, monkeypatch):
    """Every row has a draw of its own; the target's action stays in the box and within the clip of the policy's."""
    torch.manual_seed(0)
    agent = TD3(spec, hidden=(16,), smoothing_noise=0.4, smoothing_clip=0.5)
    batch = batch_for(agent, 256)
    seen, both = {}, agent.target_critic.both

    def spy(x, y, x_next, y_next):
        seen["y"] = y_next
        return both(x, y, x_next, y_next)

    monkeypatch.setattr(agent.target_critic, "both", spy)
    plain = agent.target_model(batch.x_next)
    agent.evaluate(batch)
    noise = (seen["y"] - plain).detach()
    assert len(noise.unique(dim=0)) > 200
    assert noise.abs().max() <= 0.5 + 1e-6
    assert seen["y"].abs().max() <= 1


def test_td3_targets_move_with_the_delayed_policy_alone(spec):
    agent = TD3(spec, hidden=(16,))
    assert agent.improve_every == 2
    batch = batch_for(agent)
    before = values(agent.target_critic), values(agent.target_model), values(agent.model)
    agent.update(batch, False)
    assert not moved(agent.target_critic, before[0])
    assert not moved(agent.target_model, before[1])
    assert not moved(agent.model, before[2])
    agent.update(batch, True)
    assert moved(agent.target_critic, before[0])
    assert moved(agent.target_model, before[1])
    assert moved(agent.model, before[2])


def test_td3_actor_climbs_the_first_critic_alone(spec):
    """Whatever the second critic says, the actor's step is the same."""
    torch.manual_seed(0)
    one = TD3(spec, hidden=(16,))
    two = copy.deepcopy(one)
    two.f = MaxQ(two.critic, beta=0.0, members=1)
    with torch.no_grad():
        for layer in two.critic.ensemble.layers:
            layer.weight[1].normal_()
    batch = batch_for(one)
    one.f = MaxQ(one.critic, beta=0.0, members=1)
    one.improve(batch)
    two.improve(batch)
    assert not moved(one.model, values(two.model))


def test_td3_critics_learn_from_the_lower_target(spec):
    torch.manual_seed(0)
    agent = TD3(spec, hidden=(16,), smoothing_noise=0.0)
    batch = batch_for(agent)
    y_next = agent.target_model(batch.x_next)
    target = td_target(batch, agent.target_critic(batch.x_next, y_next).amin(0))
    expected = (agent.critic(batch.x, batch.y) - target).square().mean(-1).sum()
    assert agent.evaluate(batch)["critic/loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_sac_target_holds_the_entropy_of_a_fresh_action(spec):
    """y = r + gamma (1 - terminated) [min Q'(x', y') - alpha log q(y')], y' from the current policy."""
    torch.manual_seed(0)
    agent = SAC(spec, hidden=(16,), temperature=0.3)
    batch = batch_for(agent)
    q = agent.critic(batch.x, batch.y)
    torch.manual_seed(5)
    y_next, logq = agent.density.sample(agent.model(batch.x_next))
    value = agent.target_critic(batch.x_next, y_next).amin(0) - 0.3 * logq
    target = batch.reward + 0.99 * torch.where(batch.terminated, 0.0, value)
    expected = 0.5 * (q - target).square().mean(-1).sum()
    torch.manual_seed(5)
    assert agent.evaluate(batch)["critic/loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_sac_log_density_is_summed_over_coordinates(spec):
    agent = SAC(spec, hidden=(16,))
    assert agent.density.sample(agent.model(torch.randn(7, 3)))[1].shape == (7,)


@pytest.mark.parametrize(("target", "direction"), [(100.0, 1), (-100.0, -1)])
def test_sac_temperature_rises_when_entropy_is_short_and_stays_positive(spec, target, direction):
    agent = SAC(spec, hidden=(16,), target_entropy=target, learning_rate=0.5)
    before = agent.alpha().item()
    for seed in range(30):
        agent.improve(batch_for(agent, seed=seed))
    assert agent.alpha().item() > 0
    assert (agent.alpha().item() - before) * direction > 0


def test_sac_default_target_entropy_is_minus_the_action_dimension(spec):
    assert SAC(spec).target_entropy == -2


def test_sac_targets_move_at_every_update(spec):
    agent = SAC(spec, hidden=(16,))
    before = values(agent.target_critic)
    agent.update(batch_for(agent), False)
    assert moved(agent.target_critic, before)


@pytest.mark.parametrize("name", LEARNERS)
def test_actions_are_in_the_environments_units(name, spec):
    """Per-dimension scale and offset: [-2, 2] and [0, 1], both reached and never left."""
    torch.manual_seed(0)
    agent = learner(name, spec)
    agent.act = lambda x, explore: x[:, :2].sign()
    actions, _ = agent.predict(np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32))
    assert actions.min(0) == pytest.approx([-2, 0], abs=0.05)
    assert actions.max(0) == pytest.approx([2, 1], abs=0.05)
    assert (actions >= [-2, 0]).all()
    assert (actions <= [2, 1]).all()


@pytest.mark.parametrize("name", LEARNERS)
def test_predict_takes_one_observation_or_several(name, spec):
    agent = learner(name, spec)
    one, state = agent.predict(np.zeros(3), deterministic=True)
    several, _ = agent.predict(np.zeros((4, 3)), deterministic=True)
    assert one.shape == (2,)
    assert one.dtype == np.float32
    assert several.shape == (4, 2)
    assert state is None
    assert np.allclose(several, one)
    with pytest.raises(ValueError, match=r"shape \(4,\) given; \(3,\) or \(batch, 3\)"):
        agent.predict(np.zeros(4))


@pytest.mark.parametrize("name", LEARNERS)
def test_exploration_differs_from_the_deterministic_action(name, spec):
    agent = learner(name, spec)
    x = torch.zeros(50, 3)
    assert len(agent.act(x, explore=True).unique(dim=0)) > 40
    assert len(agent.act(x, explore=False).unique(dim=0)) == 1
    assert agent.act(x, explore=True).abs().max() <= 1


def test_normaliser_follows_the_moments_of_everything_it_saw():
    made = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 3, generator=made) * torch.tensor([1.0, 50.0, 0.01]) + torch.tensor([5.0, -3.0, 1000.0])
    normaliser = Normaliser(3)
    for part in data.split([1, 9, 290, 700]):
        normaliser.update(part)
    torch.testing.assert_close(normaliser.mean.float(), data.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normaliser.variance.sqrt().float(), data.std(0, correction=0), rtol=1e-3, atol=1e-6)
    assert normaliser(data).std(0).tolist() == pytest.approx([1, 1, 1], rel=1e-2)


def test_normaliser_stays_finite_where_nothing_varies():
    normaliser = Normaliser(1)
    normaliser.update(torch.full((10, 1), 3.0))
    assert normaliser(torch.tensor([[3.0], [4.0]])).isfinite().all()


def test_normalisation_reaches_both_states_and_is_part_of_the_state(spec):
    torch.manual_seed(0)
    agent = TD3(spec, hidden=(16,), normalise=True, smoothing_noise=0.0)
    agent.observe(torch.randn(100, 3) * 5 + 2)
    assert "normaliser.mean" in agent.state_dict()
    plain = TD3(spec, hidden=(16,), smoothing_noise=0.0)
    plain.load_state_dict({k: v for k, v in agent.state_dict().items() if not k.startswith("normaliser")})
    batch = batch_for(agent)
    scaled = batch._replace(x=agent.normaliser(batch.x), x_next=agent.normaliser(batch.x_next))
    assert torch.equal(agent.update(batch, False)["critic/loss"], plain.update(scaled, False)["critic/loss"])
    assert torch.equal(agent.act(batch.x, False), plain.act(scaled.x, False))


@pytest.mark.parametrize("name", LEARNERS)
def test_everything_follows_the_agent_to_a_device(name, spec, device):
    agent = learner(name, spec, normalise=True).to(device)
    assert {t.device.type for t in agent.state_dict().values()} == {device.type}
    agent.update(batch_for(agent), True)
    agent.observe(torch.randn(3, 3, device=device))
