"""The iterative linear-quadratic regulator, over plans through differentiable dynamics.

x state (B, d) · u action (B, n), y in [-1, 1]^n · y plan (B, H n) · f minus the return · L step sizes of the line search
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlamort.adjoint import Carry, Equation, Linear, Step
from rlamort.config import Count, Positive
from rlamort.domain import Box, Domain
from rlamort.dynamics import Moved, Trajectory
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update
from rlamort.update.best import comparable

LEAST, MOST = 1e-6, 1e6  # of the regularisation mu; below the least it is 0, and the least is what the first rise gives


class Expansion(NamedTuple):
    """Dynamics to first order and cost to second order at each step of a plan; z = (x, u)."""

    jacobian: Tensor  # (H, B, d, d + n) of x_next with respect to z
    slope: Tensor  # (H, B, d + n) of the cost
    curvature: Tensor  # (H, B, d + n, d + n) of the cost, positive semidefinite
    end_slope: Tensor  # (B, d) of the cost of the last state
    end_curvature: Tensor  # (B, d, d)


class Policy(NamedTuple):
    """Changes of actions, alpha k + K (x - x_nominal), and the decrease of f that the model promises."""

    k: Tensor  # (H, B, n)
    K: Tensor  # (H, B, n, d)
    linear: Tensor  # (B,) the promise for alpha is alpha linear + alpha^2 / 2 quadratic
    quadratic: Tensor  # (B,)


class Ilqr(Update):
    """One iteration of iLQR within bounds of actions (Li and Todorov, 2004; Tassa, Mansard and Todorov, 2014: control-limited).

    The plan is followed, and its dynamics are linearised and its costs made quadratic along it. A backward pass gives each step
    a feedback law that keeps to its bounds, by projected Newton steps; a forward pass follows that law with all step sizes side
    by side, and each item takes its cheapest, or keeps its plan. mu, on the diagonal of the actions' curvature, falls where the
    model's promise was kept and rises where it was not, item by item. Negative curvature of a cost is set to 0.

    On a linear system with quadratic costs and no active bound it is the Riccati recursion. The oracle's f must be a
    `Trajectory` through differentiable dynamics; of an ensemble the mean is planned through. No gradient flows through it.

    Args:
        domain: [low, high]^(H n), a box.
        candidates: L, step sizes from 1 down to 0.001.
        mu: initial regularisation.

    Raises:
        UserError: Y is no box.
    """

    steps: Tensor

    def __init__(self, domain: Domain, candidates: Count = 10, mu: Positive = LEAST) -> None:
        super().__init__()
        if not isinstance(domain, Box):
            raise UserError(f"update=Ilqr: a box of plans is needed, and Y is of kind {type(domain).__name__}")
        self.domain, self.mu = domain, mu
        self.register_buffer("steps", torch.logspace(0, -3, candidates, dtype=torch.float64), persistent=False)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """mu, the rate at which it changes, and the number of iterations that found no better plan, each (B,)."""
        return y.new_full((len(y),), self.mu), y.new_ones(len(y)), y.new_zeros(len(y))

    @torch.no_grad()
    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        f, (mu, rate, rejected) = returns_of(oracle), h
        plan, low, high = (_steps(part, f.horizon) for part in (y, self.domain.low.to(y), self.domain.high.to(y)))
        states, cost = follow(f, oracle.x, plan)
        model = expand(f, states, plan)
        policy = backward(model, mu, low - plan, high - plan)
        steps = self.steps.to(y)
        tried, costs = self._search(f, states, plan, policy, steps, low, high)  # (H, L, B, n), (L, B)
        least, best = comparable(costs).min(0)
        better = least < comparable(cost)
        found = tried.gather(1, best[None, None, :, None].expand(len(tried), 1, -1, tried.shape[-1]))[:, 0]
        size = steps[best]
        promise = -(size * policy.linear + size.square() / 2 * policy.quadratic)
        kept = (cost - least) / promise.clamp(min=torch.finfo(y.dtype).tiny)
        falls, rises = better & ((kept > 0.5) | (size > 0.3)), ~better | (kept < 0.1) | (size < 0.06)
        mu, rate = _adapted(mu, rate, falls & ~rises, rises)
        plan = torch.where(better[:, None], found, plan)
        return plan.transpose(0, 1).reshape(len(y), -1), (mu, rate, rejected + (~better).to(y))

    def _search(
        self, f: Trajectory, states: Tensor, plan: Tensor, policy: Policy, steps: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Plans (H, L, B, n) of all step sizes under the feedback law, and their f (L, B)."""
        sizes, (horizon, count, _) = steps.view(-1, 1, 1), plan.shape
        x, path, actions = states[0].expand(len(steps), -1, -1), list[Moved](), []
        for t in range(horizon):
            moved = (policy.K[t] @ (x - states[t])[..., None])[..., 0]
            moved = torch.where(moved.isnan(), 0, moved)  # after an end
            u = torch.clamp(plan[t] + sizes * policy.k[t] + moved, low[t], high[t])  # (L, B, n)
            actions.append(u)
            path.append(f.dynamics(x.flatten(0, 1), u.flatten(0, 1)))
            x = path[-1].x_next.view_as(x)
        return torch.stack(actions), -f.total(path).view(len(steps), count)


