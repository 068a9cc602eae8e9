"""Guided policy search: local models, control within a divergence, the network's regression, and whole runs."""

import gymnasium
import numpy as np
import pytest
import torch
from rlamort.envs.cartpole import CartPole
from rlamort.envs.lqr import Lqr
from rlamort.envs.twolink import TwoLink
from test_resume import assert_equal, timeless
from torch.distributions import MultivariateNormal, kl_divergence

from rlamort.domain import Box
from rlamort.dynamics import Known, LinearGaussian, Prior
from rlamort.errors import Fault, Preempted, UserError
from rlamort.losses import precise
from rlamort.measure.claims.gps import PointMass, Reach
from rlamort.measure.guided import Guided, improved
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.solve.kl_control import Moments, Quadratic, bounded, divergence, expanded, expected, follow, regulated

ME = "test_gps"
M, T, N, D, A = 2, 6, 4, 4, 2
SMALL = {"num_envs": M, "rollouts": N, "memory": 8, "hidden": (16,), "policy_steps": 20, "clusters": 3, "threads": 1,
         "device": "cpu", "eval_episodes": 2, "log_every": 10_000}  # fmt: skip


class Mass(Lqr):
    """The point mass with a gentler force, as an environment that commands make by its name."""

    def __init__(self, length=T):
        super().__init__(bound=6.0, length=length)


class Unseeded(Mass):
    """One that cannot be put back into a state."""

    def begin(self):
        return np.random.uniform(-1, 1, len(self.A))  # the fault that is injected


class Early(Mass):
    """One that ends where the task is done, before others do."""

    dynamics = Mass.dynamics  # the same, but for its end

    def step(self, action):
        x, reward, _, truncated, info = super().step(action)
        return x, reward, bool(x[0] > 0), truncated, info


def hidden(x, u):
    """Known rewards without gradients."""
    reward = -x.detach().square().sum(-1)
    return x, reward, torch.ones_like(reward)


def gps(env, **fields):
    return learner_class("gps")(env, **{**SMALL, **fields})


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def exact(env, conditions=M, steps=T):
    """A linear environment's dynamics, for actions in its own units."""
    gain = torch.cat([torch.tensor(env.A), torch.tensor(env.B)], 1).expand(conditions, steps, -1, -1)
    return LinearGaussian(gain, gain.new_zeros(gain.shape[:-1]), gain.new_zeros(*gain.shape[:-1], gain.shape[-2]))


def system():
    """Costs, dynamics with noise, a controller and the first state, all at random."""
    torch.manual_seed(0)
    root = normal(M, T, D + A, D + A)
    cost = Quadratic(normal(M, T), normal(M, T, D + A), root @ root.mT / 4 + torch.eye(D + A))
    gain = torch.cat([0.9 * torch.eye(D).expand(M, T, D, D), torch.zeros(M, T, D, A)], -1) + 0.2 * normal(M, T, D, D + A)
    dynamics = LinearGaussian(gain, 0.1 * normal(M, T, D), 0.01 * torch.eye(D, dtype=torch.float64).expand(M, T, D, D))
    spread = 0.2 * normal(M, T, A, A)
    near = LinearGaussian(0.2 * normal(M, T, A, D), normal(M, T, A), spread @ spread.mT + 0.3 * torch.eye(A))
    return cost, dynamics, near, Moments(normal(M, D), 0.1 * torch.eye(D, dtype=torch.float64).expand(M, D, D))


def drawn(dynamics, controller, start, count):
    """Trajectories of z (M, T, count, .), and the log-likelihood of their actions under any controller, by a function."""
    x, path = MultivariateNormal(*start).sample((count,)).transpose(0, 1), []
    for t in range(T):
        mean = x @ controller.gain[:, t].mT + controller.offset[:, t, None]
        u = mean + (torch.linalg.cholesky(controller.covariance[:, t]) @ normal(M, A, count)).mT
        path.append(torch.cat([x, u], -1))
        x = path[-1] @ dynamics.gain[:, t].mT + dynamics.offset[:, t, None] + 0.1 * normal(M, count, D)
    z = torch.stack(path, 1)

    def log(of):
        return MultivariateNormal(of.mean(z[..., :D]), of.covariance[:, :, None]).log_prob(z[..., D:]).sum(1)

    return z, log


