"""Y and P(Y): every domain keeps every law, in float64."""

import contextlib
import copy
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck

from rlamort.domain import (
    PSD,
    Affine,
    Ball,
    Birkhoff,
    Box,
    CappedSimplex,
    Domain,
    Euclid,
    ExponentialCone,
    Gaussian,
    Orthant,
    Polyhedron,
    Product,
    SecondOrderCone,
    Simplex,
    Sphere,
    SquashedGaussian,
)
from rlamort.domain.density import MeanLogStd
from rlamort.errors import UserError

DOMAINS = {
    "euclid": Euclid(4),
    "box": Box([-2.0, 0.0, -1.0], [2.0, 1.0, 3.0]),
    "orthant": Orthant(4),
    "simplex": Simplex(5),
    "point": Simplex(1),
    "capped": CappedSimplex(6, 2),
    "capped, all but one": CappedSimplex(4, 3),
    "capped, a fraction": CappedSimplex(5, 1.5),
    "sphere": Sphere(3),
    "second-order cone": SecondOrderCone(4),
    "ray": SecondOrderCone(1),
    "psd": PSD(3),
    "exponential cone": ExponentialCone(),
    "birkhoff": Birkhoff(4),
    "birkhoff, one": Birkhoff(1),
    "ball": Ball(3, 2.0),
    "affine": Affine([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 1.0, 1.0]], [1.0, -0.5]),
    "polyhedron": Polyhedron(torch.eye(4), 0.0, 0.6, [[1.0, 1.0, 1.0, 1.0]], 1.0),
    "product": Product([Simplex(3), Box([0.0], [1.0]), Product([ExponentialCone(), Birkhoff(2)])]),
    "bounded product": Product([Simplex(3), Box([-1.0], [1.0]), Birkhoff(2)]),
}
UNBOUNDED = ("euclid", "affine", "orthant", "second-order cone", "ray", "psd", "exponential cone", "product")
NOT_CONVEX = ("sphere",)


@pytest.fixture(params=DOMAINS.values(), ids=DOMAINS)
def domain(request) -> Domain:
    return request.param


def where(*, without=()):
    """Parametrises over the domains but some."""
    return pytest.mark.parametrize("domain", [d for n, d in DOMAINS.items() if n not in without],
                                   ids=[n for n in DOMAINS if n not in without])  # fmt: skip


def points(size: int, dtype=torch.float64) -> torch.Tensor:
    """(B, size): ordinary ones of several sizes, zeros, ties, and extreme ones."""
    torch.manual_seed(0)
    ordinary = torch.randn(40, size, dtype=dtype)
    scale = torch.tensor([0.1, 1.0, 1.0, 5.0], dtype=dtype).repeat(10)[:, None]
    ties = torch.randint(-1, 2, (10, size)).to(dtype)
    extreme = 1e3 * torch.randn(20, size, dtype=dtype)
    mixed = extreme[:10] * ties
    constant = torch.tensor([[0.0], [1.0], [-1.0], [1e3], [-1e3], [1e-30]], dtype=dtype).expand(6, size)
    return torch.cat([scale * ordinary, ties, extreme, mixed, 1e3 * ties, 0.0 * ties[:1], constant])