class LinearQuadratic(Equation):
    """grad f(plan) = 0 in the actions that are free, by one linear-quadratic regulator around the plan (Amos et al., 2018).

    With `Implicit` losses differentiate through the plans of `Ilqr`, at the cost of one backward pass, whatever their number
    of iterations. Actions on their bounds whose slope points outwards stay there. The regulator's curvature is that of the
    Hamiltonian, second derivatives of the dynamics included, so that its system is the Hessian of f. f must be a `Trajectory`
    through differentiable dynamics with one future, and the plan a minimum.

    Args:
        domain: [low, high]^(H n), a box.
    """

    def __init__(self, domain: Box) -> None:
        self.domain = domain

    def residual(self, step: Step, y: Tensor, h: Carry) -> Tensor:
        return step.oracle.grad(y)

    def solve(self, step: Step, y: Tensor, residual: Tensor, adjoint: Linear, gradient: Tensor) -> Tensor:
        f, low, high = returns_of(step.oracle), self.domain.low.to(y), self.domain.high.to(y)
        held = ((y <= low) & (residual > 0)) | ((y >= high) & (residual < 0))
        plan, free, right = (_steps(part.detach(), f.horizon) for part in (y, ~held, gradient))
        with torch.no_grad():
            states, _ = follow(f, step.oracle.x, plan)
            return regulated(curved(f, states, plan), right, free).transpose(0, 1).reshape(y.shape)