def test_models_of_a_linear_system_are_that_system():
    torch.manual_seed(0)
    env = Lqr()
    x, u = [normal(M, 5, D)], []
    for _ in range(20):
        u.append(0.3 * normal(M, 5, A))
        x.append(x[-1] @ torch.tensor(env.A).T + u[-1] @ torch.tensor(env.B).T + 0.5)
    z, w = torch.cat([torch.stack(x[:-1], 1), torch.stack(u, 1)], -1), torch.stack(x[1:], 1)
    for clusters in (1, 6):
        prior = Prior(clusters, 20, 1.0)
        mixture = prior.mixture(torch.cat([z, w], -1).flatten(0, 2))
        assert len(mixture.weight) == clusters
        found = prior.fitted(z, w, mixture)
        torch.testing.assert_close(found.gain, exact(env, M, 20).gain, atol=2e-3, rtol=0)
        torch.testing.assert_close(found.mean(z), w, atol=2e-3, rtol=0)
        assert torch.linalg.eigvalsh(found.covariance).min() > -1e-12
        assert found.covariance.abs().max() < 1e-4


def test_models_are_of_the_samples_where_there_are_many_and_of_the_prior_where_there_are_few():
    torch.manual_seed(0)
    z = normal(1, 2, 4_000, 3) * torch.tensor([1.0, 10.0, 0.1])
    truth = torch.tensor([[[1.0, -0.2, 3.0]], [[-1.0, 0.5, 0.0]]], dtype=torch.float64)  # another one at each step
    w = z @ truth.mT + 0.5 * normal(1, 2, 4_000, 1)
    prior = Prior(1, 20, 1.0)
    mixture = prior.mixture(torch.cat([z, w], -1).flatten(0, 2))
    found = prior.fitted(z, w, mixture)
    torch.testing.assert_close(found.gain[0], truth, atol=0.3, rtol=0)
    torch.testing.assert_close(found.covariance.flatten(), torch.full((2,), 0.25, dtype=torch.float64), atol=0.03, rtol=0)
    few = Prior(1, 20, 1e6).fitted(z[:, :, :2], w[:, :, :2], mixture)
    torch.testing.assert_close(few.gain[0], truth.mean(0, keepdim=True).expand(2, 1, 3), atol=0.5, rtol=0)


def test_without_a_bound_the_c_step_is_the_riccati_solution():
    env = Lqr(bound=1.0)
    x, u = normal(M, T, N, D), normal(M, T, N, A)
    cost = expanded(Known(env.dynamics, Box([-1.0] * A, [1.0] * A), "own"), x, u)
    near = LinearGaussian(*(torch.zeros(M, T, *shape, dtype=torch.float64) for shape in ((A, D), (A,), (A, A))))
    near = near._replace(covariance=near.covariance + torch.eye(A))
    start, many = Moments.of(normal(M, N, D)), torch.full((M,), 1e9, dtype=torch.float64)
    found = bounded(cost, exact(env), near, start, many, torch.ones_like(many))
    solved = env.riccati(T)
    torch.testing.assert_close(found.controller.gain, -solved.gains.expand(M, -1, -1, -1), atol=1e-6, rtol=1e-5)
    assert found.met.all()
    mean = follow(exact(env), found.controller, start._replace(covariance=0 * start.covariance))
    best = torch.einsum("mi,ij,mj->m", start.mean, solved.costs[0], start.mean)
    torch.testing.assert_close(expected(cost, mean), best, atol=1e-4, rtol=1e-4)


