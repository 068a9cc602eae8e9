"""PILCO: Gaussian processes as dynamics, moments in closed form, and a policy that is improved in its model alone."""

import builtins
import sys

import numpy as np
import pytest
import torch
from rlamort.envs.cartpole import SwingUp
from rlamort.envs.lqr import Lqr
from test_resume import assert_equal, everything, timeless
from torch import nn

import rlamort as ra
from rlamort.agent import Adam, descend
from rlamort.domain import Box, unit_box
from rlamort.dynamics import Beliefs, Everything, GaussianProcess, Known, Motion, Particles, Saturating, Spread
from rlamort.dynamics.moments import Moments, saturated, sines
from rlamort.errors import Preempted, UserError
from rlamort.measure.reproduce import entries
from rlamort.measure.rollouts import Rollouts
from rlamort.radial import Radial, Sine
from rlamort.run.restore import resume
from rlamort.source import Batch

DOUBLE = torch.float64
REWARD = Saturating([0, 0, 1, 0, 0], [0.5, 0, 0.5, 0.5, 0])
SATURATING = {"kind": "saturating", "target": [0, 0, 1, 0, 0], "weights": [0.5, 0, 0.5, 0.5, 0]}
TINY = {
    "env": "rlamort.envs.cartpole:SwingUp", "max_episode_steps": 8, "warmup_steps": 8, "fit_steps": 3, "policy_steps": 3,
    "particles": 5, "horizon": 5, "model": {"kind": "radial", "basis": 6}, "device": "cpu", "eval_every": 1000,
    "eval_episodes": 1, "log_every": 8, "checkpoint_every": 8, "buffer_size": 200,
    "dynamics": {"kind": "gp", "angles": [2, 3], "points": {"kind": "All", "most": 60}, "rewards": SATURATING},
}  # fmt: skip


def met(count, seed=0):
    """Transitions of the cart-pole from states all around, in float64."""
    made = torch.Generator().manual_seed(seed)
    position, speed, theta, turn = torch.randn(4, count, generator=made, dtype=DOUBLE) * torch.tensor([[0.5], [1], [1.5], [2]])
    x = torch.stack([position, speed, theta.cos(), theta.sin(), turn], -1)
    y = 2 * torch.rand(count, 1, generator=made, dtype=DOUBLE) - 1
    x_next, reward, _ = SwingUp().dynamics(x, 10 * y)
    return Batch(x, y, reward, torch.ones_like(reward), torch.zeros(count, dtype=torch.bool), x_next)


def fitted(process, batch, steps):
    adam, targets = Adam(process.parameters(), 0.1), process.hold(batch)
    for _ in range(steps):
        descend(process.loss(targets), process.parameters(), adam)
    process.condition(targets)
    return process


@pytest.fixture(scope="module")
def process():
    return fitted(GaussianProcess(5, 1, REWARD, (2, 3), Everything(80)), met(60), 25)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(1)
    made = Sine(Radial(5, 8, 1), unit_box(1)).double()
    with torch.no_grad():
        made.net.weights.mul_(5)
    return made


@pytest.fixture(scope="module")
def normal():
    """An input of a process: its mean, covariance, and 1e5 draws."""
    torch.manual_seed(2)
    root = 0.3 * torch.randn(6, 6, dtype=DOUBLE)
    mean = torch.tensor([0.1, -0.3, 0.4, 0.5, -1.0, 0.2], dtype=DOUBLE)
    half = torch.randn(50_000, 6, dtype=DOUBLE) @ root.mT
    return mean, root @ root.mT, mean + torch.cat([half, -half])


