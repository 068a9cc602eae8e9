"""Linear-quadratic control: closed forms, iLQR against them, and bounds."""

import itertools

import numpy as np
import pytest
import torch
from rlamort.envs.cartpole import CartPole
from rlamort.envs.lqr import Lqr
from scipy.linalg import solve_discrete_are
from scipy.optimize import minimize

from rlamort.adjoint import Implicit
from rlamort.domain import Box, unit_box
from rlamort.dynamics import Known, Trajectory
from rlamort.errors import UserError
from rlamort.model import Expert, Unroll
from rlamort.objective import Objective, Oracle
from rlamort.update import Adam, Ilqr, LinearQuadratic, MultipleShooting
from rlamort.update.ilqr import bounded_minimum

H = 12


def system(bound=20.0, seed=None):
    """A drawn linear system, or the point mass."""
    if seed is None:
        return Lqr(bound=bound)
    drawn = np.random.default_rng(seed)
    A, B = drawn.normal(0, 0.5, (3, 3)), drawn.normal(0, 1, (3, 2))
    Q, R = (part @ part.T for part in (drawn.normal(size=(3, 3)), drawn.normal(size=(2, 2))))
    return Lqr(A, B, Q, R + 0.1 * np.eye(2), bound)


def returns(env, horizon=H, discount=1.0, tail=None):
    bound = torch.as_tensor(env.action_space.high, dtype=torch.float64)
    return Trajectory(Known(env.dynamics, Box(-bound, bound).double(), "test"), horizon, discount, tail)


def states(env, count=4):
    torch.manual_seed(0)
    return 2 * torch.rand(count, len(env.x), dtype=torch.float64) - 1


def solved(f, x, y, iterations, domain=None):
    domain = (domain or unit_box(y.shape[-1])).double()
    return Unroll(Expert(lambda x: y), Ilqr(domain), iterations, domain)(x, f.oracle(x))


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_ilqr_is_riccati_on_linear_systems(seed, discount):
    env = system(seed=seed)
    x, f = states(env), returns(env, discount=discount)
    best = env.plan(x, H, discount) / env.action_space.high[0].item()
    assert best.abs().max() < 0.9  # so that bounds do not matter
    found = solved(f, x, torch.zeros_like(best), 3)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-8)
    cost = torch.einsum("bi,ij,bj->b", x, env.riccati(H, discount).costs[0], x)
    torch.testing.assert_close(f(found, x), cost)