def test_divergence_and_cost_are_those_of_sampled_trajectories():
    cost, dynamics, near, start = system()
    p, _ = regulated(cost, dynamics, near, torch.full((M,), 5.0, dtype=torch.float64), 0.0)
    along = follow(dynamics, p, start)
    z, log = drawn(dynamics, p, start, 20_000)
    ratio = log(p) - log(near)
    error = ratio.std(-1) / 20_000**0.5
    assert ((divergence(p, near, along) - ratio.mean(-1)).abs() < 4 * error).all()
    costs = (cost.value[..., None] + (z @ cost.slope[..., None])[..., 0] + ((z @ cost.curvature) * z).sum(-1) / 2).sum(1)
    assert ((expected(cost, along) - costs.mean(-1)).abs() < 4 * costs.std(-1) / 20_000**0.5).all()
    assert (divergence(near, near, along).abs() < 1e-10).all()


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_a_controller_minimises_its_objective(temperature):
    """No controller near to it has less cost - temperature H + eta KL."""
    cost, dynamics, near, start = system()
    eta = torch.tensor([0.5, 3.0], dtype=torch.float64)
    p, firm = regulated(cost, dynamics, near, eta, temperature)
    assert firm.all()

    def objective(q):
        along = follow(dynamics, q, start)
        entropy = torch.logdet(q.covariance).sum(-1) / 2
        return expected(cost, along) + eta * divergence(q, near, along) - temperature * entropy

    least = objective(p)
    for _ in range(20):
        step = [1e-2 * normal(*part.shape) for part in p]
        step[2] = p.covariance @ (step[2] + step[2].mT) @ p.covariance
        for side in (1, -1):
            assert (objective(LinearGaussian(*(part + side * one for part, one in zip(p, step, strict=True)))) > least).all()


@pytest.mark.parametrize("eps", [0.1, 3.0, 40.0])
def test_dual_descent_meets_the_constraint_item_by_item(eps):
    cost, dynamics, near, start = system()
    bound, eta = torch.full((M,), eps, dtype=torch.float64), torch.tensor([1.0, 1e5], dtype=torch.float64)
    found = bounded(cost, dynamics, near, start, bound, eta)
    assert found.met.all()
    assert ((found.divergence - eps).abs() <= 0.1 * eps).all()
    along = follow(dynamics, found.controller, start)
    torch.testing.assert_close(divergence(found.controller, near, along), found.divergence)
    alone = bounded(*(type(part)(*(one[1:] for one in part)) for part in (cost, dynamics, near, start)), bound[1:], eta[1:])
    torch.testing.assert_close(alone.controller.gain, found.controller.gain[1:])


def test_a_bound_of_zero_moves_nothing():
    cost, dynamics, near, start = system()
    found = bounded(cost, dynamics, near, start, torch.zeros(M, dtype=torch.float64), torch.ones(M, dtype=torch.float64))
    assert_equal(found.controller._asdict(), near._asdict())


def test_eta_rises_where_an_action_has_negative_curvature_and_there_alone():
    cost, dynamics, near, start = system()
    curvature = cost.curvature.clone()
    curvature[0, 2, D:, D:] = -50 * torch.eye(A)
    bound, eta = torch.full((M,), 1e6, dtype=torch.float64), torch.ones(M, dtype=torch.float64)
    _, firm = regulated(cost._replace(curvature=curvature), dynamics, near, eta, 0.0)
    assert firm.tolist() == [False, True]
    found, before = (bounded(one, dynamics, near, start, bound, eta) for one in (cost._replace(curvature=curvature), cost))
    assert torch.linalg.eigvalsh(found.controller.covariance).min() > 0
    assert found.met.all()
    assert found.eta[0] > 1e3 * found.eta[1]
    torch.testing.assert_close(found.controller.gain[1], before.controller.gain[1])


