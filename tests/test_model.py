"""Models, the steps that they unroll, and how losses differentiate through these: laws, in float64."""

import itertools
import math
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from rlamort.adjoint import ConjugateGradients, Detached, FirstOrder, Implicit, Neumann, OneStep, Step, Truncated, Unrolled
from rlamort.domain import Box, Euclid, Gaussian, Simplex, Sphere
from rlamort.errors import UserError
from rlamort.model import Expert, Full, Latent, Model, Unroll
from rlamort.objective import Objective, Oracle, Soft, Temperature
from rlamort.update import (
    Adam,
    Additive,
    Anderson,
    BestSoFar,
    Cem,
    Fixed,
    Gated,
    Gradient,
    Gru,
    HardTop,
    Icem,
    Lbfgs,
    Learned,
    LogSign,
    Lstm,
    Mppi,
    Normed,
    Recurrent,
    SoftTop,
    SpectralGradient,
)

N, D = 3, 4  # n and d of the problems below
NEAR = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Face(Oracle):
    """An oracle by two functions of y alone."""

    def __init__(self, value, map=None):
        super().__init__(Objective(), torch.empty(0))
        self.value, self.map = value, map

    def values(self, ys):
        return torch.stack([self.value(y) for y in ys])


class Bowl(Objective, nn.Module):
    """f(y; x) = y'Hy / 2 - (Wx)'y + wave * sum cos(y), with parameters H and W; its map is one gradient step."""

    def __init__(self, wave=0.0):
        nn.Module.__init__(self)
        root = torch.randn(N, N)
        self.hessian = nn.Parameter(root @ root.T / N + torch.eye(N))
        self.weight = nn.Parameter(torch.randn(N, D))
        self.wave = wave

    def report(self, y, x):
        return 0.5 * ((y @ self.hessian) * y).sum(-1) - (y * (x @ self.weight.T)).sum(-1) + self.wave * y.cos().sum(-1), {}

    def map(self, y, x):
        return y - 0.2 * (y @ (self.hessian + self.hessian.T) / 2 - x @ self.weight.T - self.wave * y.sin())

    def solution(self, x):
        return torch.linalg.solve((self.hessian + self.hessian.T) / 2, x @ self.weight.T, left=False)


class Rosenbrock(Objective):
    def report(self, y, x):
        return ((1 - y[:, :-1]).square() + 100 * (y[:, 1:] - y[:, :-1].square()).square()).sum(-1), {}


class Start(Model):
    """The same first iterate for every context, as a parameter."""

    def __init__(self, y):
        super().__init__()
        self.y = nn.Parameter(y)

    def iterates(self, x, oracle=None):
        return self.y.expand(1, len(x), -1)


UPDATES = {
    "gradient": lambda: Gradient(0.1),
    "momentum": lambda: Gradient(Fixed(0.05), momentum=0.9, clip=1.0),
    "learned rate": lambda: Gradient(Learned(0.1, N, steps=2)),
    "recurrent": lambda: Recurrent(N, 8, contexts=D),
    "recurrent, gated": lambda: Recurrent(N, 8, cell=Lstm, encoding=Normed(), head=Gated),
    "cem": lambda: Cem(Euclid(N), samples=16, elites=4),
    "icem": lambda: Icem(Cem(Euclid(N), samples=16, elites=4), keep=2),
    "mppi": lambda: Mppi(Euclid(N), samples=16),
    "soft cem": lambda: Cem(Euclid(N), samples=16, elites=4, smoothing=0.2, selection=SoftTop(0.5)),
    "anderson": lambda: Anderson(3),
    "lbfgs": lambda: Lbfgs(Euclid(N), history=3),
    "spectral": lambda: SpectralGradient(Euclid(N), memory=3),
    "adam": lambda: Adam(0.1),
    "best so far": lambda: BestSoFar(Gradient(0.1), Euclid(N)),
}
ADJOINTS = {
    "unrolled": Unrolled(),
    "first order": FirstOrder(),
    "truncated": Truncated(2),
    "one step": OneStep(),
    "detached": Detached(Unrolled()),
    "implicit, cg": Implicit(ConjugateGradients()),
    "implicit, neumann": Implicit(Neumann()),
}


def unrolled(update, steps=5, adjoint=None, domain=None, shrinkage=0.0, width=N):
    torch.manual_seed(3)
    domain = domain or Euclid(width)
    return Unroll(Full(nn.Linear(D, width), domain), update, steps, domain, adjoint, shrinkage)