def distance(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(y - z, dim=-1)


def feasible(domain: Domain, y: torch.Tensor, tol: float) -> bool:
    """Whether y is in Y, from Y's definition alone."""
    match domain:
        case Euclid():
            return y.isfinite().all().item()
        case Box():
            u = domain.encode(y)
            return (u.abs() <= 1 + tol).all().item()
        case Orthant():
            return (y >= 0).all().item()
        case Simplex():
            return ((y >= 0).all() and ((y.sum(-1) - 1).abs() <= tol).all()).item()
        case CappedSimplex():
            return ((y >= 0).all() and (y <= 1).all() and ((y.sum(-1) - domain.k).abs() <= tol).all()).item()
        case Sphere():
            return ((y.square().sum(-1) - 1).abs() <= tol).all().item()
        case SecondOrderCone():
            t = y[..., -1]
            return (torch.linalg.vector_norm(y[..., :-1], dim=-1) <= t + tol * (1 + t.abs())).all().item()
        case PSD():
            matrix = y.reshape(-1, domain.size, domain.size)
            size = 1 + matrix.abs().amax((-1, -2))
            even = (matrix - matrix.mT).abs().amax((-1, -2)) <= tol * size
            return (even & (torch.linalg.eigvalsh(matrix)[:, 0] >= -tol * size)).all().item()
        case ExponentialCone():
            r, s, t = y.unbind(-1)
            on_face = (s == 0) & (r <= 0) & (t >= 0)
            return (on_face | ((s > 0) & (s * (r / s).exp() <= t * (1 + 1e3 * tol) + tol))).all().item()
        case Birkhoff():
            matrix = y.reshape(-1, domain.size, domain.size)
            margins = torch.cat([matrix.sum(-1), matrix.sum(-2)], -1)
            return ((matrix >= 0).all() and ((margins - 1).abs() <= tol).all()).item()
        case Ball():
            return (torch.linalg.vector_norm(y, dim=-1) <= 2 + tol).all().item()
        case Affine():
            first, second = y[..., 0] + 2 * y[..., 1] - y[..., 3] - 1, y[..., 1:].sum(-1) + 0.5
            return (torch.maximum(first.abs(), second.abs()) <= tol * (1 + y.abs().amax(-1)) * 4).all().item()
        case Polyhedron():
            return ((y >= -tol).all() and (y <= 0.6 + tol).all() and ((y.sum(-1) - 1).abs() <= tol).all()).item()
        case Product():
            return all(feasible(d, part, tol) for d, part in zip(domain.domains, y.split(domain.sizes, -1), strict=True))
    raise AssertionError(domain)


# --- membership


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"])
def test_project_and_nearest_and_act_end_in_y_from_anywhere(domain, dtype, tol, device):
    domain = copy.deepcopy(domain).to(device)
    v, y = points(domain.inputs, dtype).to(device), points(domain.dim, dtype).to(device)
    u = torch.rand(50, domain.inputs, dtype=dtype, device=device) * 2 - 1
    for found in (domain.project(v), domain.nearest(y), domain.act(u)):
        assert (found.dtype, found.shape[-1]) == (dtype, domain.dim)
        assert feasible(domain, found, tol)
        assert (domain.violation(found) <= tol * (1 + found.norm(dim=-1))).all()


PARTS = ("simplex", "point", "capped", "capped, all but one", "capped, a fraction", "birkhoff", "birkhoff, one", "product",
         "bounded product", "affine", "polyhedron")  # fmt: skip


@where(without=PARTS)
def test_violation_is_the_distance_to_the_nearest_point(domain):
    y = points(domain.dim)
    torch.testing.assert_close(domain.violation(y), distance(y, domain.nearest(y)), rtol=1e-9, atol=1e-12)
    if not isinstance(domain, Euclid):
        assert domain.violation(y).max() > 0.5


@pytest.mark.parametrize("domain", [DOMAINS[name] for name in PARTS], ids=PARTS)
def test_violation_of_an_intersection_is_a_part_of_the_distance(domain):
    """Never more, and never so much less that it could be taken for rounding."""
    y = points(domain.dim)
    whole, found = distance(y, domain.nearest(y)), domain.violation(y)
    assert (found <= whole * (1 + 1e-12) + 1e-12).all()
    assert (found >= whole / (2 * domain.dim) - 1e-12).all()
    assert found.max() > 0.5


@where(without=("euclid",))
def test_violation_asks_nothing_of_nearest(domain):
    """So that a projection which is wrong cannot vouch for itself; and what is in Y stays in Y."""
    lost = torch.full((1, domain.dim), -2.5, dtype=torch.float64)
    inside = domain.project(points(domain.inputs))
    wrong = copy.deepcopy(domain)
    wrong.nearest = lambda y: lost.expand_as(y)
    assert wrong.violation(lost) > 0.1
    assert (wrong.violation(inside) <= 1e-12 * (1 + inside.norm(dim=-1))).all()


# --- nearest


@where(without=NOT_CONVEX)
def test_nearest_satisfies_the_variational_inequality(domain):
    y = points(domain.dim)
    near, size = domain.nearest(y), 1 + y.norm(dim=-1)
    s = torch.cat([domain.project(points(domain.inputs)), domain.project(torch.randn(100, domain.inputs, dtype=torch.float64))])
    gain = torch.einsum("bi,bsi->bs", y - near, s[None] - near[:, None])
    assert (gain <= 1e-11 * size[:, None] * (1 + s.norm(dim=-1) + near.norm(dim=-1)[:, None])).all()


@where(without=(*UNBOUNDED, *NOT_CONVEX))
def test_nearest_leaves_no_frank_wolfe_gap(domain):
    """max_{s in Y} <y - near, s - near> = 0, which is optimality itself."""
    y = points(domain.dim)
    near = domain.nearest(y)
    gap = ((y - near) * (domain.linear(near - y) - near)).sum(-1)
    assert (gap <= 1e-12 * (1 + y.norm(dim=-1))).all()


@pytest.mark.parametrize("domain", [Orthant(4), SecondOrderCone(4), PSD(3), ExponentialCone()], ids=lambda d: type(d).__name__)
def test_nearest_on_a_cone_is_orthogonal_to_its_residual(domain):
    y = points(domain.dim)
    near = domain.nearest(y)
    assert ((near * (y - near)).sum(-1).abs() <= 1e-12 * (1 + y.square().sum(-1))).all()


def constraints(domain: Domain) -> list[dict]:
    """Y for scipy."""
    match domain:
        case Simplex():
            return [{"type": "eq", "fun": lambda y: y.sum() - 1}]
        case CappedSimplex():
            return [{"type": "eq", "fun": lambda y: y.sum() - domain.k}]
        case SecondOrderCone():
            return [{"type": "ineq", "fun": lambda y: y[-1] - np.sqrt((y[:-1] ** 2).sum() + 1e-18)}]
        case ExponentialCone():
            return [{"type": "ineq", "fun": lambda y: y[2] - y[1] * np.exp(min(y[0] / y[1], 50.0))}]
        case Birkhoff():
            m = domain.size
            return [{"type": "eq", "fun": lambda y, a=a: y.reshape(m, m).sum(a)[: m - a] - 1} for a in (0, 1)]
    raise AssertionError(domain)


@pytest.mark.parametrize(
    "domain",
    [Simplex(4), CappedSimplex(5, 2), CappedSimplex(5, 1.5), SecondOrderCone(3), ExponentialCone(), Birkhoff(3)],
    ids=lambda d: type(d).__name__,
)
def test_nearest_is_what_scipy_finds(domain):
    low, high = {
        SecondOrderCone: (-np.inf, np.inf),
        ExponentialCone: (np.array([-np.inf, 1e-9, 0.0]), np.inf),
        Simplex: (0.0, np.inf),
        Birkhoff: (0.0, np.inf),
        CappedSimplex: (0.0, 1.0),
    }[type(domain)]
    torch.manual_seed(1)
    y = 1.5 * torch.randn(8, domain.dim, dtype=torch.float64)
    near = domain.nearest(y)
    start = domain.project(torch.full((1, domain.inputs), 0.7, dtype=torch.float64))[0].numpy()
    for given, found in zip(y.numpy(), near.numpy(), strict=True):
        reference = scipy.optimize.minimize(
            lambda s, given=given: 0.5 * ((s - given) ** 2).sum(), start, jac=lambda s, given=given: s - given, method="SLSQP",
            bounds=scipy.optimize.Bounds(low, high), constraints=constraints(domain), options={"ftol": 1e-14, "maxiter": 300},
        )  # fmt: skip
        np.testing.assert_allclose(found, reference.x, atol=2e-5)


def test_nearest_psd_is_numpys_clipped_spectrum():
    domain, y = PSD(3), points(9)
    for given, found in zip(y.numpy(), domain.nearest(y).numpy(), strict=True):
        matrix = given.reshape(3, 3)
        w, q = np.linalg.eigh((matrix + matrix.T) / 2)
        np.testing.assert_allclose(found.reshape(3, 3), q @ np.diag(w.clip(0)) @ q.T, atol=1e-12 * (1 + abs(given).max()))


def test_nearest_on_the_sphere_is_nearer_than_any_other_point():
    domain, y = Sphere(3), points(3)
    others = domain.project(torch.randn(200, 3, dtype=torch.float64))
    assert (distance(y, domain.nearest(y))[:, None] <= torch.cdist(y, others) + 1e-12).all()


AWKWARD = [
    *[(1e-8, -1.0, 1.0), (-1.0, 1e-8, -1.0), (-1e3, 1.0, -1e-6), (1.0, -1e3, 1e-6), (1e-3, 1e3, -1e3)],
    *[(0.0, 1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (1.0, 1.0, 2.0), (1e-200, 1.0, -1e200)],
]


@pytest.mark.parametrize("v", AWKWARD)
def test_the_exponential_cone_at_its_awkward_points(v):
    """Moreau: v = near - far, with far in the dual cone and orthogonal to near."""
    v = torch.tensor([v], dtype=torch.float64)
    near = ExponentialCone().nearest(v)
    assert feasible(ExponentialCone(), near / v.abs().max(), 1e-12)
    far = (near - v)[0] / v.abs().max()
    assert abs((near[0] / v.abs().max() * far).sum()) <= 1e-12
    a, b, c = far.tolist()  # the dual: a < 0 and -a exp(b / a - 1) <= c, or a = 0 and b, c >= 0
    assert (a < 0 and -a * np.exp(b / a - 1) <= c + 1e-9) or (abs(a) <= 1e-12 and b >= -1e-12 and c >= -1e-12)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-14), (torch.float32, 5e-6)], ids=["float64", "float32"])
