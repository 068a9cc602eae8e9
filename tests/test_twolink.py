"""The arm of two links: its equations of motion against Lagrange's, and iLQR on it."""

import casadi
import numpy as np
import torch
from rlamort.envs.twolink import LENGTH, MASS, TwoLink
from torch.autograd.functional import hessian, jacobian, jvp

from rlamort.domain import Box, unit_box
from rlamort.dynamics import Known, Trajectory
from rlamort.measure.claims import planning
from rlamort.model import Expert, Unroll
from rlamort.update import Ilqr


def kinetic(q, w):
    """The energy of 2,000 pieces of each link, by the derivative of their places."""
    share = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000

    def places(q):
        slope = q.cumsum(0)
        direction = torch.stack([slope.cos(), slope.sin()], -1)  # (2, 2)
        upper, lower = (length * share[:, None] * one for length, one in zip(LENGTH, direction, strict=True))
        return torch.stack([upper, LENGTH[0] * direction[0] + lower])

    velocity = jvp(places, q, w, create_graph=True)[1]
    return sum(mass * one.square().sum(-1).mean() / 2 for mass, one in zip(MASS, velocity, strict=True))


def test_it_moves_as_lagrange_says():
    torch.manual_seed(0)
    env = TwoLink(damping=0.3)
    q, w, u = torch.randn(3, 2, dtype=torch.float64)
    acceleration = env.acceleration(q[None], w[None], u[None])[0]
    inertia = hessian(lambda w: kinetic(q, w), w)
    momentum = jacobian(lambda q: jacobian(lambda w: kinetic(q, w), w, create_graph=True), q)
    force = inertia @ acceleration + momentum @ w - jacobian(lambda q: kinetic(q, w), q)
    torch.testing.assert_close(force, u - 0.3 * w, rtol=1e-5, atol=1e-5)


def test_its_hand_is_where_its_links_end():
    q = torch.tensor([[0.0, 0.0], [np.pi / 2, 0.0], [0.0, np.pi / 2]])
    torch.testing.assert_close(TwoLink.hand(q), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), rtol=0, atol=1e-6)


def test_ilqr_brings_the_hand_nearer():
    env = TwoLink()
    env.reset(seed=0)
    x = torch.tensor(np.stack([env.begin() for _ in range(8)]))
    assert (torch.linalg.vector_norm(x[:, 4:], dim=-1) <= sum(LENGTH) + 1e-6).all()
    f, domain = Trajectory(Known(env.dynamics, Box([-2.0] * 2, [2.0] * 2).double(), "arm"), 20), unit_box(40).double()
    still = torch.zeros(8, 40, dtype=torch.float64)
    plan = Unroll(Expert(lambda x: still), Ilqr(domain), 6, domain)(x, f.oracle(x))
    assert (f(plan, x) <= f(still, x)).all()
    assert f(plan, x).mean() < 0.6 * f(still, x).mean()


def test_the_equations_that_ipopt_gets_are_the_arm_s():
    x, u = 2 * torch.rand(5, 6, dtype=torch.float64) - 1, 2 * torch.rand(5, 2, dtype=torch.float64) - 1
    x_next, reward, _ = TwoLink().dynamics(x, u)
    for one, torque, moved, paid in zip(x.tolist(), u.tolist(), x_next, reward, strict=True):
        angles, speeds, cost = planning._arm(casadi, *(casadi.DM(part) for part in (one[:2], one[2:4], torque, one[4:])))
        assert np.allclose(np.concatenate([angles.full(), speeds.full()])[:, 0], moved[:4], rtol=0, atol=1e-12)
        assert abs(float(cost) + paid) < 1e-12