def finite_difference(loss, parameter, direction, epsilon=1e-5):
    """The derivative of loss along a direction of the parameter, by central differences."""
    value = parameter.detach().clone()
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.copy_(value + sign * epsilon * direction)
            ends.append(loss().item())
        parameter.copy_(value)
    return torch.tensor((ends[0] - ends[1]) / (2 * epsilon))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_gradient_steps_on_a_quadratic_are_the_ones_done_by_hand(momentum, device):
    f, x = Bowl().to(device), torch.randn(4, D, device=device)
    model = unrolled(Gradient(0.1, momentum)).to(device)
    y, velocity = model.init(x), 0
    path = [y]
    for _ in range(5):
        velocity = momentum * velocity + y @ (f.hessian + f.hessian.T) / 2 - x @ f.weight.T
        y = y - 0.1 * velocity
        path.append(y)
    torch.testing.assert_close(model.iterates(x, f.oracle(x)), torch.stack(path), **NEAR)


def test_a_longer_gradient_is_cut_per_item():
    x = torch.randn(2, D)
    f = Bowl()
    y = torch.stack([f.solution(x)[0] + 1e-3, torch.full((N,), 50.0)])
    moved, _ = Gradient(1.0, clip=2.0)(y, (torch.zeros_like(y), torch.zeros(2, dtype=torch.long)), x, f.oracle(x))
    slope = f.oracle(x).grad(y)
    torch.testing.assert_close(y[0] - moved[0], slope[0], **NEAR)
    torch.testing.assert_close(y[1] - moved[1], 2 * slope[1] / slope[1].norm(), **NEAR)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_every_pair_solves_under_no_grad_and_leaves_no_graph(update, adjoint, device):
    """... with the same iterates as where gradients are recorded, and those are one more than the steps."""
    f, x = Bowl(0.1).to(device), torch.randn(3, D, device=device)
    model = unrolled(UPDATES[update](), adjoint=ADJOINTS[adjoint], shrinkage=0.0 if update == "anderson" else 0.1).to(device)
    torch.manual_seed(1)
    path = model.iterates(x, f.oracle(x))
    with torch.no_grad():
        torch.manual_seed(1)
        bare = model.iterates(x, f.oracle(x))
    assert path.requires_grad
    assert not bare.requires_grad
    assert path.shape == (6, 3, N)
    torch.testing.assert_close(bare, path.detach(), **NEAR)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_an_item_is_solved_as_if_it_were_alone(update, adjoint):
    """Its answer, and the gradient that its answer sends to every parameter and to x; df_i / dx_j = 0."""
    f, x = Bowl(0.1), torch.randn(3, D, requires_grad=True)
    model = unrolled(UPDATES[update](), adjoint=ADJOINTS[adjoint])

    def solve(x):
        torch.manual_seed(1)
        y = model(x, f.oracle(x))
        owners = [x, f.weight, *model.parameters()]
        return y, torch.autograd.grad(y[-1].sum(), owners, allow_unused=True, materialize_grads=True)

    together, (to_x, *to_rest) = solve(x)
    alone, (to_x_alone, *to_rest_alone) = solve(x[-1:].detach().requires_grad_())
    torch.testing.assert_close(together[-1:], alone, **NEAR)
    assert to_x[:-1].abs().max() == 0
    torch.testing.assert_close(to_x[-1:], to_x_alone, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(to_rest, to_rest_alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
def test_a_broken_item_does_not_reach_the_others(update):
    f, x = Bowl(), torch.randn(3, D)
    model = unrolled(UPDATES[update]())
    torch.manual_seed(1)
    whole = model(x, f.oracle(x))
    torch.manual_seed(1)
    broken = model(x, Face(lambda y: f(y, x) * torch.tensor([1.0, math.nan, 1.0]), f.oracle(x).map))
    torch.testing.assert_close(broken[[0, 2]], whole[[0, 2]], **NEAR)


@pytest.mark.parametrize("update", [name for name in UPDATES if name not in ("cem", "icem")])
def test_unrolled_gradients_are_finite_differences(update):
    """MAML's gradient among them: through the steps, to where they start, to what they learn, and to f."""
    f, x = Bowl(0.5), torch.randn(2, D, requires_grad=True)
    model = unrolled(UPDATES[update](), steps=3)

    def loss():
        torch.manual_seed(1)
        return model(x, f.oracle(x)).square().sum()

    owners = [model.init.net.bias, f.hessian, x, *itertools.islice(model.update.parameters(), 1)]
    exact = torch.autograd.grad(loss(), owners)
    for owner, slope in zip(owners, exact, strict=True):
        direction = torch.randn_like(owner)
        torch.testing.assert_close((slope * direction).sum(), finite_difference(loss, owner, direction), rtol=1e-5, atol=1e-7)


def test_first_order_drops_exactly_the_hessian():
    """One step from y_0: d y_1 / d y_0 is I - rate H unrolled and I without second derivatives; after K steps, its powers."""
    f, x, rate = Bowl(), torch.randn(1, D), 0.1
    H = ((f.hessian + f.hessian.T) / 2).detach()
    for steps in (1, 4):
        for adjoint, step in ((Unrolled(), torch.eye(N) - rate * H), (FirstOrder(), torch.eye(N))):
            start = Start(torch.randn(1, N))
            model = Unroll(start, Gradient(rate), steps, Euclid(N), adjoint)
            rows = [torch.autograd.grad(model(x, f.oracle(x))[0, i], start.y)[0] for i in range(N)]
            torch.testing.assert_close(torch.cat(rows), torch.linalg.matrix_power(step, steps), **NEAR)


def test_a_detached_start_learns_from_its_own_prediction_alone():
    """Of the last iterate only the steps get a derivative, that of unrolling; of the first, the start gets its own."""
    f, x = Bowl(0.5), torch.randn(3, D)
    whole, apart = (unrolled(Gradient(Learned(0.1, N)), steps=4, adjoint=one) for one in (Unrolled(), Detached(Unrolled())))
    first, *_, last = apart.iterates(x, f.oracle(x))
    inits = list(apart.init.parameters())
    slopes = torch.autograd.grad(last.square().sum(), [apart.update.rate.log, *inits], retain_graph=True)
    expected = torch.autograd.grad(whole(x, f.oracle(x)).square().sum(), whole.update.rate.log)
    torch.testing.assert_close(slopes[0], expected[0], **NEAR)
    assert not any(slope.any() for slope in slopes[1:])
    alone = torch.autograd.grad(f(apart.init(x), x).sum(), inits)
    torch.testing.assert_close(torch.autograd.grad(f(first, x).sum(), inits), alone, **NEAR)


def test_first_order_still_teaches_the_step_size():
    f, x = Bowl(), torch.randn(2, D)
    model = unrolled(Gradient(Learned(0.1, N)), steps=1, adjoint=FirstOrder())
    (slope,) = torch.autograd.grad(model(x, f.oracle(x)).sum(), model.update.rate.log)
    torch.testing.assert_close(slope[0], -0.1 * f.oracle(x).grad(model.init(x)).detach().sum(0), **NEAR)


def test_truncation_to_all_steps_is_unrolling_and_to_one_is_one_step():
    f, x = Bowl(0.5), torch.randn(3, D)
    update = Recurrent(N, 8)

    def slopes(adjoint, owners):
        model = unrolled(update, steps=4, adjoint=adjoint)
        wanted = [*(f.parameters() if "f" in owners else []), *(update.parameters() if "update" in owners else [])]
        wanted += list(model.init.parameters()) if "init" in owners else []
        last = model(x, f.oracle(x)).square().sum()
        return torch.autograd.grad(last, wanted, allow_unused=True, materialize_grads=True)

    everything = ("f", "update", "init")
    torch.testing.assert_close(slopes(Truncated(4), everything), slopes(Unrolled(), everything), **NEAR)
    torch.testing.assert_close(slopes(Truncated(1), everything), slopes(OneStep(), everything), **NEAR)
    two, four = slopes(Truncated(2), everything), slopes(Unrolled(), everything)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(two, four, strict=True))


def test_truncated_windows_reach_every_iterate():
    """Iterate k sees the steps since its window began, so that losses over iterates teach a learned step at each."""
    f, x = Bowl(0.5), torch.randn(3, D)
    start = Start(torch.randn(1, N))
    path = Unroll(start, Gradient(0.1), 5, Euclid(N), Truncated(2)).iterates(x, f.oracle(x))
    reaches = [
        torch.autograd.grad(y.sum(), start.y, retain_graph=True, allow_unused=True, materialize_grads=True)[0].abs().max() > 0
        for y in path
    ]
    assert reaches == [True, True, False, False, False, False]  # windows of 1, 2 and 2 steps
    assert all(torch.autograd.grad(y.sum(), f.weight, retain_graph=True)[0].abs().max() > 0 for y in path[1:])


IMPLICIT = {"cg": Implicit(ConjugateGradients()), "neumann": Implicit(Neumann(200))}


@pytest.mark.parametrize("adjoint", IMPLICIT)
@pytest.mark.parametrize("shrinkage", [0.0, 0.7])
def test_implicit_gradients_are_unrolled_ones_at_convergence(adjoint, shrinkage):
    """With respect to f, x, and, where shrinkage ties the solution to it, the first iterate."""
    f, x = Bowl(0.3), torch.randn(3, D, requires_grad=True)
    target = torch.randn(3, N)
    slopes = []
    for strategy in (Unrolled(), IMPLICIT[adjoint]):
        model = unrolled(Gradient(0.25), steps=200, adjoint=strategy, shrinkage=shrinkage)
        loss = (model(x, f.oracle(x)) - target).square().sum()
        slopes.append(torch.autograd.grad(loss, [x, *f.parameters(), *model.init.parameters()]))
    assert slopes[1][0].abs().min() > 1e-6
    assert (slopes[1][-1].abs().min() > 1e-6) == (shrinkage > 0)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-7, atol=1e-9)