def test_the_exponential_cone_splits_points_of_all_sizes_and_shapes(dtype, tol):
    """Moreau's decomposition: v is a point of the cone and one of its polar, at a right angle."""
    torch.manual_seed(0)
    v = torch.randn(20_000, 3, dtype=dtype)
    v = torch.cat([v, v * (6 * torch.randn_like(v)).exp()])
    v, cone = v / v.abs().amax(-1, keepdim=True), ExponentialCone()
    near = cone.nearest(v)
    far = v - near
    assert (near * far).sum(-1).abs().max() <= tol
    assert distance(cone.nearest(near), near).max() <= tol
    assert cone.nearest(far).norm(dim=-1).max() <= tol


# --- derivatives


def smooth_points(size: int) -> torch.Tensor:
    torch.manual_seed(3)
    return (1.5 * torch.randn(12, size, dtype=torch.float64)).requires_grad_()


def test_project_and_nearest_have_the_derivatives_of_finite_differences(domain):
    assert gradcheck(domain.project, smooth_points(domain.inputs), atol=1e-6, fast_mode=True)
    assert gradcheck(domain.nearest, smooth_points(domain.dim), atol=1e-6, fast_mode=True)
    assert gradcheck(domain.act, (smooth_points(domain.inputs).tanh(),), atol=1e-6, fast_mode=True)


