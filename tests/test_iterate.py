"""A solver as an environment and a policy as a solver: the law that they are one, on ADMM for box-constrained QPs."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from scipy import optimize
from stable_baselines3 import PPO
from torch import Tensor, nn

from rlamort.domain import Box, Euclid
from rlamort.env.iterate import IterateEnv, decrease, unsolved
from rlamort.env.native import NativeEnv, NativeVectorEnv
from rlamort.errors import Diverged, Fault, UserError
from rlamort.model import Expert, Unroll
from rlamort.nets import mlp
from rlamort.objective import Cost
from rlamort.problem import Problem
from rlamort.update.parametric import Controlled, Fold, ParametricStep

N = 4


class QP(Problem):
    """min 0.5 y'Py + q'y over [-1, 1]^n."""

    domain = Box([-1.0] * N, [1.0] * N)
    convex = True

    def contexts(self, count):
        root = torch.randn(count, N, N)
        return {"P": root @ root.mT / N + 0.1 * torch.eye(N), "q": 2 * torch.randn(count, N)}

    def cost(self, y, x):
        return 0.5 * torch.einsum("bi,bij,bj->b", y, x["P"], y) + (x["q"] * y).sum(-1)

    def residual(self, y, x):
        """|y - clip(y - grad f(y))|, largest coordinate: zero where y is optimal."""
        slope = torch.einsum("bij,bj->bi", x["P"], y) + x["q"]
        return (y - (y - slope).clamp(-1, 1)).abs().amax(-1)


class Admm(ParametricStep):
    """OSQP's iteration with A = I (Stellato et al., 2020, algorithm 1), a penalty rho per constraint, or one for all."""

    inputs, outputs = 3, 1

    def __init__(self, problem: Problem, decisions: int) -> None:
        super().__init__()
        self.layout, self.decisions = problem.layout, decisions

    def start(self, y, x):
        return torch.zeros_like(y), torch.zeros_like(y)  # the dual, and the unclipped primal

    def features(self, y, h, x, oracle):
        dual, primal = h
        phi = torch.stack([torch.minimum(y + 1, 1 - y), dual.tanh(), (primal - y).tanh()], dim=-1)  # (B, N, 3)
        return phi if self.decisions == N else phi.mean(1, keepdim=True)

    def forward(self, u, y, h, x, oracle):
        (dual, _), x = h, self.layout.unpack(x)
        rho = torch.pow(10.0, 2 * u[..., 0]).expand(-1, N)
        system = x["P"] + torch.diag_embed(rho)
        primal = torch.linalg.solve(system, rho * y - dual - x["q"])
        y_next = (primal + dual / rho).clamp(-1, 1)
        return y_next, (dual + rho * (primal - y_next), primal)


class Zeros(nn.Module):
    def __init__(self, sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.sizes)


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def policy_of(device) -> nn.Module:
    return nn.Sequential(mlp(3, [8], 1), nn.Tanh()).to(device)


def made(decisions=N, **keywords):
    problem = QP().double() if torch.get_default_dtype() is torch.float64 else QP()
    keywords = {"horizon": 1000, "tol": 0.0, "instances": 3, **keywords}
    return IterateEnv(problem, Admm(problem, decisions), Zeros(N), **keywords)


@pytest.mark.parametrize("decisions", [1, N])
@pytest.mark.parametrize("reward", [unsolved, decrease])
def test_rolling_a_policy_is_unrolling_it_as_a_solver(decisions, reward, device, float64):
    """Law: IterateEnv under a policy = Unroll(Controlled(policy)), bit for bit, whether one decision is made or N are."""
    env, policy = made(decisions, reward=reward, device=device), policy_of(device)
    env.reset(0)
    solver = Unroll(Expert(Zeros(N)), Controlled(policy, env.solver), 12, env.problem.domain)
    with torch.no_grad():
        iterates = solver.iterates(env.solving, Cost(env.problem).oracle(env.solving))
        rolled = [env.y]
        for _ in range(12):
            env.step(policy(env.x))
            rolled.append(env.y)
    assert torch.equal(iterates, torch.stack(rolled))
    assert (iterates.diff(dim=0).abs().amax((1, 2)) > 0).all()