def follow(f: Trajectory, x: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, d), actions (H, B, n) -> states (H + 1, B, d) and f (B,)."""
    path: list[Moved] = []
    for u in plan:
        path.append(f.dynamics(path[-1].x_next if path else x, u))
    return torch.stack([x, *(moved.x_next for moved in path)]), -f.total(path)


@torch.enable_grad()
def expand(f: Trajectory, states: Tensor, plan: Tensor) -> Expansion:
    """States (H + 1, B, d), actions (H, B, n) -> derivatives, by d + n + 1 + d backward passes over all steps at once."""
    (horizon, count, _), d = plan.shape, states.shape[-1]
    z = torch.cat([states[:-1], plan], -1).flatten(0, 1).detach().requires_grad_()  # (H B, d + n)
    x_next, reward, continues = f.dynamics(z[:, :d], z[:, d:])
    jacobian = torch.stack([_slope(x_next[:, i], z) for i in range(d)], 1)
    slope, curvature = _second_order(-reward, z)
    ends = continues.detach().view(horizon, count)
    before = torch.cat([torch.ones_like(ends[:1]), f.discount * ends]).cumprod(0)  # (H + 1, B), before each step
    weight, shape = before[:-1].flatten(), (horizon, count)
    tail = states.new_zeros(count, d), states.new_zeros(count, d, d)
    if f.tail is not None:
        last = states[-1].detach().requires_grad_()
        tail = _second_order(-f.tail(last), last)
    return Expansion(
        _weighed((weight > 0).to(z), jacobian).view(*shape, d, -1),
        _weighed(weight, slope).view(*shape, -1), _weighed(weight, curvature).view(*shape, *curvature.shape[1:]),
        _weighed(before[-1], tail[0]), _weighed(before[-1], tail[1]),
    )  # fmt: skip


@torch.enable_grad()
def curved(f: Trajectory, states: Tensor, plan: Tensor) -> Expansion:
    """As `expand`, with the whole curvature of the Hamiltonian at each step, of either sign."""
    model = expand(f, states, plan)
    (horizon, count, _), d = plan.shape, states.shape[-1]
    price = [model.end_slope]  # of a change of each state, last first
    for t in reversed(range(horizon)):
        price.append(model.slope[t, :, :d] + (model.jacobian[t, ..., :d].mT @ price[-1][..., None])[..., 0])
    z = torch.cat([states[:-1], plan], -1).flatten(0, 1).detach().requires_grad_()
    x_next, reward, continues = f.dynamics(z[:, :d], z[:, d:])
    before = (f.discount * continues.detach()).view(horizon, count).roll(1, 0)
    before[0] = 1
    weight = before.cumprod(0).flatten()
    along = _weighed((weight > 0).to(z), (torch.stack(price[-2::-1]).flatten(0, 1) * x_next).sum(-1))
    slope = _slope(_weighed(weight, -reward) + along, z, graph=True)
    rows = torch.stack([_slope(slope[:, i], z) for i in range(z.shape[-1])], 1)
    end = torch.zeros_like(model.end_curvature)
    if f.tail is not None:
        last = states[-1].detach().requires_grad_()
        slope = _slope(-f.tail(last), last, graph=True)
        weight = (f.discount * continues.detach()).view(horizon, count).prod(0)
        end = _weighed(weight, torch.stack([_slope(slope[:, i], last) for i in range(d)], 1))
    return model._replace(curvature=rows.view(model.curvature.shape), end_curvature=end)


def regulated(model: Expansion, right: Tensor, free: Tensor) -> Tensor:
    """v (H, B, n) with the Hessian of f times v = right in the free actions (H, B, n), and 0 in the others."""
    d, eye = model.end_slope.shape[-1], torch.eye(right.shape[-1], dtype=right.dtype, device=right.device)
    V, v, laws = model.end_curvature, torch.zeros_like(model.end_slope), []
    for t in reversed(range(len(right))):
        J = model.jacobian[t]
        Q, q = model.curvature[t] + J.mT @ V @ J, (J.mT @ v[..., None])[..., 0]
        Q_uu = torch.where(free[t][..., None] & free[t][..., None, :], Q[:, d:, d:], eye)
        wanted = torch.cat([(right[t] - q[:, d:])[..., None], -Q[:, d:, :d]], -1)
        law, _ = torch.linalg.solve_ex(Q_uu, torch.where(free[t][..., None], wanted, 0))
        k, K = law[..., 0], law[..., 1:]
        V, v = Q[:, :d, :d] + Q[:, :d, d:] @ K, q[:, :d] + (Q[:, :d, d:] @ k[..., None])[..., 0]
        laws.append((k, K))
    x, found = torch.zeros_like(v), []
    for t, (k, K) in enumerate(reversed(laws)):
        found.append(k + (K @ x[..., None])[..., 0])
        x = (model.jacobian[t] @ torch.cat([x, found[-1]], -1)[..., None])[..., 0]
    return torch.stack(found)


def backward(model: Expansion, mu: Tensor, low: Tensor, high: Tensor) -> Policy:
    """The feedback law that minimises the model, with changes of actions between low and high (H, B, n); mu (B,)."""
    horizon, _, d, _ = model.jacobian.shape
    V_x, V_xx = model.end_slope, model.end_curvature
    k, K, linear, quadratic = [], [], torch.zeros_like(mu), torch.zeros_like(mu)
    for t in reversed(range(horizon)):
        J = model.jacobian[t]
        Q_z = model.slope[t] + (J.mT @ V_x[..., None])[..., 0]
        Q_zz = model.curvature[t] + J.mT @ V_xx @ J
        Q_u, Q_uu, Q_ux = Q_z[:, d:], Q_zz[:, d:, d:], Q_zz[:, d:, :d]
        firm = Q_uu + torch.diag_embed(mu[:, None].expand_as(Q_u))
        change, free = bounded_minimum(firm, Q_u, low[t], high[t])
        gain = -solved(firm, Q_ux, free)
        k.append(change)
        K.append(gain)
        step = change[..., None]
        linear = linear + (Q_u * change).sum(-1)
        quadratic = quadratic + (step.mT @ Q_uu @ step)[:, 0, 0]
        V_x = Q_z[:, :d] + (gain.mT @ (Q_uu @ step + Q_u[..., None]) + Q_ux.mT @ step)[..., 0]
        V_xx = Q_zz[:, :d, :d] + gain.mT @ Q_uu @ gain + gain.mT @ Q_ux + Q_ux.mT @ gain
        V_xx = (V_xx + V_xx.mT) / 2
    return Policy(torch.stack(k[::-1]), torch.stack(K[::-1]), linear, quadratic)


def bounded_minimum(Q: Tensor, q: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """argmin over low <= u <= high of u' Q u / 2 + q' u, and which coordinates (B, n) are free there, by projected Newton.

    Q (B, n, n) is positive definite; q, low, high (B, n). Every iteration takes the cheapest of Newton steps of several sizes,
    gradient steps, without which a Newton step that leaves the box at once would stay for good, and none.
    """
    u, n = torch.zeros_like(q).clamp(low, high), q.shape[-1]
    sizes = 0.5 ** torch.arange(8, dtype=q.dtype, device=q.device).view(-1, 1, 1)
    rates = q.new_tensor([1.0, 4.0]).view(-1, 1, 1) / Q.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    for _ in range(2 * n + 2 if n > 1 else 1):  # of one coordinate the first is exact
        slope = q + (Q @ u[..., None])[..., 0]
        free = ~(((u <= low) & (slope > 0)) | ((u >= high) & (slope < 0)))
        newton = -solved(Q, slope[..., None], free)[..., 0]
        tried = torch.cat([u[None], (u + sizes * newton).clamp(low, high), (u - rates * slope).clamp(low, high)])
        values = ((0.5 * (Q @ tried[..., None])[..., 0] + q) * tried).sum(-1)
        u = tried.gather(0, values.argmin(0)[None, :, None].expand(1, -1, n))[0]
    slope = q + (Q @ u[..., None])[..., 0]
    return u, ~(((u <= low) & (slope > 0)) | ((u >= high) & (slope < 0)))


def solved(Q: Tensor, right: Tensor, free: Tensor) -> Tensor:
    """Q_ff^-1 right_f in the free coordinates (B, n), and 0 in the others; right (B, n, m)."""
    both = free[..., None] & free[..., None, :]
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    factor, _ = torch.linalg.cholesky_ex(torch.where(both, Q, eye))
    return torch.cholesky_solve(torch.where(free[..., None], right, 0), factor)


def _steps(y: Tensor, horizon: int) -> Tensor:
    """(B, H n) or (H n,) -> (H, B, n) or (H, 1, n)."""
    return y.reshape(-1, horizon, y.shape[-1] // horizon).transpose(0, 1)


def returns_of(oracle: Oracle) -> Trajectory:
    """The return that an oracle answers for. Raises UserError if its f is another."""
    if not isinstance(oracle.f, Trajectory):
        raise UserError("update: it plans through dynamics, and this f is no return of a plan; method mpc has one")
    return oracle.f


def _second_order(cost: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """cost (M,) of z (M, m) -> slope (M, m), and curvature (M, m, m) without its negative part."""
    slope = _slope(cost, z, graph=True)
    rows = [_slope(slope[:, i], z) for i in range(z.shape[-1])]
    curvature = torch.stack(rows, 1)
    broken = ~curvature.isfinite().flatten(1).all(-1)
    curvature = torch.where(broken[:, None, None], 0, (curvature + curvature.mT) / 2)
    values, vectors = torch.linalg.eigh(curvature)
    return slope.detach(), (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT


def _slope(value: Tensor, z: Tensor, graph: bool = False) -> Tensor:
    """d value (M,) / d z (M, m), zero where it does not depend on z."""
    if not value.requires_grad:
        return torch.zeros_like(z)
    (slope,) = torch.autograd.grad(
        value.sum(), z, retain_graph=True, create_graph=graph, allow_unused=True, materialize_grads=True
    )
    return slope


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """weight (M,) times value (M, ...), 0 where the weight is."""
    weight = weight.view(-1, *[1] * (value.dim() - 1))
    return torch.where(weight > 0, weight * value, 0)


def _adapted(mu: Tensor, rate: Tensor, falls: Tensor, rises: Tensor) -> tuple[Tensor, Tensor]:
    """mu and its rate after an iteration: both double where it rises and halve where it falls; at a turn the rate is 1."""
    rate = torch.where(rises, (2 * rate).clamp(min=2), torch.where(falls, (rate / 2).clamp(max=0.5), rate))
    moved = torch.where(rises, (mu * rate).clamp(LEAST, MOST), torch.where(falls, mu * rate, mu))
    return torch.where(moved < LEAST, 0, moved), rate