def test_imaml_in_closed_form():
    """d y* / d y_0 = (I + H / strength)^-1 (Rajeswaran et al., 2019, lemma 1)."""
    f, x, strength = Bowl(), torch.randn(1, D), 0.7
    start = Start(torch.randn(1, N))
    model = Unroll(start, Gradient(0.2), 300, Euclid(N), Implicit(ConjugateGradients()), strength)
    y = model(x, f.oracle(x))
    rows = [torch.autograd.grad(y[0, i], start.y, retain_graph=True)[0] for i in range(N)]
    expected = torch.linalg.inv(torch.eye(N) + (f.hessian + f.hessian.T).detach() / 2 / strength)
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adjoint", IMPLICIT)
@pytest.mark.parametrize("domain", [Box([-0.25] * N, [0.25] * N), Simplex(N)], ids=["box", "simplex"])
def test_implicit_gradients_hold_on_the_boundary(adjoint, domain):
    f, x = Bowl(), torch.randn(8, D)
    domain = domain.double()
    model = unrolled(Gradient(0.25), steps=150, adjoint=IMPLICIT[adjoint], domain=domain)
    y = model(x, f.oracle(x)).detach()
    bound = (y == 0) | (y.abs() == 0.25)
    assert 0.1 < bound.double().mean() < 0.9
    target, direction = torch.randn(8, N), torch.randn(N, D)

    def loss():
        return (model(x, f.oracle(x)) * target).sum()

    (exact,) = torch.autograd.grad(loss(), f.weight)
    torch.testing.assert_close((exact * direction).sum(), finite_difference(loss, f.weight, direction), rtol=1e-6, atol=1e-8)