@pytest.mark.parametrize("seed", [None, 1])
def test_the_recursion_converges_to_the_discrete_algebraic_riccati_equation(seed):
    env = system(seed=seed)
    P = env.stationary()
    torch.testing.assert_close(P, torch.tensor(solve_discrete_are(env.A, env.B, env.Q, env.R)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(env.riccati(5, tail=P).costs, P.expand(6, -1, -1), rtol=1e-9, atol=1e-9)


def test_a_shifted_optimal_plan_is_optimal_from_the_next_state():
    """Alone for one step fewer; with the feedback action behind it for as many, if the cost of all later steps is known."""
    env = system()
    P, bound = env.stationary(), env.action_space.high[0].item()
    x = states(env)
    plan = env.plan(x, H, tail=P)
    x_next = env.dynamics(x, plan[:, :2])[0]
    torch.testing.assert_close(plan[:, 2:], env.plan(x_next, H - 1, tail=P), rtol=0, atol=1e-9)
    end = x
    for u in plan.view(len(x), H, 2).unbind(1):
        end = env.dynamics(end, u)[0]
    shifted = torch.cat([plan[:, 2:], -end @ env.riccati(1, tail=P).gains[0].mT], -1) / bound
    f = returns(env, tail=lambda x: -torch.einsum("bi,ij,bj->b", x, P, x))
    torch.testing.assert_close(solved(f, x_next, shifted, 1), shifted, rtol=0, atol=1e-7)
    warm = torch.cat([plan[:, 2:], plan[:, -2:]], -1) / bound  # as planners shift: one iteration finds the last action
    torch.testing.assert_close(solved(f, x_next, warm, 2), shifted, rtol=0, atol=1e-7)


def test_bounds_are_kept_and_the_minimum_within_them_is_found():
    """Against L-BFGS-B on the same convex cost."""
    env = system(bound=1.5)
    x, f = states(env), returns(env)
    found = solved(f, x, torch.zeros(4, H * 2, dtype=torch.float64), 25)
    assert found.abs().max() == 1
    assert (found.abs() == 1).double().mean() > 0.05
    for one, y in zip(x, found, strict=True):

        def cost(plan, one=one):
            at = torch.tensor(plan, dtype=torch.float64, requires_grad=True)
            value = f(at[None], one[None])
            return value.item(), torch.autograd.grad(value, at)[0].numpy()

        best = minimize(cost, np.zeros(H * 2), jac=True, bounds=[(-1, 1)] * H * 2, method="L-BFGS-B", options={"ftol": 1e-15})
        assert f(y[None], one[None]).item() < best.fun + 1e-7 * abs(best.fun)


def test_quadratic_programs_in_boxes_are_solved():
    """Against every choice of active bounds."""
    torch.manual_seed(0)
    for n in (1, 2, 3):
        root, q = torch.randn(40, n, n, dtype=torch.float64), 2 * torch.randn(40, n, dtype=torch.float64)
        Q = root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)
        low, high = -torch.rand(40, n, dtype=torch.float64), torch.rand(40, n, dtype=torch.float64)
        u, free = bounded_minimum(Q, q, low, high)
        value = 0.5 * (u[:, None] @ Q @ u[..., None])[:, 0, 0] + (q * u).sum(-1)
        least = torch.full_like(value, torch.inf)
        for choice in itertools.product((-1, 0, 1), repeat=n):
            held = torch.tensor(choice) != 0
            at = torch.where(torch.tensor(choice) > 0, high, low) * held
            if not held.all():
                rest = -(q + (Q @ at[..., None])[..., 0])[:, ~held]
                at[:, ~held] = torch.linalg.solve(Q[:, ~held][:, :, ~held], rest)
            inside = ((at >= low - 1e-12) & (at <= high + 1e-12)).all(-1)
            cost = 0.5 * (at[:, None] @ Q @ at[..., None])[:, 0, 0] + (q * at).sum(-1)
            least = torch.where(inside, torch.minimum(least, cost), least)
        torch.testing.assert_close(value, least, rtol=1e-9, atol=1e-9)
        assert (free | (u == low) | (u == high)).all()


def test_no_iteration_is_worse_and_no_item_depends_on_another():
    env = CartPole(angle=3.0)
    env.reset(seed=0)
    x = torch.tensor(np.stack([env.begin() for _ in range(3)]))
    f, domain = returns(env, 20), unit_box(20).double()
    y = 0.1 * torch.randn(3, 20, dtype=torch.float64)
    update, oracle = Ilqr(domain), f.oracle(x)
    h, costs = update.start(y, x, oracle), [f(y, x)]
    together = solved(f, x, y, 8)
    for _ in range(8):
        y, h = update(y, h, x, oracle)
        costs.append(f(y, x))
    path = torch.stack(costs)
    assert (path[1:] <= path[:-1] + 1e-9).all()
    assert (path[-1] < path[0] - 0.1).all()
    torch.testing.assert_close(together, y)
    torch.testing.assert_close(solved(f, x[1:2], 0 * y[1:2], 5), solved(f, x, 0 * y, 5)[1:2], rtol=1e-8, atol=1e-8)


def test_what_follows_an_end_neither_counts_nor_is_differentiated():
    """A point that is pushed until it passes 1, where rewards and states become NaN."""

    def step(x, u):
        over = x[:, 0] > 1
        x_next = torch.where(over[:, None], torch.nan, x + u)
        return x_next, torch.where(over, torch.nan, -(u[:, 0] - 0.6).square()), 1 - (x_next[:, 0] > 1).to(x)

    f = Trajectory(Known(step, Box([-1.0], [1.0]).double(), "test"), 5)
    x = torch.zeros(2, 1, dtype=torch.float64)
    found = solved(f, x, torch.zeros(2, 5, dtype=torch.float64), 6)
    assert found.isfinite().all()
    assert (f(found, x) < f(torch.zeros_like(found), x)).all()
    assert (f(found, x) < 1e-6).all()


def test_costs_that_are_not_symmetric_are_those_of_their_symmetric_part():
    A, B, Q, R = [[1, 0.1], [0, 1]], np.eye(2), np.array([[1, 1.9], [0, 1]]), np.array([[0.1, 0.15], [0, 0.1]])
    skew, even = Lqr(A, B, Q, R), Lqr(A, B, (Q + Q.T) / 2, (R + R.T) / 2)
    x = states(even)
    assert torch.equal(skew.riccati(20).costs, even.riccati(20).costs)
    assert torch.equal(skew.plan(x, 20), even.plan(x, 20))
    torch.testing.assert_close(skew.dynamics(x, x)[1], -((x @ torch.tensor(Q + R)) * x).sum(-1))
    returned = returns(skew, 20)(skew.plan(x, 20) / 20, x)  # in units of its bound
    torch.testing.assert_close(returned, ((x @ skew.riccati(20).costs[0]) * x).sum(-1))


def test_ill_conditioned_systems_are_regularised_and_counted():
    env = Lqr([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]], Q=np.eye(2), R=np.zeros((2, 2)))
    found = env.riccati(4)
    assert found.regularised == 4
    assert found.gains.isfinite().all()
    assert found.gains.abs().max() < 1.1
    assert system(seed=1).riccati(4).regularised == 0
    x = states(env)
    plan = solved(returns(env, 4), x, torch.zeros(4, 8, dtype=torch.float64), 6)
    assert plan.isfinite().all()
    assert (returns(env, 4)(plan, x) < (4 * x[:, 1].square() + x[:, 0].square()) * (1 + 1e-6)).all()  # what no action changes