def test_episodes_that_end_on_the_way_leave_the_iterates_of_the_others_as_they_are(device, float64):
    """Up to its end, every instance's episode is what the solver does for it alone."""
    env, policy = made(tol=1e-3, instances=6, device=device), policy_of(device)
    env.reset(1)
    solver = Unroll(Expert(Zeros(N)), Controlled(policy, env.solver), 60, env.problem.domain)
    with torch.no_grad():
        begun, lengths, ended = env.solving, np.zeros(6, dtype=int), np.zeros(6, dtype=bool)
        for _ in range(60):
            step = env.step(policy(env.x))
            lengths += ~ended
            ended |= step.terminated.reshape(6, N).any(1)
        assert ended.all()
        assert len(set(lengths.tolist())) > 1
        for i in range(6):
            alone = solver.iterates(begun[i : i + 1], env.f.oracle(begun[i : i + 1]))[: lengths[i] + 1]
            residual = torch.stack([env.problem.residual(y, env.problem.layout.unpack(begun[i : i + 1]))[0] for y in alone])
            assert (residual[1:-1] >= 1e-3).all()
            assert residual[-1] < 1e-3
    assert not torch.equal(begun, env.solving)


def test_the_solver_steered_by_any_policy_finds_the_solution(float64):
    """ADMM converges for any fixed rho: to what scipy finds."""
    env = made()
    x = env.problem.contexts(3)
    rows = env.problem.layout.pack(x)
    solver = Unroll(Expert(Zeros(N)), Controlled(lambda phi: torch.zeros(len(phi), 1), env.solver), 200, env.problem.domain)
    y = solver(rows, env.f.oracle(rows))
    for i in range(3):
        P, q = x["P"][i].numpy(), x["q"][i].numpy()
        best = optimize.minimize(lambda z, p=P, q=q: (z @ p @ z / 2 + q @ z, p @ z + q), np.zeros(N), jac=True,
                                 bounds=[(-1, 1)] * N, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 1e-15})  # fmt: skip
        np.testing.assert_allclose(y[i].numpy(), best.x, atol=1e-6)


