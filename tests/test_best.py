"""The best iterate so far, the spaces of solvers, and many starts: laws, and evaluations that are counted."""

import itertools
import math

import pytest
import torch

from rlamort.adjoint import Unrolled
from rlamort.domain import Box, Domain, Simplex, nearest_each, project_each, within
from rlamort.errors import UserError
from rlamort.model import Full, Latent, Unroll
from rlamort.nets import Zeros
from rlamort.objective import Objective, Oracle
from rlamort.solve.classical import iterates
from rlamort.update import (
    Adam,
    BestSoFar,
    Cem,
    Gradient,
    Icem,
    InChart,
    InY,
    Lbfgs,
    Mppi,
    Projected,
    SpectralGradient,
    Update,
    best_so_far,
)  # fmt: skip


class Bumps(Objective):
    """A nonconvex cost whose evaluations are counted; NaN where y_0 is above a wall, -inf where it is far below."""

    def __init__(self, wall=math.inf):
        self.wall, self.calls = wall, 0

    def report(self, y, x):
        self.calls += 1
        cost = ((y - x).square() + (7 * y).sin()).sum(-1)
        cost = torch.where(y[:, 0] > self.wall, math.nan, cost)
        return torch.where(y[:, 0] < -self.wall, -math.inf, cost), {}


BOX, SIMPLEX = Box([-1.0] * 3, [1.0] * 3), Simplex(3)
UPDATES = {
    "wild gradient": lambda domain: Gradient(10.0),
    "adam": lambda domain: Adam(1.0),
    "cem": lambda domain: Cem(domain, 8, 3),
    "icem": lambda domain: Icem(Cem(domain, 8, 3), 2),
    "mppi": lambda domain: Mppi(domain, 8),
    "lbfgs": lambda domain: Lbfgs(domain, history=3),
    "spectral": SpectralGradient,
}


SAMPLING = ("cem", "icem", "mppi")


def walked(f, x, z, update, space, steps=12):
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.stack(list(itertools.islice(iterates(Oracle(f, x), z, update, space), steps)))  # (K, S, B, n)


@pytest.mark.parametrize("space", [InY, InChart])
@pytest.mark.parametrize("domain", [BOX, SIMPLEX], ids=["box", "simplex"])
@pytest.mark.parametrize("wall", [math.inf, 0.4])
@pytest.mark.parametrize("name", UPDATES)
def test_no_iterate_is_above_the_one_before_nor_above_the_start(name, wall, domain, space):
    f, x = Bumps(wall), torch.randn(6, 3)
    space = space(domain)
    update = BestSoFar(Projected(UPDATES[name](space.domain), space.domain), space.domain)
    v = 0.2 * torch.randn(4, 6, domain.inputs)
    v[..., 0] = -v[..., 0].abs()  # beginnings on this side of the wall
    z = space.begin(v.flatten(0, 1), x.repeat(4, 1)).view(4, 6, -1)
    path = torch.cat([domain.project(v.flatten(0, 1)).view(1, 4, 6, 3), walked(f, x, z, update, space)])
    costs = f(path.flatten(0, 2), x.repeat(len(path) * 4, 1)).view(len(path), -1)
    begun = costs[0].isfinite()
    assert begun.any()
    rounding = 8 * torch.finfo(x.dtype).eps * (1 + costs[0].abs())
    assert (costs[1:, begun] <= costs[:-1, begun] + rounding[begun]).all()
    assert costs[:, begun].isfinite().all()
    assert within(domain, path.flatten(0, 2)).all()


class Leaky(Domain):
    """[0, 1]^dim, of which `nearest` does not keep the upper bounds; `violation` knows them."""

    def __init__(self, dim=1):
        super().__init__()
        self.dim = self.inputs = dim

    def project(self, v):
        return v.sigmoid()

    def nearest(self, y):
        return y.clamp(min=0)

    def violation(self, y):
        return (y - y.clamp(0, 1)).norm(dim=-1)


class Slope(Objective):
    def report(self, y, x):
        return -y.sum(-1), {}


def test_what_lies_outside_never_wins_and_is_left_for_what_does_not():
    domain, x = Leaky(), torch.zeros(2, 1)
    update = BestSoFar(Projected(Gradient(0.4), domain), domain)
    path = walked(Slope(), x, torch.tensor([[[0.0], [0.5]]]), update, InY(domain), 3)
    torch.testing.assert_close(path[:, 0, :, 0], torch.tensor([[0.4, 0.9], [0.8, 0.9], [0.8, 0.9]]))
    back = walked(Slope(), x[:1], torch.tensor([[[7.0]]]), BestSoFar(Gradient(-6.5), domain), InY(domain), 2)
    assert back[:, 0, 0, 0].tolist() == [0.5, 0.5]  # its start costs less, and is outside