def test_costs_have_the_value_and_slope_of_the_reward_at_a_sample():
    torch.manual_seed(0)
    env = TwoLink(torque=1.0)
    known, x, u = Known(env.dynamics, Box([-1.0] * 2, [1.0] * 2), "own"), normal(M, T, 1, 6), normal(M, T, 1, 2)
    cost, z = expanded(known, x, u), torch.cat([x, u], -1)[:, :, 0]

    def reward(z):
        return known(z[..., :6].flatten(0, 1), z[..., 6:].flatten(0, 1)).reward.view(M, T)

    across = (cost.curvature @ z[..., None])[..., 0]
    torch.testing.assert_close(cost.value + (cost.slope * z).sum(-1) + (across * z).sum(-1) / 2, -reward(z))
    for i in range(8):
        step = 1e-6 * torch.nn.functional.one_hot(torch.tensor(i), 8)
        torch.testing.assert_close((cost.slope + across)[..., i], (reward(z - step) - reward(z + step)) / 2e-6)
    assert torch.linalg.eigvalsh(cost.curvature).min() > -1e-12


def test_the_loss_is_a_divergence_of_gaussians_and_its_gradient_is_weighed_by_precisions():
    torch.manual_seed(0)
    root, y, u = normal(3, 2, 2), normal(3, 2).requires_grad_(), normal(3, 2)
    P = root @ root.mT + torch.eye(2)
    loss = precise(y, torch.cat([u, P.flatten(-2)], -1))
    S = torch.eye(2, dtype=torch.float64)
    local = MultivariateNormal(u, precision_matrix=P)
    apart = kl_divergence(MultivariateNormal(y, S), local) - kl_divergence(MultivariateNormal(u, S), local)
    torch.testing.assert_close(loss, apart)
    (slope,) = torch.autograd.grad(loss.sum(), y)
    torch.testing.assert_close(slope, (P @ (y - u)[..., None])[..., 0])


def test_it_controls_a_point_mass_nearly_optimally_after_three_iterations():
    learner = gps(Mass(length=15), policy_steps=300, hidden=(32,), initial_std=0.3, kl_step=1.0)
    learner.learn(3 * learner.agent.fit_every)
    agent, env, x = learner.agent, Lqr(bound=6.0, length=15), learner.source.waiting
    best = torch.einsum("mi,ij,mj->m", x.double(), env.riccati(15).costs[0], x.double())
    controllers = agent.controllers()
    players = {
        "network": lambda x, t: agent.policy(x),
        "controllers": lambda x, t: controllers.mean(x[:, None, None].expand(-1, 15, -1, -1).double())[:, t, 0].float(),
    }
    for name, play in players.items():
        total, at = torch.zeros(M), x
        for t in range(15):
            at, reward, _ = env.dynamics(at, 6 * play(at, t).detach())
            total -= reward
        assert (total < 1.1 * best).all(), name
    assert float(learner.clock.metrics["gps/met"]) == 1
    assert abs(float(learner.clock.metrics["gps/kl"]) - 1) < 0.1


def test_with_a_bound_of_zero_nothing_is_learned():
    learner = gps(Mass(), kl_step=0, policy_steps=200, learning_rate=1e-2)
    learner.learn(2 * learner.agent.fit_every)
    agent, x = learner.agent, learner.source.latest().x[:, :-1].flatten(0, 2)
    torch.testing.assert_close(
        agent.controllers().covariance, 0.01 * torch.eye(A).double().expand(M, T, A, A), atol=2e-3, rtol=0
    )
    assert agent.policy(x).abs().mean() < 0.03  # the first controllers do nothing, and actions had a spread of 0.1


def test_steps_grow_where_models_keep_their_promise_and_shrink_where_not():
    agent = gps(Mass()).agent
    cost, dynamics, near, start = system()
    better, _ = regulated(cost, dynamics, near, torch.full((M,), 5.0, dtype=torch.float64), 0.0)
    for promised, factor in ((True, 3.0), (False, 0.5)):
        agent.begun.zero_()
        agent.factor.fill_(1)
        agent.adapt(dynamics, near, cost, start)
        assert agent.factor == 1
        agent.adapt(dynamics, better if promised else near, cost if promised else cost._replace(value=cost.value + 9), start)
        assert agent.factor == factor