@where(without=("product", "birkhoff"))
def test_second_derivatives_are_right_too(domain):
    assert gradgradcheck(domain.project, smooth_points(domain.inputs)[:3].detach().requires_grad_(), atol=1e-5, fast_mode=True)


def test_derivatives_are_finite_everywhere(domain):
    for call, size in ((domain.project, domain.inputs), (domain.nearest, domain.dim), (domain.violation, domain.dim)):
        v = points(size).requires_grad_()
        (slope,) = torch.autograd.grad(call(v).sum(), v, allow_unused=isinstance(domain, Euclid))
        if slope is not None:
            assert slope.isfinite().all()


@where(without=NOT_CONVEX)
def test_nearest_bends_and_never_stretches(domain):
    """The derivative of a projection onto a convex set is symmetric, with eigenvalues in [0, 1]."""
    y = torch.cat([points(domain.dim)[:40], torch.randn(100, domain.dim, dtype=torch.float64) * 3]).requires_grad_()
    near = domain.nearest(y)
    rows = [torch.autograd.grad(near[:, i].sum(), y, retain_graph=True)[0] for i in range(domain.dim)]
    jacobian = torch.stack(rows, dim=-2)
    torch.testing.assert_close(jacobian, jacobian.mT, atol=1e-8, rtol=0)
    w = torch.linalg.eigvalsh(jacobian)
    assert w.min() >= -1e-8
    assert w.max() <= 1 + 1e-8


def test_psd_has_a_derivative_at_repeated_eigenvalues():
    a = torch.stack([torch.eye(3), -torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0]))]).double()
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert gradcheck(PSD(3).nearest, (q @ a @ q.mT).flatten(-2).requires_grad_(), atol=1e-6, fast_mode=True)