@pytest.mark.parametrize("decisions", [1, N])
def test_an_item_is_solved_alike_whatever_its_neighbours(decisions, float64):
    env = made(decisions)
    solver = Unroll(Expert(Zeros(N)), Controlled(policy_of("cpu"), env.solver), 8, env.problem.domain)
    x = env.problem.layout.pack(env.problem.contexts(4))
    with torch.no_grad():
        together = solver(x, env.f.oracle(x))
        alone = torch.cat([solver(row[None], env.f.oracle(row[None])) for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_losses_reach_the_policy_through_the_solver(float64):
    """Trained by unrolling instead: the policy's gradient is that of finite differences."""
    env, policy = made(), policy_of("cpu")
    x = env.problem.layout.pack(env.problem.contexts(2))
    solver = Unroll(Expert(Zeros(N)), Controlled(policy, env.solver), 3, env.problem.domain)
    parameters = dict(solver.named_parameters())
    assert {id(p) for p in policy.parameters()} == {id(p) for p in parameters.values()}

    def loss():
        return env.f(solver(x, env.f.oracle(x)), x).sum()

    slope = torch.autograd.grad(loss(), list(policy.parameters()))[1]
    bias = policy[0][0].bias
    for i in range(3):
        step = torch.zeros_like(bias)
        step[i] = 1e-6
        with torch.no_grad():
            bias += step
            up = loss()
            bias -= 2 * step
            down = loss()
            bias += step
        assert slope[i].item() == pytest.approx((up - down).item() / 2e-6, rel=1e-4, abs=1e-8)


def test_a_fold_keeps_every_decision_with_its_item():
    fold, phi = Fold(3), torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(fold.rows(phi)[4], phi[1, 1])
    assert torch.equal(fold.items(fold.rows(phi)), phi)
    assert fold.shared(torch.tensor([1.0, 2.0])).tolist() == [1, 1, 1, 2, 2, 2]


def test_rewards_count_steps_or_add_up_to_what_the_cost_lost(device, float64):
    for reward in (unsolved, decrease):
        env = made(tol=1e-4, reward=reward, horizon=200, instances=4, device=device)
        env.reset(0)
        x, begun = env.solving, env.f(env.y, env.solving)
        total, running, last = np.zeros(4), np.ones(4, dtype=bool), [None] * 4
        while running.any():
            y_before = env.y
            solved_at = env.solver(torch.zeros(4, N, 1, device=device), y_before, env.h, env.solving, env.f.oracle(env.solving))
            step = env.step(torch.zeros(4 * N, 1, device=device))
            for i in np.flatnonzero(running):
                total[i] += step.reward[i * N].item()
                if step.terminated[i * N]:
                    last[i] = env.problem.domain.nearest(solved_at[0])[i]
            assert (step.reward.reshape(4, N) == step.reward.reshape(4, N)[:, :1]).all()
            running &= ~step.terminated.reshape(4, N)[:, 0]
        episodes = env.episodes()
        first = sorted(episodes, key=lambda e: e.length)[0]
        if reward is unsolved:
            assert first.total == -(first.length - 1)
            assert -total.max() == first.length - 1
        else:
            lost = (begun - env.f(torch.stack(last), x)).numpy(force=True)
            np.testing.assert_allclose(total, lost, atol=1e-12)


def test_an_episode_that_is_not_solved_is_truncated_at_the_horizon():
    env = made(horizon=5)
    env.reset(0)
    flags = [env.step(torch.zeros(3 * N, 1)) for _ in range(10)]
    assert [bool(step.truncated.all()) for step in flags] == [False] * 4 + [True] + [False] * 4 + [True]
    assert not any(step.terminated.any() for step in flags)
    assert env.episodes() == [(-5, 5)] * 6


def test_the_successor_is_the_true_one_where_an_episode_ends():
    """Features of the last iterate in x_next; those of the next instance's first in x."""
    env = made(horizon=1)
    env.reset(0)
    y, h, x = env.y, env.h, env.solving
    step = env.step(torch.zeros(3 * N, 1))
    y, h = env.solver(torch.zeros(3, N, 1), y, h, x, env.f.oracle(x))
    assert torch.equal(step.x_next, Fold(N).rows(env.solver.features(y, h, x, env.f.oracle(x))))
    fresh = env.solver.features(env.y, env.h, env.solving, env.f.oracle(env.solving))
    assert torch.equal(env.x, Fold(N).rows(fresh))
    assert torch.equal(env.y, torch.zeros(3, N))
    assert not torch.equal(env.solving, x)


def test_a_restored_environment_goes_on_bit_for_bit(device):
    def play(env, steps):
        return torch.stack([env.step(env.x[:, :1].tanh()).x_next for _ in range(steps)])

    env = made(horizon=7, tol=1e-3, device=device)
    env.reset(3)
    play(env, 10)
    state = env.state()
    other = made(horizon=7, tol=1e-3, device=device)
    assert other.restore(state)
    assert torch.equal(play(env, 10), play(other, 10))
    assert env.episodes() == other.episodes() != []


def test_gymnasium_and_sb3_take_a_solver_for_an_environment():
    check_env(NativeEnv(made(1, horizon=5, instances=1)), skip_render_check=True)
    rows = NativeVectorEnv(made(horizon=5, tol=1e-2))
    assert rows.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert rows.reset(seed=0)[0].shape == (3 * N, 3)
    model = PPO("MlpPolicy", gymnasium.wrappers.Autoreset(NativeEnv(made(1, horizon=5, instances=1))), n_steps=32,
                batch_size=32, n_epochs=1, seed=0, device="cpu")  # fmt: skip
    model.learn(64)

    def policy(phi: Tensor) -> Tensor:
        return torch.from_numpy(model.predict(phi.numpy(), deterministic=True)[0])

    env = made(1)
    x = env.problem.layout.pack(env.problem.contexts(5))
    y = Unroll(Expert(Zeros(N)), Controlled(policy, env.solver), 300, env.problem.domain)(x, env.f.oracle(x))
    assert env.problem.residual(y, env.problem.layout.unpack(x)).max() < 1e-3


class NoResidual(QP):
    residual = Problem.residual


class Explodes(Admm):
    def forward(self, u, y, h, x, oracle):
        y, h = super().forward(u, y, h, x, oracle)
        return torch.where(u[:, 0] > 0.5, math.nan, y), h


def test_what_does_not_fit_is_named():
    problem = NoResidual()
    with pytest.raises(UserError, match=r"NoResidual.residual: it is not defined"):
        IterateEnv(problem, Admm(problem, N), Zeros(N), horizon=3, tol=0.1)
    with pytest.raises(UserError, match="horizon=0: 1 or more is needed"):
        made(horizon=0)
    problem = QP()
    problem.domain = Euclid(N + 1)
    env = IterateEnv(problem, Admm(problem, N), Zeros(N + 1), horizon=3, tol=0.1)
    with pytest.raises(UserError, match=r"Admm.features: shape \(1, 5, 3\) is returned; .* \(1, 4, 3\), is needed"):
        env.reset(0)


def test_an_iterate_that_explodes_ends_alone(device):
    problem = QP()
    env = IterateEnv(problem, Explodes(problem, N), Zeros(N), horizon=9, tol=0.0, instances=3, device=device, max_faults=1)
    env.reset(0)
    u = torch.zeros(3 * N, 1, device=device)
    u[N : 2 * N] = 1
    with pytest.warns(UserWarning, match="QP, step 0, item 1: its iterate is no longer finite"):
        step = env.step(u)
    assert step.valid.reshape(3, N).tolist() == [[True] * N, [False] * N, [True] * N]
    assert step.x_next.isfinite().all()
    assert env.x.isfinite().all()
    assert env._length.tolist() == [1, 0, 1]
    with pytest.raises(Fault, match="failure 2"):
        env.step(u)
    with pytest.raises(Diverged, match="the policy's parameters are not finite"):
        env.step(u * math.nan)