def near(found, expected, share=0.02):
    """Whether matrices agree within a share of the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def centred(draws):
    return draws - draws.mean(0)


def test_moments_of_the_process_are_those_of_draws(process, normal):
    mean, cov, w = normal
    found, (each, variance) = process.moments(mean, cov), process.predict(w[:, :5], w[:, 5:])
    near(found.mean, each.mean(0))
    near(found.cov, torch.cov(each.mT) + torch.diag(variance.mean(0)))
    near(cov @ found.slope, centred(w).mT @ each / len(w))


def test_moments_of_the_policy_and_of_sines_are_those_of_draws(policy, normal):
    mean, cov, w = (part[..., :5] for part in normal)
    with torch.no_grad():
        found, v = policy.net.moments(mean, cov[:5]), policy.net(w)
    near(found.mean, v.mean(0))
    near(found.cov, torch.cov(v.mT).view(1, 1))
    near(cov[:5] @ found.slope, centred(w).mT @ v / len(w))
    which = torch.tensor([False, False, True, True, False])
    found, both = sines(mean, cov[:5], which), torch.where(which, w.sin(), w)
    near(found.mean, both.mean(0))
    near(found.cov, torch.cov(both.mT))
    near(cov[:5] @ found.slope, centred(w).mT @ both / len(w))


def test_the_expected_saturating_reward_is_that_of_draws(normal):
    mean, cov, w = normal
    assert REWARD.expected(mean, cov) == pytest.approx(float(REWARD(w[:, :5], w[:, 5:], w[:, :5]).mean()), rel=0.02)
    certain = REWARD.expected(mean, torch.zeros_like(cov))
    assert certain == pytest.approx(float(REWARD(mean[None, :5], mean[None, 5:], mean[None, :5])))


def test_a_certain_input_has_the_moments_of_a_prediction(process):
    x, y = met(1, seed=4)[:2]
    mean, variance = process.predict(x, y)
    found = process.moments(torch.cat([x, y], -1)[0], torch.zeros(6, 6, dtype=DOUBLE))
    torch.testing.assert_close(found.mean, mean[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.cov.diagonal(), variance[0], rtol=1e-3, atol=1e-8)


def test_gradients_are_finite_differences(process, policy, normal):
    x, y = met(3, seed=5)[:2]
    w = torch.cat([x, y], -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: process.predict(w[:, :5], w[:, 5:]), (w,))
    mean, cov = normal[0].clone().requires_grad_(), normal[1]
    assert torch.autograd.gradcheck(lambda mean: saturated(mean, cov, normal[0] - 1, normal[0].abs()), (mean,))
    starts = met(4, seed=6).x
    for f in (Particles(process, policy, 4), Beliefs(process, REWARD, policy.moments, 4)):

        def value(f=f):
            torch.manual_seed(0)  # common random numbers
            return f(policy(starts), starts).mean()

        parameters = list(policy.parameters())
        slopes = torch.autograd.grad(value(), parameters)
        lines = [torch.randn_like(p) for p in parameters]
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                for p, line in zip(parameters, lines, strict=True):
                    p.add_(line, alpha=step)
                ends.append(value())
            for p, line in zip(parameters, lines, strict=True):
                p.add_(line, alpha=1e-5)
        along = sum((s * line).sum() for s, line in zip(slopes, lines, strict=True))
        assert float(along) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_beliefs_and_particles_expect_the_same(process, policy):
    torch.manual_seed(0)
    hanging = torch.tensor([0.0, 0, -1, 0, 0], dtype=DOUBLE).expand(3_000, 5)
    x = process.motion.after(hanging, 0.1 * torch.randn(3_000, 4, dtype=DOUBLE))
    with torch.no_grad():
        y = policy(x)
        ours, theirs = (f(y, x).mean() for f in (Beliefs(process, REWARD, policy.moments, 5), Particles(process, policy, 5)))
    assert float(ours) == pytest.approx(float(theirs), rel=0.005)


def test_clipped_gradients_are_shorter_where_they_are_long(process, policy):
    x = met(4, seed=8).x

    def slope(clip):
        torch.manual_seed(0)
        f = Particles(process, policy, 6, clip=clip)
        return torch.autograd.grad(f(policy(x), x).mean(), policy.net.weights)[0]

    assert torch.equal(slope(None), slope(1e9))
    assert slope(1e-6).norm() < 0.5 * slope(None).norm()


class Quadratic:
    """The reward of a linear system, with its mean."""

    def __init__(self, lqr):
        self.W = torch.block_diag(*(torch.as_tensor(part) for part in (lqr.Q, lqr.R)))

    def __call__(self, x, y, x_next):
        w = torch.cat([x, y], -1)
        return -((w @ self.W) * w).sum(-1)

    def expected(self, mean, cov):
        return -(mean @ self.W @ mean + (self.W * cov).sum())


class Linear(nn.Module):
    """The optimal feedback."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return -x @ self.gain.mT

    def moments(self, mean, cov):
        return Moments(-self.gain @ mean, self.gain @ cov @ self.gain.mT, -self.gain.mT)