def test_local_controllers_play_with_a_clock_and_the_network_otherwise():
    learner = gps(Mass())
    agent, x = learner.agent, torch.randn(M, D)
    agent.controllers.covariance.fill_(0)
    agent.controllers.covariance.diagonal(dim1=-2, dim2=-1).fill_(1e-20)
    agent.controllers.offset.copy_(torch.arange(M * T * A).view(M, T, A) / 100)
    h = agent.start(M)
    for t in range(T + 1):
        y, h = agent.play(x, h, explore=True)
        torch.testing.assert_close(y, agent.controllers.offset[:, min(t, T - 1)].float())
    assert torch.equal(agent.act(x, explore=False), agent.policy(x))


def test_rollouts_begin_in_the_same_states():
    learner = gps(Mass(), seed=3)
    learner.learn(agent_steps := learner.agent.fit_every)
    met = learner.source.latest()
    assert met.x.shape == (M, T + 1, N, D)
    assert met.y.shape == (M, T, N, A)
    for i in range(M):
        first, _ = Mass().reset(seed=3 + i)
        assert torch.equal(met.x[i, 0], torch.from_numpy(first).expand(N, D))
    x, y = met.x[:, :-1].flatten(0, 2), met.y.flatten(0, 2)
    torch.testing.assert_close(Mass().dynamics(x, 6 * y)[0].view(M, T, N, D), met.x[:, 1:])
    assert learner.clock.env_step == agent_steps == M * N * T


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    fields = {"checkpoint_every": 10, "log_every": 48, "eval_every": 48}
    whole = gps(f"{ME}:Mass", dir=str(tmp_path / "whole"), **fields).learn(120)
    for at in (30, 62):  # within the first iteration's rollouts, and the second's
        broken = gps(f"{ME}:Mass", dir=str(tmp_path / f"broken{at}"), **fields)
        with pytest.raises(Preempted):
            broken.learn(120, stop=lambda at=at, broken=broken: broken.clock.env_step >= at)
        broken.close()
        torch.rand(3)
        again, exactness = resume(tmp_path / f"broken{at}")
        assert exactness == "exact"
        again.learn(120 - again.clock.env_step, reset_num_timesteps=False)
        assert_equal(dict(whole.agent.state_dict()), dict(again.agent.state_dict()))
        one, two = whole.state(), again.state()
        one["clock"]["seconds"] = two["clock"]["seconds"] = 0
        assert_equal(one, two)
        assert timeless(tmp_path / "whole") == timeless(tmp_path / f"broken{at}")


@pytest.mark.parametrize(
    ("env", "fields", "said"),
    [
        (Unseeded, {}, "two resets with the same seed give different states"),
        (gymnasium.make("Pendulum-v1").unwrapped, {}, "no time limit.*set max_episode_steps"),
        ("CartPole-v1", {}, "Discrete"),
        ("HalfCheetah-v5", {"max_episode_steps": 5}, "dynamics=own: the equations of this environment are not known"),
        (
            Mass,
            {"dynamics": {"kind": "Known", "step": f"{ME}:hidden"}},
            "dynamics=Known: its rewards are no known function with gradients",
        ),
        (Mass, {"dynamics": "ensemble"}, "dynamics=Ensemble: its rewards are no known function"),
        (Mass, {"model": "semi"}, "it needs a known problem"),
        (Mass, {"model": "mip"}, "it reads labels as predictions of its own"),
        (Mass, {"rollouts": 1}, "rollouts=1: a whole number >= 2"),
        (Mass, {"memory": 3}, "memory=3: .*rollouts=4"),
        (Mass, {"least_factor": 4}, "least_factor=4: it is above most_factor=3"),
        (Mass, {"warmup_steps": 10}, "warmup_steps=10"),
    ],
)
def test_bad_input_is_said_before_any_work(env, fields, said):
    with pytest.raises(UserError, match=said):
        gps(env, **fields).learn(1)