def test_one_step_is_neumann_without_terms_at_a_fixed_point():
    f, x = Bowl(0.3), torch.randn(3, D)
    slopes = []
    for adjoint in (OneStep(), Implicit(Neumann(0))):
        model = unrolled(Gradient(0.25), steps=200, adjoint=adjoint)
        slopes.append(torch.autograd.grad(model(x, f.oracle(x)).square().sum(), list(f.parameters())))
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-10)


def test_implicit_memory_does_not_grow_with_the_steps():
    """How many tensors autograd keeps of the path."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    kept = {}
    for adjoint, steps in itertools.product(("unrolled", "implicit, cg", "implicit, neumann", "one step"), (5, 40)):
        f, x = Bowl(0.3), torch.randn(3, D)
        model = unrolled(Gradient(0.1), steps=steps, adjoint=ADJOINTS[adjoint])
        alive = weakref.WeakSet()

        def pack(tensor, alive=alive):
            alive.add(one := Kept(tensor))
            return one

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
            y = model(x, f.oracle(x))
        kept[adjoint, steps] = len(alive)
        assert y.requires_grad
    assert kept["unrolled", 40] > 5 * kept["unrolled", 5]
    for adjoint in ("implicit, cg", "implicit, neumann", "one step"):
        assert kept[adjoint, 40] == kept[adjoint, 5]


def test_conjugate_gradients_stop_per_item_where_curvature_is_not_positive():
    curvature = torch.tensor([[2.0, 4.0], [-1.0, -1.0], [0.0, 0.0]])
    at = torch.zeros(3, 2, requires_grad=True)
    oracle = Face(lambda y: 0.5 * (curvature * y.square()).sum(-1))
    residual = oracle.grad(at)
    solved = ConjugateGradients(5).solve(
        Step(Gradient(0.1), Euclid(2).nearest, at, oracle),
        at,
        residual,
        lambda v: torch.autograd.grad(residual, at, v, retain_graph=True)[0],
        torch.ones(3, 2),
    )
    torch.testing.assert_close(solved, torch.tensor([[0.5, 0.25], [0.0, 0.0], [0.0, 0.0]]), **NEAR)


def test_no_steps_give_the_first_iterate():
    f, x = Bowl(), torch.randn(2, D)
    for adjoint in ADJOINTS.values():
        model = unrolled(Gradient(0.1), steps=0, adjoint=adjoint)
        torch.testing.assert_close(model.iterates(x, f.oracle(x)), model.init.iterates(x))


def test_iterates_stay_in_the_domain(device):
    f, x = Bowl().to(device), 5 * torch.randn(6, D, device=device)
    for update in ("gradient", "cem", "lbfgs"):
        domain = Simplex(N).to(device)
        made = {"gradient": Gradient(0.3), "cem": Cem(domain), "lbfgs": Lbfgs(domain)}[update]
        path = unrolled(made, domain=domain).to(device).iterates(x, f.oracle(x))
        torch.testing.assert_close(path.sum(-1), torch.ones_like(path[..., 0]), **NEAR)
        assert path.min() >= 0


def test_learned_step_sizes_are_per_step_and_the_last_one_stays():
    rate = Learned(0.1, N, steps=2)
    with torch.no_grad():
        rate.log[1] = math.log(0.3)
    sizes = [rate(torch.zeros(1, N), torch.tensor([k])) for k in range(4)]
    torch.testing.assert_close(torch.cat(sizes), torch.tensor([[0.1], [0.3], [0.3], [0.3]]).expand(4, N), **NEAR)


@pytest.mark.parametrize("encoding", [LogSign(), Normed()], ids=["log and sign", "direction and log"])
def test_gradient_encodings_keep_the_magnitude_in_bounded_numbers(encoding, device):
    for size in (1e-6, 1e-3, 1.0, 1e4):
        g = (size * torch.randn(5, N)).to(device)  # the same numbers on every device
        codes = torch.stack([encoding(g), encoding(10 * g), encoding(-g)])
        assert codes.shape == (3, 5, encoding.size(N))
        assert (codes[0] - codes[1]).abs().amax(-1).min() > 0.1
        assert (codes[0] - codes[2]).abs().amax(-1).min() > 0.01
        assert codes.abs().max() < 20
    nothing = torch.zeros(1, N, device=device, requires_grad=True)
    assert torch.autograd.grad(encoding(nothing).sum(), nothing)[0].isfinite().all()


def test_log_and_sign_is_the_papers():
    g = torch.tensor([[math.e, -1.0, math.exp(-10), -math.exp(-11), 0.0]])
    code = LogSign(10.0)(g)
    torch.testing.assert_close(code[0, :5], torch.tensor([0.1, 0.0, -1.0, -1.0, -1.0]), **NEAR)
    torch.testing.assert_close(code[0, 5:], torch.tensor([1.0, -1.0, 1.0, -math.exp(-1), 0.0]), **NEAR)


@pytest.mark.parametrize("cell", [Gru, Lstm])
@pytest.mark.parametrize("head", [Additive, Gated])
def test_a_recurrent_update_learns_to_solve(cell, head):
    """A few steps of Adam teach it to go further in four steps than it goes before."""
    f = Bowl()
    model = unrolled(Recurrent(N, 16, contexts=D, cell=cell, head=head), steps=4)
    adam = torch.optim.Adam(model.update.parameters(), 1e-2)
    costs = []
    for _ in range(40):
        x = torch.randn(32, D)
        loss = (f(model(x, f.oracle(x)), x) - f(f.solution(x), x)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        costs.append(loss.item())
    assert np.mean(costs[-5:]) < 0.4 * np.mean(costs[:5])


def test_cem_finds_the_minimum(device):
    """... among many, where a gradient step stays in the nearest one."""
    x = torch.tensor([[1.0, -2.0], [0.5, 2.0], [0.0, 0.0]], device=device)
    oracle = Face(lambda y: ((y - x).square() + 2 - 2 * (5 * (y - x)).cos()).sum(-1))
    start = Start(torch.tensor([[-1.3, 1.2]])).to(device)
    with torch.no_grad():
        found = Unroll(start, Cem(Euclid(2), 256, 16, sigma=2.0), 30, Euclid(2))(x, oracle)
        stuck = Unroll(start, Gradient(0.01), 200, Euclid(2))(x, oracle)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)
    assert (stuck - x).norm(dim=-1).min() > 1


def test_soft_selection_becomes_hard_as_its_temperature_falls():
    costs = torch.randn(5, 12)
    hard = HardTop()(costs, 4)
    assert (hard.sum(-1) == 4).all()
    gaps = [(SoftTop(t)(costs, 4) - hard).abs().max().item() for t in (1.0, 0.1, 1e-3)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6
    torch.testing.assert_close(SoftTop(1.0)(costs, 4).sum(-1), torch.full((5,), 4.0), rtol=1e-6, atol=0)


def test_soft_cem_at_no_temperature_is_cem():
    f, x = Bowl(), torch.randn(3, D)
    paths = []
    for selection in (HardTop(), SoftTop(1e-4)):
        model = unrolled(Cem(Euclid(N), 20, 5, selection=selection))
        torch.manual_seed(1)
        with torch.no_grad():
            paths.append(model.iterates(x, f.oracle(x)))
    torch.testing.assert_close(*paths, rtol=1e-5, atol=1e-6)


def test_losses_differentiate_through_soft_cem():
    x = torch.randn(2, D)
    update = Cem(Euclid(N), 8, 3, selection=SoftTop(1.0))

    def step(y, std, weight):
        torch.manual_seed(1)
        moved, (spread,) = update(y, (std,), x, Face(lambda y: y.square().sum(-1) - (y * (x @ weight.T)).sum(-1)))
        return moved, spread

    at = [torch.rand(shape, requires_grad=True) for shape in ((2, N), (2, N), (N, D))]
    assert torch.autograd.gradcheck(step, at, atol=1e-5, rtol=1e-4)


def test_cem_passes_over_samples_that_cost_nan():
    x = torch.zeros(1, 1)
    oracle = Face(lambda y: torch.where(y[:, 0] > 0, y.square().sum(-1), math.nan))
    for selection in (HardTop(), SoftTop(0.05)):
        y, _ = Cem(Euclid(2), 64, 4, selection=selection)(torch.zeros(1, 2), (torch.ones(1, 2),), x, oracle)
        assert y[0, 0] > 0


class Looks(Bowl):
    """A cost that looks at a value."""

    def report(self, y, x):
        return super().report(y, x)[0] + (y[0, 0].item() > 99), {}


@pytest.mark.parametrize("draws", [2, 3])
def test_a_soft_objective_over_draws_is_their_mean_and_one_half_mirrors_the_other(draws):
    bowl = Bowl(0.2)
    one, f = (Soft(bowl, Gaussian(N), Temperature(0.3), count) for count in (1, draws))
    x, lam = torch.randn(4, D), torch.randn(4, 2 * N)
    for oracle in (f.oracle(x), f.deterministic_oracle(x)):
        noise = oracle.x[:, D:].view(4, draws, N)
        assert torch.equal(noise[:, (draws + 1) // 2], -noise[:, 0])
        costs = torch.stack([one.report(lam, x, noise[:, s])[0] for s in range(draws)])
        torch.testing.assert_close(oracle.value(lam), costs.mean(0))
    torch.manual_seed(0)
    drawn = f(lam, x)
    torch.manual_seed(0)
    torch.testing.assert_close(f.oracle(x).value(lam), drawn)  # the same noise, in the same order
    assert torch.equal(f.deterministic_oracle(x).x, f.deterministic_oracle(x).x)


def oracles():
    """Of what is asked by itself, and of all that holds something for each context."""
    f, x = Bowl(0.2), torch.randn(4, D)
    decode = nn.Linear(2 + D, N)
    soft = Soft(f, Gaussian(N), Temperature(0.3)).oracle(x)

    def through(oracle, dim):
        mix = nn.Linear(2 + D, dim)
        return oracle.through(lambda z, x: mix(torch.cat([z, x], -1)), D)

    return {
        "plain": (f.oracle(x), N),
        "looks at a value": (Looks(0.2).oracle(x), N),
        "tethered": (f.oracle(x).tethered(torch.randn(4, N), 0.7), N),
        "soft": (soft, 2 * N),
        "soft, three draws": (Soft(f, Gaussian(N), Temperature(0.3), 3).oracle(x), 2 * N),
        "soft, decoded, tethered": (through(soft, 2 * N).tethered(torch.randn(4, 2), 0.7), 2),
        "tethered, decoded": (through(f.oracle(x).tethered(torch.randn(4, N), 0.7), N), 2),
        "decoded": (f.oracle(x).through(lambda z, x: decode(torch.cat([z, x], -1)), D), 2),
    }


@pytest.mark.parametrize("name", list(oracles()))
@pytest.mark.parametrize("at_once", [2**25, 60])
def test_several_values_at_once_are_those_one_by_one(name, at_once, monkeypatch):
    """... however many memory bears, and the same each time: what an oracle holds goes with its context."""
    monkeypatch.setattr("rlamort.objective.FLOATS", at_once)
    torch.manual_seed(3)
    oracle, dim = oracles()[name]
    ys = torch.randn(7, 4, dim)
    torch.testing.assert_close(oracle.values(ys), torch.stack([oracle.value(y) for y in ys]), **NEAR)
    assert torch.equal(oracle.value(ys[0]), oracle.value(ys[0]))


def test_a_soft_oracle_differentiates_the_draw_that_it_holds():
    torch.manual_seed(3)
    oracle, dim = oracles()["soft"]
    lam, e = torch.randn(4, dim), 1e-6
    for i in range(dim):
        move = torch.zeros(4, dim)
        move[:, i] = e
        slope = (oracle.value(lam + move) - oracle.value(lam - move)) / (2 * e)
        torch.testing.assert_close(oracle.grad(lam)[:, i], slope, rtol=1e-6, atol=1e-7)


def test_anderson_without_history_is_fixed_point_iteration():
    f, x = Bowl(0.3), torch.randn(3, D)
    y = torch.randn(3, N)
    path = Unroll(Start(y), Anderson(1), 6, Euclid(N)).iterates(x, f.oracle(x))
    for before, after in itertools.pairwise(path):
        torch.testing.assert_close(after, f.oracle(x).map(before), **NEAR)


def test_anderson_solves_a_linear_map_in_n_plus_one_steps(device):
    n, x = 5, torch.zeros(4, 1, device=device)
    spread = torch.randn(n, n, device=device)
    matrix, shift = spread / torch.linalg.matrix_norm(spread, 2) * 0.95, torch.randn(4, n, device=device)
    fixed = torch.linalg.solve(torch.eye(n, device=device) - matrix, shift, left=False)
    start = Start(torch.randn(4, n)).to(device)
    oracle = Face(None, lambda y: y @ matrix + shift)
    model = Unroll(start, Anderson(n + 1, ridge=0.0), n + 1, Euclid(n))
    torch.testing.assert_close(model(x, oracle), fixed, rtol=1e-6, atol=1e-6)
    plain = Unroll(start, Anderson(1), n + 1, Euclid(n))(x, oracle)
    assert (plain - fixed).abs().max() > 1e-2
    beyond = Unroll(start, Anderson(n + 1), 40, Euclid(n))(x, oracle)  # and stays there
    torch.testing.assert_close(beyond, fixed, rtol=1e-8, atol=1e-8)


def test_lbfgs_reaches_what_scipys_does(device):
    f = Rosenbrock()
    starts = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [3.0, -2.0], [1.0, 1.0]])
    reference = [scipy.optimize.minimize(lambda y: f(torch.tensor(y)[None], None).item(), s, method="L-BFGS-B") for s in starts]

    class Several(Model):
        def iterates(self, x, oracle=None):
            return starts.to(x.device)[None]

    x = torch.zeros(4, 1, device=device)
    with torch.no_grad():
        path = Unroll(Several(), Lbfgs(Euclid(2)), 80, Euclid(2)).iterates(x, f.oracle(x))
    costs = torch.stack([f(y, x) for y in path])
    assert (costs.diff(dim=0) <= 1e-15 * costs[:-1]).all()
    assert costs[-1].max().item() <= max(r.fun for r in reference)
    torch.testing.assert_close(path[-1], torch.ones_like(path[-1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_lbfgs_does_not_mind_the_scale(scale):
    f, x = Bowl(), torch.randn(5, D)
    oracle = Face(lambda y: scale * f(y, x))
    model = unrolled(Lbfgs(Euclid(N)), steps=30)
    torch.testing.assert_close(model(x, oracle), f.solution(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("domain", [Box([-0.3] * 20, [0.3] * 20), Simplex(20), Sphere(20)], ids=["box", "simplex", "sphere"])
def test_lbfgs_solves_on_a_domain(domain):
    """To a fixed point of projected gradient steps, which a convex problem has in its minima alone."""
    root = torch.randn(20, 20)
    hessian, x = root @ root.T / 20 + 0.05 * torch.eye(20), torch.randn(6, 20)
    domain = domain.double()
    oracle = Face(lambda y: 0.5 * ((y @ hessian) * y).sum(-1) - (y * x).sum(-1))
    model = Unroll(Full(nn.Linear(20, 20), domain), Lbfgs(domain), 60, domain)
    with torch.no_grad():
        y = model(x, oracle)
        torch.testing.assert_close(domain.nearest(y - oracle.grad(y)), y, rtol=0, atol=1e-7)


def test_lbfgs_leaves_an_item_where_nothing_is_acceptable():
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    oracle = Face(lambda y: torch.stack([y[0].square().sum(), torch.where(y[1].sum() == 7, 0, math.nan) * y[1].sum()]))
    path = Unroll(Start(y), Lbfgs(Euclid(2)), 8, Euclid(2)).iterates(torch.zeros(2, 1), oracle)
    torch.testing.assert_close(path[-1, 0], torch.zeros(2), rtol=0, atol=1e-6)
    assert (path[:, 1] == y[1]).all()


def test_a_latent_model_solves_what_its_decoder_reaches(device):
    f, x = Bowl().to(device), torch.randn(3, D).to(device)  # drawn on the CPU, as what it is solved by

    class Decode(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, N)

        def forward(self, z, x):
            return self.net(z) + x[:, :N]

    decode = Decode().to(device)
    inner = unrolled(Gradient(0.2), steps=400, width=2)
    model = Latent(decode, inner, Euclid(N)).to(device)
    path = model.iterates(x, f.oracle(x))
    assert path.shape == (401, 3, N)
    H, C = (f.hessian + f.hessian.T) / 2, decode.net.weight  # argmin_z f(Cz + b + x)
    offset = decode.net.bias + x[:, :N]
    z = torch.linalg.solve(C.T @ H @ C, (x @ f.weight.T - offset @ H) @ C, left=False)
    torch.testing.assert_close(path[-1], z @ C.T + offset, rtol=1e-6, atol=1e-6)


def test_implicit_gradients_pass_through_a_latent_model():
    """To the decoder, which moves both where the solver goes and what its answer means, and to f."""
    f, x = Bowl(0.3), torch.randn(3, D)
    decode = nn.Bilinear(2, D, N)
    inner = unrolled(Lbfgs(Euclid(2)), steps=40, adjoint=Implicit(ConjugateGradients()), width=2)
    model = Latent(decode, inner, Euclid(N))

    def loss():
        return model(x, f.oracle(x)).square().sum()

    for owner, slope in zip((decode.weight, f.weight), torch.autograd.grad(loss(), [decode.weight, f.weight]), strict=True):
        direction = torch.randn_like(owner)
        torch.testing.assert_close((slope * direction).sum(), finite_difference(loss, owner, direction), rtol=1e-4, atol=1e-6)


def test_an_expert_is_a_model_of_one_iterate():
    f, x = Bowl(), torch.randn(3, D)
    torch.testing.assert_close(Expert(f.solution).iterates(x), f.solution(x)[None])
    with pytest.raises(UserError, match=r"Mine\.solution: None is returned"):
        Expert(lambda x: None, "Mine.solution")(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: unrolled(Gradient(0.1), steps=-1), "steps: -1"),
        (lambda: unrolled(Gradient(0.1), shrinkage=-0.5), "shrinkage: -0.5"),
        (lambda: Cem(Euclid(2), samples=4, elites=4), "elites: 4"),
        (lambda: SoftTop(0.0), "temperature: 0.0"),
        (lambda: Anderson(0), "history: 0"),
        (lambda: Truncated(0), "steps: 0"),
        (lambda: unrolled(Gradient(0.1))(torch.zeros(1, D)), "oracle.value"),
        (lambda: unrolled(Anderson())(torch.zeros(1, D)), "oracle.map"),
        (lambda: unrolled(Anderson(), shrinkage=1.0)(torch.zeros(1, D), Bowl().oracle(torch.zeros(1, D))), "oracle.map"),
    ],
)
def test_what_cannot_be_is_said(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("contexts", [0, D + 1])
def test_a_recurrent_step_of_another_size_is_named(contexts):
    """As it is where the size of what is distributed is taken for that of the parameters which iterate."""
    density, x = Gaussian(N), torch.randn(2, D)
    model = Unroll(Full(nn.Linear(D, 2 * N), density.parameters), Recurrent(N, 8, contexts), 2, density.parameters)
    with pytest.raises(UserError, match=r"update.dim.*iterates have 6 numbers, contexts 4.*density\.parameters\.dim"):
        model(x, Soft(Bowl(), density, Temperature(1.0)).oracle(x))