class Bowl(Objective):
    def report(self, y, x):
        return y.square().sum(-1), {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lqr([[1.0]], [[1.0], [2.0]]), r"Lqr.A: shapes \(1, 1\) of A and \(2, 1\) of B; "),
        (lambda: Lqr(R=[[1.0, 0.0], [0.0, -1.0]]), r"Lqr.R: a matrix of shape \(2, 2\) is given; .* positive semidefinite"),
        (lambda: Lqr([[2.0]], [[0.0]], [[1.0]], [[1.0]]).stationary(), "costs without bound"),
        (lambda: Ilqr(unit_box(2))(torch.zeros(1, 2), (), torch.zeros(1, 1), Oracle(Bowl(), torch.zeros(1, 1))), "no return"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()


def swinging(theta, discount=0.95):
    """A point in waves that two actions push, one of which the waves turn; of its own parameters, with a tail."""

    def step(x, u):
        push = theta[0] * x[:, 0].sin() + u[:, 0] + 0.5 * u[:, 1] * x[:, 0].cos()
        cost = theta[1] * (x[:, 0] - 1).square() + 0.1 * x[:, 1].square() + 0.1 * u.square().sum(-1) + 0.02 * u[:, 0] * x[:, 1]
        x = torch.stack([x[:, 0] + 0.2 * x[:, 1], x[:, 1] + 0.3 * push], -1)
        return x, -cost, torch.ones_like(cost)

    def tail(x):
        return -2 * theta[1] * (1 - (x[:, 0] - 1).cos())

    return Trajectory(Known(step, Box([-1.0] * 2, [1.0] * 2).double(), "test"), 4, discount, tail)


def test_losses_differentiate_through_plans_within_bounds():
    """With respect to dynamics, costs and the first state: finite differences of plans that are solved anew."""
    torch.manual_seed(0)
    domain = unit_box(8).double()

    def plan(theta, x, y, iterations, adjoint=None):
        f = swinging(theta)
        return Unroll(Expert(lambda x: y), Ilqr(domain), iterations, domain, adjoint)(x, f.oracle(x))

    theta = torch.tensor([1.5, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        begun = plan(theta, x, torch.zeros(3, 8, dtype=torch.float64), 40)
    found = plan(theta, x, begun, 1, Implicit(LinearQuadratic(domain)))
    assert 0.2 < (found.abs() == 1).double().mean() < 0.8
    weight = torch.randn_like(found)
    slopes = torch.autograd.grad((weight * found).sum(), [theta, x])
    moves, ends = (torch.randn_like(theta), torch.randn_like(x)), []
    with torch.no_grad():
        for h in (1e-3, -1e-3):  # descent ends where f, not its slope, is exact: 1e-8 from the plan
            ends.append((weight * plan(theta + h * moves[0], x + h * moves[1], begun, 20)).sum().item())
    slope = sum((one * move).sum().item() for one, move in zip(slopes, moves, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-4)


def test_multiple_shooting_of_one_segment_is_adam():
    env = system(bound=2.0)
    x, f, domain = states(env), returns(env, discount=0.9, tail=lambda x: -x.square().sum(-1)), unit_box(2 * H).double()
    torch.manual_seed(0)
    begun = torch.rand(4, 2 * H, dtype=torch.float64)
    ours, theirs = (
        Unroll(Expert(lambda x: begun), update, 5, domain)(x, f.oracle(x))
        for update in (MultipleShooting(domain, 1, 0.1), Adam(0.1))
    )
    torch.testing.assert_close(ours, theirs)


def test_segments_cost_what_the_plan_costs_and_their_gaps_close():
    env = system()
    x, f, domain = states(env), returns(env, discount=0.9, tail=lambda x: -x.square().sum(-1)), unit_box(2 * H).double()
    update, oracle = MultipleShooting(domain, 4), f.oracle(x)
    y = 0.1 * torch.rand(4, 2 * H, dtype=torch.float64)
    h = update.start(y, x, oracle)
    cost, gaps = update.followed(f, y, torch.cat([x[:, None], h[0]], 1))
    torch.testing.assert_close(cost, f(y, x))
    assert gaps.abs().max() == 0
    largest = 0.0
    for _ in range(200):
        y, h = update(y, h, x, oracle)
        largest = max(largest, update.followed(f, y, torch.cat([x[:, None], h[0]], 1))[1].abs().max().item())
    assert update.followed(f, y, torch.cat([x[:, None], h[0]], 1))[1].abs().max() < 0.2 * largest
    best = env.plan(x, H, 0.9, tail=torch.eye(4)) / env.action_space.high[0].item()
    assert (f(y, x) < 1.005 * f(best, x)).all()


def test_segments_divide_a_plan():
    env = system()
    x, f = states(env), returns(env)
    with pytest.raises(UserError, match=r"update\.segments: 5 given; a divisor of the 12 actions"):
        MultipleShooting(unit_box(24), 5).start(torch.zeros(4, 24, dtype=torch.float64), x, f.oracle(x))