def test_an_episode_that_ends_before_the_others_is_a_fault():
    with pytest.raises(Fault, match=r"ended after .* steps, and the others have 6"):
        gps(Early).learn(200)


def test_a_saved_agent_is_loaded_and_predicts(tmp_path):
    learner = gps(f"{ME}:Mass")
    learner.learn(learner.agent.fit_every)
    learner.save(tmp_path / "agent")
    again = learner_class("gps").load(tmp_path / "agent", env=f"{ME}:Mass")
    x = np.zeros((3, D), np.float32)
    assert np.array_equal(again.predict(x, deterministic=True)[0], learner.predict(x, deterministic=True)[0])


def test_it_runs_on_the_cart_pole():
    learner = gps(CartPole(force=10.0, length=10), kl_step=0.5)
    learner.learn(2 * learner.agent.fit_every)
    assert np.isfinite(learner.score(2).returns).all()


@pytest.mark.parametrize("kind", [PointMass, Reach])
def test_starts_of_the_claims_are_in_the_hull_of_the_conditions(kind):
    env = kind(first=7)
    corners = env.corners.corners
    for i in range(4):
        np.testing.assert_allclose(env.reset(seed=7 + i)[0], corners[i], rtol=1e-6)
    inside = np.stack([env.reset(seed=1_000 + i)[0] for i in range(20)])
    weights, *_ = np.linalg.lstsq(np.concatenate([corners, np.ones((4, 1))], 1).T, np.append(inside[0], 1), rcond=None)
    np.testing.assert_allclose(weights @ corners, inside[0], atol=1e-5)
    assert (inside >= corners.min(0) - 1e-6).all()
    assert (inside <= corners.max(0) + 1e-6).all()
    assert not np.array_equal(kind(first=8).corners.corners, corners)


def test_a_plan_is_improved_to_the_optimum_of_a_linear_system():
    env, x = Lqr(bound=6.0), torch.rand(3, D) * 2 - 1
    known = Known(env.dynamics, Box([-6.0] * A, [6.0] * A), "own")
    best = torch.einsum("mi,ij,mj->m", x.double(), env.riccati(10).costs[0], x.double())
    torch.testing.assert_close(improved(known, lambda x, t: x[:, :A].clamp(-1, 1), x, 10).double(), best, atol=1e-3, rtol=1e-3)


def test_claims_count_a_baseline_that_does_not_get_there_with_all_of_its_steps():
    claim = Guided("gps", "m:Mass", 3_000, [0, 1], baseline="sac", baseline_steps=9_000)

    def run(*costs):
        return [{"env_step": 1_000 * (i + 1), "eval/return": -cost} for i, cost in enumerate(costs)]

    own = {"met": [1.0, 0.8], "network": 10.0, "controllers": 9.5, "held": 5.4, "optimal": 5.0}
    results = {claim.key("gps", seed): own | {"evaluations": run(9, 5.4, 5.4)} for seed in (0, 1)}
    results[claim.key("sac", 0)] = {"evaluations": run(*[50] * 9)}
    assert claim.samples(results) == [(2_000, 9_000)]
    assert [one.outcome for one in claim.judge(results)] == ["incomplete"] * 4
    assert claim.waiting(results) == "Mass: 1 runs to go"
    results[claim.key("sac", 1)] = {"evaluations": run(50, 40, 5.4)}
    met, follows, held, fewer = claim.judge(results)
    assert claim.samples(results) == [(2_000, 9_000), (2_000, 3_000)]
    assert [one.outcome for one in (met, follows, held, fewer)] == ["FAIL", "pass", "pass", "FAIL"]
    assert met.measured.startswith("0.9")
    assert fewer.measured.startswith("3 ")