def test_psd_has_second_derivatives_at_repeated_eigenvalues():
    """f(A + e E) for f(A) = <G, clip(A)>, by central differences of its exact gradient."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    a = q @ torch.diag(torch.tensor([1.0, 1.0, -0.5, -0.5]).double()) @ q.mT
    g, e = torch.randn(2, 16, dtype=torch.float64)

    def gradient(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(PSD(4).nearest(v).square() @ g, v, create_graph=True)[0]

    v = a.reshape(1, 16).requires_grad_()
    (bent,) = torch.autograd.grad((gradient(v) * e).sum(), v)
    along = e.reshape(4, 4) + e.reshape(4, 4).mT
    step = 1e-5 * along.reshape(1, 16) / 2
    ahead, behind = (gradient((a.reshape(1, 16) + sign * step).detach().requires_grad_()) for sign in (1, -1))
    torch.testing.assert_close(bent, ((ahead - behind) / 2e-5).detach(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 2.5])
def test_lml_is_the_minimum_of_its_entropic_problem(k):
    """v - logit(y) is the multiplier of sum y = k, one number; and dy/dv has a closed form (Amos, Koltun and Kolter, 2019)."""
    torch.manual_seed(0)
    v = (2 * torch.randn(20, 7, dtype=torch.float64)).requires_grad_()
    y = CappedSimplex(7, k).project(v)
    assert (y.sum(-1) - k).abs().max() < 1e-13
    multiplier = v - y.logit()
    assert (multiplier - multiplier.mean(-1, keepdim=True)).abs().max() < 1e-10
    slope = (y * (1 - y)).detach()
    expected = slope.diag_embed() - slope[:, :, None] * slope[:, None, :] / slope.sum(-1)[:, None, None]
    for i in range(7):
        (row,) = torch.autograd.grad(y[:, i].sum(), v, retain_graph=True)
        torch.testing.assert_close(row, expected[:, i], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_lml_hardens_into_the_k_largest(dtype, tol):
    torch.manual_seed(0)
    v = 1e3 * torch.rand(30, 8).argsort(-1).to(dtype)
    y = CappedSimplex(8, 3).project(v)
    torch.testing.assert_close(y, CappedSimplex(8, 3).linear(-v), atol=tol, rtol=0)


# --- linear


@where(without=UNBOUNDED)
def test_linear_beats_every_feasible_point(domain):
    g = points(domain.dim)
    s = domain.linear(g)
    assert feasible(domain, s, 1e-12)
    others = domain.project(torch.cat([points(domain.inputs), 3 * torch.randn(200, domain.inputs, dtype=torch.float64)]))
    assert ((g * s).sum(-1)[:, None] <= g @ others.mT + 1e-9).all()


@pytest.mark.parametrize("name", UNBOUNDED)
def test_linear_over_an_unbounded_set_is_refused(name):
    domain = DOMAINS[name]
    unbounded = "ExponentialCone" if name == "product" else type(domain).__name__
    with pytest.raises(UserError, match=rf"{unbounded}\.linear: this set is unbounded"):
        domain.linear(torch.ones(2, domain.dim, dtype=torch.float64))


# --- every scale

BEYOND = DOMAINS | {
    "box, one": Box([0.1], [0.3]),
    "box, of all sizes": Box([1e-6, -1e30, -1e30], [1e30, -1e-6, 1e30]),
    "orthant, one": Orthant(1),
    "simplex, two": Simplex(2),
    "capped, two": CappedSimplex(2, 1),
    "capped, nearly none": CappedSimplex(5, 1e-3),
    "capped, nearly all": CappedSimplex(5, 4.999),
    "capped, many": CappedSimplex(12, 7.25),
    "sphere, one": Sphere(1),
    "sphere, two": Sphere(2),
    "second-order cone, two": SecondOrderCone(2),
    "psd, one": PSD(1),
    "psd, two": PSD(2),
    "birkhoff, nine": Birkhoff(9),
    "mean and log std": MeanLogStd(2, -20.0, 2.0),
}
SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e8, 1e16, 1e30)
EXACT = np.longdouble  # wider than what is tested
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def over(*kinds: type):
    """Parametrises over the domains of these kinds."""
    named = {name: domain for name, domain in BEYOND.items() if isinstance(domain, kinds)}
    return pytest.mark.parametrize("domain", list(named.values()), ids=list(named))


def everywhere(size: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, size): at every scale ordinary points, ties, equal ones and one large coordinate; and all scales in one point."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64)

    parts = [torch.zeros(1, size, dtype=torch.float64)]
    for scale in SCALES:
        ties, large = torch.randint(-2, 3, (8, size), generator=generator).double(), normal(4)
        large[:, 0] *= scale
        parts += [scale * normal(12), scale * ties, large, scale * torch.tensor([[1.0], [-1.0]]).double().expand(2, size)]
    powers = 36 * torch.rand(40, size, generator=generator, dtype=torch.float64) - 6
    parts.append(normal(40).sign() * 10**powers)
    parts.append(torch.tensor([1e30, 1.0, -1e30, 1e-6], dtype=torch.float64).repeat(size)[None, :size])
    return torch.cat(parts).to(dtype)


def outside(domain: Domain, y: np.ndarray) -> np.ndarray:
    """y (B, n) in EXACT -> by how much of its size each item breaks what defines Y, by the definition alone."""
    size = abs(y).max(-1).clip(1e-300)
    match domain:
        case Euclid():
            return 0 * size
        case Box():
            low, high = domain.low.numpy().astype(EXACT), domain.high.numpy().astype(EXACT)
            return np.maximum((low - y) / abs(low).clip(1e-9), (y - high) / abs(high).clip(1e-9)).max(-1)
        case Orthant():
            return -y.min(-1)
        case Simplex():
            return np.maximum(-y.min(-1), abs(y.sum(-1) - 1))
        case CappedSimplex():
            return np.maximum.reduce([-y.min(-1), y.max(-1) - 1, abs(y.sum(-1) - domain.k)])
        case Sphere():
            return abs(np.sqrt((y**2).sum(-1)) - 1)
        case SecondOrderCone():
            return np.sqrt(((y / size[:, None])[:, :-1] ** 2).sum(-1)) - y[:, -1] / size
        case PSD():
            matrix = (y / size[:, None]).astype(float).reshape(-1, domain.size, domain.size)
            return np.maximum(abs(matrix - matrix.swapaxes(1, 2)).max((1, 2)), -np.linalg.eigvalsh(matrix)[:, 0])
        case ExponentialCone():
            r, s, t = (y / size[:, None]).T
            power = np.divide(r, s, where=s > 0, out=np.zeros_like(r))
            above = np.where(s > 0, (s * np.exp(power) - t) / (1 + abs(power)), np.maximum(r, -s))
            return np.maximum(above, -t)
        case Birkhoff():
            matrix = y.reshape(-1, domain.size, domain.size)
            margins = np.concatenate([matrix.sum(1), matrix.sum(2)], -1)
            return np.maximum(-y.min(-1), abs(margins - 1).max(-1))
        case Ball():
            return np.sqrt((y**2).sum(-1)) / 2 - 1
        case Affine():
            first, second = y[:, 0] + 2 * y[:, 1] - y[:, 3] - 1, y[:, 1:].sum(-1) + 0.5
            return np.maximum(abs(first), abs(second)) / (1 + size)
        case Polyhedron():
            return np.maximum.reduce([-y.min(-1), y.max(-1) - EXACT("0.6"), abs(y.sum(-1) - 1)])
        case Product():
            parts = np.split(y, np.cumsum(domain.sizes)[:-1], -1)
            return np.maximum.reduce([outside(d, part) for d, part in zip(domain.domains, parts, strict=True)])
        case MeanLogStd():
            (low, high), n = domain.bounds, domain.dim // 2
            return np.maximum(low - y[:, n:], y[:, n:] - high).max(-1)
    raise AssertionError(domain)


def rounding(domain: Domain, dtype: torch.dtype) -> float:
    return 16 * max(domain.dim, 4) * torch.finfo(dtype).eps


@PRECISIONS
@over(Domain)
def test_every_answer_is_in_y_at_every_scale(domain, dtype):
    y, tol = everywhere(domain.dim, dtype), rounding(domain, dtype)
    answers = [domain.nearest(y), domain.project(everywhere(domain.inputs, dtype))]
    with contextlib.suppress(UserError):
        answers.append(domain.linear(y))
    for found in answers:
        assert found.dtype == dtype
        assert found.isfinite().all()
        size = 1 + found.abs().amax(-1)
        assert outside(domain, found.numpy().astype(EXACT)).max() <= tol
        assert (domain.violation(found) <= tol * size).all()
        assert ((domain.nearest(found) - found).abs().amax(-1) <= tol * size).all()


@PRECISIONS
@over(Domain)
def test_derivatives_are_finite_at_every_scale(domain, dtype):
    for call, size in ((domain.project, domain.inputs), (domain.nearest, domain.dim), (domain.violation, domain.dim)):
        y = everywhere(size, dtype).requires_grad_()
        value = call(y)
        (slope,) = torch.autograd.grad(value.sum(), y)
        assert value.isfinite().all()
        assert slope.isfinite().all()


def by_fractions(domain: Domain, y: list[float]) -> list[Fraction]:
    """The nearest point without any rounding."""
    exact = [Fraction(one) for one in y]
    match domain:
        case Box():
            ends = zip(domain.low.tolist(), domain.high.tolist(), strict=True)
            return [min(max(one, Fraction(low)), Fraction(high)) for one, (low, high) in zip(exact, ends, strict=True)]
        case Orthant():
            return [max(one, Fraction(0)) for one in exact]
    k = Fraction(domain.k) if isinstance(domain, CappedSimplex) else Fraction(1)

    def filled(tau: Fraction) -> list[Fraction]:
        return [min(max(one - tau, Fraction(0)), Fraction(1)) for one in exact]

    kinks = sorted({kink for one in exact for kink in (one, one - 1)})
    high = next(kink for kink in kinks if sum(filled(kink)) <= k)  # the sum falls as tau rises, and is linear below this kink
    low = max((kink for kink in kinks if kink < high), default=high - 1)
    above, below = sum(filled(high)), sum(filled(low))
    return filled(high if below == above else high - (high - low) * (k - above) / (below - above))


@PRECISIONS
@over(Box, Orthant, Simplex, CappedSimplex)
def test_nearest_on_a_polytope_is_exact_at_every_scale(domain, dtype):
    y = everywhere(domain.dim, dtype)
    for given, found in zip(y.tolist(), domain.nearest(y).tolist(), strict=True):
        for one, exact in zip(found, by_fractions(domain, given), strict=True):
            assert abs(Fraction(one) - exact) <= rounding(domain, dtype) * max(1, abs(exact))


def gain(domain: Domain, far: np.ndarray, near: np.ndarray) -> np.ndarray:
    """max_{s in Y} <far, s - near> (B,), over s of length 1 where Y is a cone: 0 is optimality itself, for far = y - near."""
    lost = (far * near).sum(-1)
    match domain:
        case Orthant():
            best = far.max(-1)
        case SecondOrderCone():
            best = np.sqrt((far[:, :-1] ** 2).sum(-1)) + far[:, -1]
        case PSD():
            size = abs(far).max(-1).clip(1e-300)
            matrix = (far / size[:, None]).astype(float).reshape(-1, domain.size, domain.size)
            best = size * np.linalg.eigvalsh((matrix + matrix.swapaxes(1, 2)) / 2)[:, -1]
        case ExponentialCone():
            rho = np.linspace(-60, 60, 24_001, dtype=EXACT)
            rays = np.stack([rho, np.ones_like(rho), np.exp(rho)])
            flat = np.array([[-1, 0], [0, 0], [0, 1]], dtype=EXACT)
            best = (far @ np.concatenate([rays / np.sqrt((rays**2).sum(0)), flat], -1)).max(-1)
        case Birkhoff():
            matrices = far.astype(float).reshape(-1, domain.size, domain.size)
            best = np.array([m[scipy.optimize.linear_sum_assignment(-m)].sum() for m in matrices])
    if isinstance(domain, Birkhoff):
        return best - lost
    return np.maximum(best, abs(lost) / np.sqrt((near**2).sum(-1)).clip(1e-300))


@PRECISIONS
@over(SecondOrderCone, PSD, ExponentialCone, Birkhoff)
def test_no_point_is_nearer_at_any_scale(domain, dtype):
    y = everywhere(domain.dim, dtype)
    exact, near = y.numpy().astype(EXACT), domain.nearest(y).numpy().astype(EXACT)
    size = abs(exact).max(-1) + abs(near).max(-1)
    assert (gain(domain, exact - near, near) <= rounding(domain, dtype) * size).all()


@PRECISIONS
@over(Sphere)
def test_nearest_on_the_sphere_has_the_direction_at_every_scale(domain, dtype):
    y = everywhere(domain.dim, dtype)[1:]
    y = y[y.abs().amax(-1) > 0]
    exact = y.numpy().astype(EXACT)
    exact = exact / abs(exact).max(-1, keepdims=True)
    expected = exact / np.sqrt((exact**2).sum(-1, keepdims=True))
    assert abs(domain.nearest(y).numpy() - expected).max() <= rounding(domain, dtype)


def test_a_projection_of_large_numbers_fills_k():
    """What was found: all ones, whose sum is 5."""
    y = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]) * 2**25
    assert CappedSimplex(5, 2).nearest(y).tolist() == [[1, 1, 0, 0, 0]]


@PRECISIONS
@pytest.mark.parametrize("k", [2, 1.5, 1e-3])
def test_lml_fills_k_at_every_scale(k, dtype):
    """y_i = 1 / (1 + exp(-v_i - nu)), the root nu by bisection with 80 digits."""
    v = everywhere(5, dtype)[::5]
    with mpmath.workdps(80):
        for given, found in zip(v.tolist(), CappedSimplex(5, k).project(v).tolist(), strict=True):
            low, high = -max(given) - mpmath.mpf(1e3), -min(given) + mpmath.mpf(1e3)
            for _ in range(220):
                nu = (low + high) / 2
                y = [1 / (1 + mpmath.exp(-mpmath.mpf(one) - nu)) for one in given]
                low, high = (nu, high) if sum(y) < k else (low, nu)
            np.testing.assert_allclose(found, [float(one) for one in y], atol=200 * torch.finfo(dtype).eps, rtol=0)


# --- rows


def test_an_item_does_not_depend_on_its_neighbours(domain):
    for call, size in ((domain.project, domain.inputs), (domain.nearest, domain.dim), (domain.violation, domain.dim)):
        v = points(size)
        together = call(v)
        for i in (0, 15, 45, 60, 85, 95):
            alone = call(v[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], atol=1e-12 * (1 + v[i].norm().item()), rtol=0)


def test_an_item_that_is_not_finite_spoils_no_other(domain):
    v = torch.randn(4, domain.inputs, dtype=torch.float64)
    spoiled = v.index_fill(0, torch.tensor([1]), torch.nan)
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(domain.project(spoiled)[kept], domain.project(v)[kept], atol=1e-13, rtol=0)


def test_act_reaches_the_whole_box_and_most_of_a_simplex():
    corner = torch.tensor([[1.0, -1.0, 1.0]])
    assert torch.equal(DOMAINS["box"].act(corner), torch.tensor([[2.0, 0.0, 3.0]]))
    assert Simplex(3).act(torch.tensor([[1.0, -1.0, -1.0]])).max() > 0.99


# --- densities

DENSITIES = [Gaussian(3), SquashedGaussian(3)]


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: type(d).__name__)
def test_density_bounds_log_std_alone(density):
    lam = torch.tensor([[-50.0, 0.0, 50.0, -50.0, 0.0, 50.0]])
    expected = torch.tensor([[-50.0, 0.0, 50.0, -20.0, 0.0, 2.0]])
    y = density.parameters
    assert torch.equal(y.project(lam), expected)
    assert torch.equal(y.nearest(lam), expected)
    torch.testing.assert_close(y.violation(lam), torch.tensor([(30.0**2 + 48.0**2) ** 0.5]))
    assert (y.dim, y.inputs, density.dim) == (6, 6, 3)


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: type(d).__name__)
def test_density_draws_what_it_samples_around_its_median(density):
    lam = torch.tensor([0.3, -0.5, 0.0, 0.1, -1.0, -2.0], dtype=torch.float64).expand(40_001, 6)
    torch.manual_seed(0)
    y, _ = density.sample(lam)
    torch.manual_seed(0)
    assert torch.equal(density.draw(lam), y)
    noise = torch.randn(40_001, 3, dtype=torch.float64)
    assert torch.equal(density.draw(lam, noise), density.draw(lam, noise))
    assert torch.equal(density.sample(lam, noise)[0], density.draw(lam, noise))
    torch.testing.assert_close(y.median(0).values, density.median(lam)[0], atol=0.02, rtol=0)


def test_gaussian_density_is_torchs():
    lam = torch.randn(5, 6, dtype=torch.float64)
    density, reference = Gaussian(3), torch.distributions.Normal(lam[:, :3], lam[:, 3:].exp())
    y, logq = density.sample(lam)
    torch.testing.assert_close(logq, reference.log_prob(y).sum(-1))
    standard = torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(density.kl(lam), torch.distributions.kl_divergence(reference, standard).sum(-1))
    assert torch.equal(density.kl(torch.zeros(1, 6)), torch.zeros(1))


# --- arguments


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Euclid(0), "Euclid.dim"),
        (lambda: Orthant(-1), "Orthant.dim"),
        (lambda: Simplex(2.0), "Simplex.dim"),
        (lambda: CappedSimplex(0, 1), "CappedSimplex.dim"),
        (lambda: CappedSimplex(3, 0), "CappedSimplex.k"),
        (lambda: CappedSimplex(3, 3), "CappedSimplex.k"),
        (lambda: Sphere(0), "Sphere.dim"),
        (lambda: SecondOrderCone(0), "SecondOrderCone.dim"),
        (lambda: PSD(0), "PSD.size"),
        (lambda: Birkhoff(0), "Birkhoff.size"),
        (lambda: Box([], []), "Box.low"),
        (lambda: Box([0.0, 0.0], [1.0]), "Box.high"),
        (lambda: Box([0.0, 1.0], [1.0, 1.0]), "Box.low"),
        (lambda: Box([0.0], [float("inf")]), "Box.low"),
        (lambda: Box([float("nan")], [1.0]), "Box.low"),
        (lambda: Box(0.0, 1.0), "Box.low: 0.0 is given; a list of numbers"),
        (lambda: Box([0.0], 1.0), "Box.high: 1.0 is given; a list of numbers"),
        (lambda: Box(None, None), "Box.low: None is given"),
        (lambda: Box(["0"], ["1"]), "Box.low"),
        (lambda: Box([[0.0]], [[1.0]]), "Box.low"),
        (lambda: Box(torch.tensor(0.0), torch.tensor(1.0)), "Box.low"),
        (lambda: Box([0.0, [1.0]], [1.0, 2.0]), "Box.low"),
        (lambda: Simplex("3"), "Simplex.dim: '3' is given"),
        (lambda: Simplex(None), "Simplex.dim"),
        (lambda: Simplex(True), "Simplex.dim"),
        (lambda: CappedSimplex(3, "2"), "CappedSimplex.k: '2' is given"),
        (lambda: CappedSimplex(3, None), "CappedSimplex.k"),
        (lambda: CappedSimplex(3, float("nan")), "CappedSimplex.k"),
        (lambda: Product(Simplex(2)), "Product.domains: a Simplex is given"),
        (lambda: Product([2]), r"Product.domains\[0\]"),
        (lambda: Gaussian(1, "low", 2.0), "Gaussian.log_std_low: 'low' is given"),
        (lambda: SquashedGaussian(1, 2.0, 2.0), "SquashedGaussian.log_std_low"),
        (lambda: Product([]), "Product.domains"),
        (lambda: Product([Simplex(2), Gaussian(2)]), r"Product.domains\[1\]"),
        (lambda: Gaussian(0), "Gaussian.dim"),
        (lambda: Gaussian(1, 2.0, 2.0), "Gaussian.log_std_low"),
        (lambda: SquashedGaussian(0), "SquashedGaussian.dim"),
    ],
)
def test_bad_arguments_are_named(make, field):
    with pytest.raises(UserError, match=rf"^{field}.* needed"):
        make()


def test_what_pytorch_users_hold_is_taken():
    """Tensors and arrays for bounds, NumPy's and torch's integers for sizes."""
    low, high = [-1.0, 0.0], [1.0, 3.0]
    expected = Box(low, high).nearest(torch.tensor([[-9.0, 9.0]]))
    for given in (torch.tensor, np.array, tuple):
        assert torch.equal(Box(given(low), given(high)).nearest(torch.tensor([[-9.0, 9.0]])), expected)
    assert Simplex(np.int64(3)).dim == Simplex(torch.tensor(3)).dim == 3
    assert CappedSimplex(3, np.float32(2)).k == CappedSimplex(3, torch.tensor(2)).k == 2


def test_a_box_keeps_its_bounds_where_they_round():
    """offset - scale is 0 for these in float32; nothing that a model or a solver plays may lie below the bound."""
    box = Box([1e-8], [1.0])
    far = torch.tensor([[-1e9]])
    for found in (box.project(far), box.nearest(far), box.linear(-far), box.act(far.clamp(min=-1)), box.uniform(99)):
        assert found.min() >= torch.tensor(1e-8)
    assert box.nearest(far.double()).item() == 1e-8