@pytest.mark.parametrize(("name", "each"), [("spectral", 1), ("wild gradient", 2)])
def test_what_the_update_knows_is_not_evaluated_again(name, each):
    f, x = Bumps(), torch.randn(5, 3)
    walked(f, x, torch.zeros(1, 5, 3), BestSoFar(UPDATES[name](BOX), BOX), InY(BOX), 20)
    assert f.calls == 1 + 20 * each


def test_the_cost_that_spectral_gradient_knows_is_that_of_its_iterate():
    f, x, y = Bumps(), torch.randn(5, 3), torch.zeros(5, 3)
    oracle, update = Oracle(f, x, second_order=False), SpectralGradient(BOX)
    h = update.start(y, x, oracle)
    for _ in range(15):
        assert torch.equal(update.value(y, h, oracle), f(y, x))
        y, h = update(y, h, x, oracle)
    with pytest.raises(UserError, match=r"update\.memory: 0 is given"):
        SpectralGradient(BOX, 0)


@pytest.mark.parametrize("name", [name for name in UPDATES if name not in SAMPLING])
def test_items_and_starts_do_not_depend_on_each_other(name):
    f, x, z = Bumps(), torch.randn(4, 3, dtype=torch.float64), torch.rand(3, 4, 3, dtype=torch.float64) - 0.5

    def update():
        return BestSoFar(Projected(UPDATES[name](BOX), BOX), BOX)

    together = walked(f, x, z, update(), InY(BOX))
    for start, item in itertools.product(range(3), range(4)):
        alone = walked(f, x[item : item + 1], z[start : start + 1, item : item + 1], update(), InY(BOX))
        torch.testing.assert_close(together[:, start, item], alone[:, 0, 0], rtol=1e-9, atol=1e-9)


def test_a_model_in_the_chart_takes_the_solvers_steps_there():
    f, x = Bumps(), torch.randn(4, 3)
    chart = InChart(SIMPLEX)
    inner = Unroll(Full(Zeros(3), chart.domain), Gradient(0.3), 6, chart.domain)
    model = Latent(chart.decode, inner, SIMPLEX)
    path = walked(f, x, torch.zeros(1, 4, 3), Gradient(0.3), chart, 6)[:, 0]
    torch.testing.assert_close(model.iterates(x, Oracle(f, x))[1:], path)


class Walk(Update):
    """Given iterates, one after another."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def start(self, y, x, oracle):
        return (torch.zeros(len(y), dtype=torch.long),)

    def forward(self, y, h, x, oracle):
        return self.path[h[0] + 1, torch.arange(len(y))], (h[0] + 1,)


def test_a_path_that_is_there_is_judged_as_one_that_comes():
    f, x, path = Bumps(0.6), torch.randn(9, 3), 2 * torch.rand(8, 9, 3) - 1
    path[0, :, 0] = 0.0  # finite beginnings
    path[3, 2], path[4] = math.nan, path[2]
    came = walked(f, x, path[:1], BestSoFar(Walk(path), BOX), InY(BOX), 7)[:, 0]
    assert torch.equal(best_so_far(path, Oracle(f, x))[1:], came)


def test_the_derivative_is_that_of_the_iterate_which_is_best():
    f, x = Bumps(), torch.randn(5, 3, dtype=torch.float64)
    slopes = {}
    for keep_best, update in ((True, Gradient(0.3)), (False, BestSoFar(Gradient(0.3), BOX))):
        y = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
        init = Full(torch.nn.Identity(), BOX)
        end = Unroll(init, update, 4, BOX, Unrolled(), keep_best=keep_best)(y, Oracle(f, x))
        slopes[keep_best] = torch.autograd.grad(end.square().sum(), y)[0]
    torch.testing.assert_close(slopes[True], slopes[False])


class Plain(Domain):
    """A set of a user's own, whose methods know one leading axis alone: [-1, 1]^2."""

    dim = inputs = 2

    def project(self, v):
        assert v.ndim == 2
        return v.tanh()

    def nearest(self, y):
        assert y.ndim == 2
        return y.clamp(-1, 1)


class Bowl(Objective):
    def report(self, y, x):
        return (y - x).square().sum(-1), {}


@pytest.mark.parametrize("update", [Cem, Lbfgs])
def test_a_set_of_a_users_own_need_take_one_leading_axis_alone(update):
    domain, x = Plain(), torch.randn(5, 2)
    oracle, y, step = Oracle(Bowl(), x), domain.project(x), update(domain)
    y, _ = step(y, step.start(y, x, oracle), x, oracle)
    assert y.shape == (5, 2)
    assert project_each(domain, x, torch.randn(3, 5, 2)).shape == (3, 5, 2)
    assert nearest_each(domain, x, torch.randn(3, 5, 2)).abs().max() <= 1