class Certain:
    """A known linear system, on normal inputs."""

    def __init__(self, lqr):
        A, B = torch.as_tensor(lqr.A), torch.as_tensor(lqr.B)
        self.motion, self.matrix = Motion(4), torch.cat([A - torch.eye(4).to(A), B], 1)

    def moments(self, mean, cov):
        return Moments(self.matrix @ mean, self.matrix @ cov @ self.matrix.mT, self.matrix.mT)


def test_the_expansion_of_a_linear_system_is_the_riccati_cost():
    lqr, H = Lqr(R=np.eye(2), bound=1.0), 8
    P = lqr.stationary(1.0)
    solved = lqr.riccati(H, tail=P)  # so that one gain is optimal at every step
    policy = Linear(solved.gains[0])
    torch.manual_seed(0)
    x = 0.3 * torch.randn(400, 4, dtype=DOUBLE) + 0.2
    end = x.clone()
    for _ in range(H):
        end = lqr.dynamics(end, policy(end))[0]
    worth = ((x @ P) * x).sum(-1) - ((end @ P) * end).sum(-1)
    reward = Quadratic(lqr)
    known = Known(lqr.dynamics, Box([-1.0] * 2, [1.0] * 2), "lqr")
    torch.testing.assert_close(Particles(known, policy, H)(policy(x), x), worth)
    torch.testing.assert_close(Beliefs(Certain(lqr), reward, policy.moments, H)(policy(x), x)[0], worth.mean())
    seen = 0.8 * torch.randn(60, 4, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    x_next, paid, _ = lqr.dynamics(*seen)
    learned = GaussianProcess(4, 2, reward, points=Everything(60))
    fitted(learned, Batch(*seen, paid, paid, paid > 1, x_next), 60)
    with torch.no_grad():
        for f in (Particles(learned, policy, H), Beliefs(learned, reward, policy.moments, H)):
            assert float(f(policy(x), x).mean()) == pytest.approx(float(worth.mean()), rel=0.02)


def test_a_process_recovers_what_it_has_seen_and_says_where_it_has_not(process):
    held, seen = met(40, seed=7), met(60)
    for batch, share in ((seen, 0.02), (held, 0.15)):
        error = process.predict(batch.x, batch.y)[0] - process.motion.change(batch.x, batch.x_next)
        assert (error.square().mean(0).sqrt() < share * process.scales[6:]).all()
    far = process.predict(seen.x + 50, seen.y)[1].sqrt()
    assert (far > 5 * process.predict(seen.x, seen.y)[1].sqrt()).all()


def test_angles_turn_and_never_leave_the_circle():
    batch, motion = met(30), Motion(5, (2, 3))
    torch.testing.assert_close(motion.after(batch.x, motion.change(batch.x, batch.x_next)), batch.x_next)
    turned = motion.after(batch.x, torch.full((30, 4), 9.0, dtype=DOUBLE))
    torch.testing.assert_close(turned[:, 2:4].square().sum(-1), torch.ones(30, dtype=DOUBLE))


def test_common_random_numbers_give_the_same_particles(process):
    x, y = met(4)[:2]
    for follow in (process, process.futures):
        torch.manual_seed(3)
        first = follow(x, y).x_next
        torch.manual_seed(3)
        assert torch.equal(first, follow(x, y).x_next)
    assert first.shape == (process.members, 4, 5)
    assert process.follow(x, [y, y])[-1].x_next.shape == (process.members, 4, 5)


@pytest.mark.parametrize("case", ["duplicates", "constant", "three"])
def test_no_cholesky_fails(case):
    batch = met(40)
    if case == "duplicates":
        batch = Batch(*(part[:1].expand(40, *part.shape[1:]) for part in batch))
    if case == "constant":
        batch = batch._replace(y=torch.zeros_like(batch.y), x_next=batch.x)
    if case == "three":
        batch = Batch(*(part[:3] for part in batch))
    made = fitted(GaussianProcess(5, 1, REWARD, (2, 3)), batch, 40)
    for part in (*made.predict(batch.x, batch.y), *made.moments(torch.zeros(6, dtype=DOUBLE), torch.eye(6, dtype=DOUBLE))):
        assert part.isfinite().all()
    extreme = GaussianProcess(5, 1, REWARD, (2, 3))  # no noise, and no distance between data
    extreme.likelihood.noise, extreme.kernel.base_kernel.lengthscale = 1e-7, 1e4
    extreme.condition(extreme.hold(batch))
    assert extreme.inverse.isfinite().all()


def test_spread_holds_the_most_different():
    clusters = torch.arange(4, dtype=DOUBLE)[:, None] * 5 + 1e-3 * torch.randn(4, 10, dtype=DOUBLE)
    chosen = Spread(4)(clusters.reshape(-1, 1))
    assert (chosen // 10).tolist() == [0, 1, 2, 3]
    assert len(Spread(50)(clusters.reshape(-1, 1))) == 40
    made = GaussianProcess(5, 1, REWARD, (2, 3), Spread(20))
    made.condition(made.hold(met(60)))
    assert int(made.count) == 20


def test_bad_data_are_named():
    made = GaussianProcess(5, 1, REWARD, (2, 3), Everything(20))
    with pytest.raises(UserError, match="2 transitions are met; a Gaussian process needs at least 3"):
        made.hold(Batch(*(part[:2] for part in met(40))))
    with pytest.raises(UserError, match=r"40 transitions are met, and the process holds dynamics\.points\.most=20.*spread"):
        made.hold(met(40))
    off = met(10)
    with pytest.raises(UserError, match="coordinates 2 and 3 are off the unit circle"):
        made.hold(off._replace(x=2 * off.x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamics": {"angles": [2]}}, r"dynamics\.angles=\[2\]: pairs"),
        ({"dynamics": {"angles": [2, 9]}}, r"pairs of different coordinates below 5"),
        ({"dynamics": {"rewards": {"weights": [1, 1]}}}, r"dynamics\.rewards\.weights=.*5 numbers"),
        ({"dynamics": {"rewards": {"kind": "Written", "function": "nowhere"}}}, r"function=nowhere"),
        ({"dynamics": "ensemble"}, "dynamics=Ensemble: gp"),
        ({"propagation": "moments", "model": "full"}, "model=radial is needed"),
        ({"propagation": "moments", "dynamics": {"rewards": "own"}}, "dynamics.rewards=saturating is needed"),
        ({"env": "HalfCheetah-v5", "dynamics": {"rewards": "own", "angles": []}}, "what they are worth"),
        ({"env": "CartPole-v1"}, "(?i)discrete"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, message):
    fields = {**TINY, **changes}
    if isinstance(fields["dynamics"], dict):
        fields["dynamics"] = TINY["dynamics"] | fields["dynamics"]
        if isinstance(fields["dynamics"]["rewards"], dict) and "kind" not in fields["dynamics"]["rewards"]:
            fields["dynamics"]["rewards"] = SATURATING | fields["dynamics"]["rewards"]
    with pytest.raises(UserError, match=message):
        ra.PILCO(fields.pop("env"), **fields).learn(16)


def test_without_gpytorch_the_extra_is_named(monkeypatch):
    found = builtins.__import__

    def missing(name, *rest):
        if name.partition(".")[0] == "gpytorch":
            raise ImportError(f"No module named {name!r}")
        return found(name, *rest)

    monkeypatch.delitem(sys.modules, "gpytorch", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'rlamort\[gp\]'"):
        GaussianProcess(5, 1, REWARD)


@pytest.mark.parametrize("propagation", ["particles", "moments"])
def test_stopped_and_resumed_is_uninterrupted(propagation, tmp_path):
    fields = {**TINY, "propagation": propagation}
    env = fields.pop("env")
    whole = ra.PILCO(env, dir=str(tmp_path / "whole"), **fields).learn(32)
    broken = ra.PILCO(env, dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(32, stop=lambda: broken.clock.env_step >= 19)
    broken.close()
    torch.rand(3)
    again, exactness = resume(tmp_path / "broken")
    assert exactness == "exact"
    again.learn(32 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")
    assert int(whole.agent.dynamics.count) == 32


def test_other_methods_do_not_fit_processes():
    with pytest.raises(UserError, match=r"^dynamics=GaussianProcess: it does not say how .*; pilco fits it$"):
        ra.PETS("Pendulum-v1", dynamics={"kind": "gp", "rewards": "own"}, horizon=3, device="cpu").learn(8)


def test_rollouts_are_counted_until_the_task_is_solved(tmp_path):
    claim = next(one for one in entries("pilco") if isinstance(one, Rollouts))
    reward = Saturating(**{key: claim.overrides["dynamics"]["rewards"][key] for key in ("target", "weights")})
    x, y, paid = met(20)[:3]
    torch.testing.assert_close(reward(x, y, x), paid)  # equal reward: what it is trained on is what the environment pays
    hanging = claim.played(lambda x, deterministic: (np.zeros(1, np.float32), None))
    assert hanging["solved"] == 0
    assert hanging["cost"] == pytest.approx(claim.length * (1 - np.exp(-1)), rel=0.02)
    runs = [{"failed": 0, "rollouts": [{"solved": 0.0, "cost": 25.0}] * 3 + [{"solved": 1.0, "cost": 12.0}]}] * 10
    results = {claim.key(seed): run for seed, run in zip(claim.seeds, runs, strict=True)}
    assert {one.outcome for one in claim.judge(results)} == {"incomplete"}
    evaluations = [{"env_step": 400 * k, "eval/return": -25.0 if k < 21 else -11.0} for k in range(1, 40)]
    results |= {task.key: {"evaluations": evaluations} for task in claim.due(results)}
    assert [one.outcome for one in claim.judge(results)] == ["pass"] * 3  # 8,400 transitions are 52 times 160
    assert claim.panel(results) is not None
    results |= {claim.key(seed): {"failed": 1, "rollouts": [{"solved": 0.8, "cost": 13.0}] * 8} for seed in claim.seeds[:3]}
    unsolved = claim.judge(results)
    assert [one.outcome for one in unsolved] == ["FAIL", "FAIL", "FAIL"]  # (7 x 4 + 3 x 8) / 10 rollouts of 40 transitions
    assert "to a cost of 12.3, as a multiple of pilco's 208" in unsolved[-1].claim
    results[claim.key(claim.seeds[0])] = {"failed": 1, "rollouts": []}  # it broke at once: any cost will do
    assert "(400, 400, 400) to a cost of inf, as a multiple of pilco's 208" in claim.judge(results)[-1].claim


def test_policies_improve_in_the_model_alone():
    """Known dynamics: the model is not fitted, and gradient steps lower the cost that the environment pays."""
    fields = TINY | {"dynamics": "own", "policy_steps": 15, "particles": 10, "model": {"kind": "radial", "basis": 20}}
    learner = ra.PILCO(fields.pop("env"), **fields, learning_rate=0.05)
    learner.learn(8)
    starts = learner.agent.starts(learner.source).x
    before = learner.agent.f(learner.agent.model(starts), starts).mean()
    learner.learn(8, reset_num_timesteps=False)
    assert learner.agent.f(learner.agent.model(starts), starts).mean() < before
    assert learner.clock.metrics.keys() == {"actor/cost", "actor/diverged"}


def test_a_saved_policy_is_loaded_without_the_environment_it_was_trained_on(tmp_path):
    fields = {**TINY, "horizon": None}
    learner = ra.PILCO(fields.pop("env"), **fields)
    learner.save(tmp_path / "kept")
    again = ra.load(tmp_path / "kept")
    assert (again.agent.f.horizon, again.agent.fit_every) == (8, 8)
    x = np.array([0.1, 0, -1, 0, 0.2], np.float32)
    assert np.array_equal(learner.predict(x)[0], again.predict(x)[0])
