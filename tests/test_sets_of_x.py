"""Sets whose data come from x: projections beside a reference solver, derivatives in all data, and items that stay apart."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rlamort as ra
from rlamort import Affine, Ball, Box, PerItem, Polyhedron, Product, Simplex, UserError

INF = float("inf")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def random(kind: str, items: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Data of sets that contain a point, by the names of Polyhedron, and points outside."""
    torch.manual_seed(len(kind))
    n, m, k = 6, 9, 2
    A, E, centre, y = normal(m, n), normal(k, n), normal(items, n), 3 * normal(items, n)
    room = [uniform(items, m), uniform(items, m)]
    if kind == "redundant rows":
        A = torch.cat([A[:4], A[:3], A[1:3] + A[:2]])
        E = torch.cat([E[:1], 2 * E[:1]])
    if kind == "vertices":
        A, m, y = normal(30, n), 30, 100 * y
        room = [uniform(items, m), uniform(items, m)]
    w = centre @ A.mT
    low, high = w - room[0], w + room[1]
    if kind == "one-sided":
        low = torch.full_like(low, -INF)
    if kind == "equal bounds":
        low[:, :3] = high[:, :3] = w[:, :3]
    if kind == "touching":  # bounds that hold with equality at the centre, some from both sides
        low, high = w - room[0] * (room[0] > 0.5), w + room[1] * (room[1] > 0.5)
    if kind == "free":
        low, high = low - INF, high + INF
    if kind == "no equalities":
        return {"A": A, "low": low, "high": high}, y
    if kind == "far":
        y = 1e8 * y
    if kind == "inside":
        y = centre
    return {"A": A, "low": low, "high": high, "E": E, "b": centre @ E.mT}, y


KINDS = ("ordinary", "redundant rows", "vertices", "one-sided", "equal bounds", "touching", "free", "no equalities", "far",
         "inside")  # fmt: skip


def per_item(data: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {name: part.expand(len(y), *part.shape).clone() if name in "AE" else part for name, part in data.items()}


def declared(data: dict[str, Tensor], fixed: str = "AE") -> Polyhedron:
    return Polyhedron(**{name: part if name in fixed else PerItem(*part.shape[1:]) for name, part in data.items()})


def bound(data: dict[str, Tensor], y: Tensor, matrices: str) -> Polyhedron:
    """With matrices that are fixed, or come with each item."""
    if matrices == "one per item":
        data = {**data, "A": per_item(data, y)["A"]}
        return declared(data, "E").bind({name: part for name, part in data.items() if name != "E"})
    if matrices == "fixed":
        return declared(data).bind({name: part for name, part in data.items() if name not in "AE"})
    data = per_item(data, y)
    return declared(data, "").bind(data)


def reference(data: dict[str, Tensor], y: Tensor) -> Tensor:
    """Least-distance programming by nonnegative least squares (Lawson and Hanson, 1974, chapter 23)."""
    found = []
    for i in range(len(y)):
        A, low, high = (part.numpy() for part in (data["A"], data["low"][i], data["high"][i]))
        E, b = (data["E"].numpy(), data["b"][i].numpy()) if "E" in data else (A[:0], low[:0])
        up, down = np.isfinite(high), np.isfinite(low)
        G = np.concatenate([-A[up], A[down], E, -E])
        h = np.concatenate([-high[up], low[down], b, -b]) - G @ y[i].numpy()
        scale = max(1.0, np.abs(h).max(initial=0.0))
        z, _ = nnls(np.concatenate([G.T, h[None] / scale]), np.eye(y.shape[1] + 1)[-1], maxiter=10_000)
        r = np.concatenate([G.T, h[None] / scale]) @ z - np.eye(y.shape[1] + 1)[-1]
        found.append(y[i].numpy() - scale * r[:-1] / r[-1])
    return torch.tensor(np.stack(found))


# --- nearest


@pytest.mark.parametrize("matrices", ["fixed", "one per item", "per item"])
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_is_the_reference_solver_s(kind, matrices):
    data, y = random(kind)
    domain = bound(data, y, matrices)
    near = domain.nearest(y)
    size = 1 + y.norm(dim=-1)
    assert (domain.violation(near) <= 1e-12 * (1 + near.norm(dim=-1))).all()
    assert ((near - reference(data, y)).norm(dim=-1) <= 1e-8 * size).all()
    assert not domain.empty().any()
    if kind == "inside":
        torch.testing.assert_close(near, y, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_no_item_is_lost_among_many_with_nearly_dependent_rows(seed):
    """Half of the bounds hold from both sides or one at a common point, and most rows are combinations of five."""
    torch.manual_seed(100 + seed)
    rows = normal(30, 20)
    A = torch.cat([rows, rows[:10], normal(10, 5) @ rows[:5]])
    w = normal(400, 20) @ A.mT
    room = [uniform(*w.shape) * (uniform(*w.shape) > 0.3) for _ in range(2)]
    data, y = {"A": A, "low": w - room[0], "high": w + room[1]}, 10 * normal(400, 20)
    domain = bound(data, y, "fixed")
    near = domain.nearest(y)
    assert (domain.violation(near) <= 1e-12 * (1 + near.norm(dim=-1))).all()
    assert not domain.empty().any()
    few = {name: part if name == "A" else part[:40] for name, part in data.items()}
    torch.testing.assert_close(near[:40], reference(few, y[:40]), rtol=1e-9, atol=1e-9)


def test_emptiness_is_what_a_linear_program_says():
    torch.manual_seed(0)
    A, centre = normal(12, 4), normal(150, 12)
    low, high = centre - 3 * uniform(150, 12), centre + 5 * uniform(150, 12)
    domain = bound({"A": A, "low": low, "high": high}, normal(150, 4), "fixed")
    rows = np.concatenate([A.numpy(), -A.numpy()])
    ends = torch.cat([high, -low], -1).numpy()
    feasible = [linprog(np.zeros(4), rows, end, bounds=(None, None)).status == 0 for end in ends]
    assert 20 < sum(feasible) < 130
    assert domain.empty().logical_not().tolist() == feasible
    off = domain.violation(domain.nearest(normal(150, 4)))
    assert ((off <= 1e-12) == torch.tensor(feasible)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_is_idempotent_and_does_not_expand(kind):
    data, y = random(kind)
    domain = bound(data, y, "fixed")
    near, other = domain.nearest(y), domain.nearest(y + 0.5 * normal(*y.shape))
    again = domain.nearest(near)
    assert ((again - near).norm(dim=-1) <= 1e-11 * (1 + near.norm(dim=-1))).all()
    moved = y + normal(*y.shape)
    assert ((domain.nearest(moved) - near).norm(dim=-1) <= (moved - y).norm(dim=-1) + 1e-14 * y.norm(dim=-1)).all()
    assert other.isfinite().all()


def test_violation_asks_nothing_of_nearest_and_is_the_farthest_row():
    data, y = random("ordinary")
    domain = bound(data, y, "per item")
    rows = torch.cat([data["A"], data["E"]])
    low, high = torch.cat([data["low"], data["b"]], -1), torch.cat([data["high"], data["b"]], -1)
    w = y @ rows.mT
    off = torch.maximum(low - w, w - high).clamp(min=0) / rows.norm(dim=-1)
    torch.testing.assert_close(domain.violation(y), off.amax(-1))
    domain.nearest = lambda y: y
    assert domain.violation(y).min() > 0.1


@pytest.mark.parametrize("kind", ["ordinary", "equal bounds", "redundant rows"])
def test_scaling_a_row_leaves_the_answer(kind):
    data, y = random(kind)
    scale, of_b = torch.ones(9, dtype=torch.float64), torch.tensor([1e3, 1e-3], dtype=torch.float64)
    scale[::2] = 1e3
    scaled = {
        "A": data["A"] * scale[:, None], "low": data["low"] * scale, "high": data["high"] * scale,
        "E": data["E"] * of_b[:, None], "b": data["b"] * of_b,
    }  # fmt: skip
    for matrices in ("fixed", "per item"):
        before, after = bound(data, y, matrices), bound(scaled, y, matrices)
        torch.testing.assert_close(after.nearest(y), before.nearest(y), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(after.violation(y), before.violation(y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_answers_are_near_those_of_float64(kind):
    data, y = random(kind)
    domain = bound(data, y, "fixed")
    y = y.float()
    near = domain.nearest(y)
    assert near.dtype == torch.float32
    assert ((near - domain.nearest(y.double())).norm(dim=-1) <= 1e-6 * (1 + near.norm(dim=-1))).all()
    assert (domain.violation(near) <= 1e-6 * (1 + near.norm(dim=-1))).all()


# --- derivatives


@pytest.mark.parametrize("kind", ["ordinary", "one-sided", "no equalities"])
def test_derivatives_in_y_and_in_all_data_are_finite_differences(kind):
    data, y = random(kind, items=2)
    data = per_item(data, y)
    domain, names = declared(data, ""), list(data)
    infinite = [name for name in names if not data[name].isfinite().all()]

    def nearest(y, *parts):
        return domain.bind({**dict(zip(names, parts, strict=True)), **{name: data[name] for name in infinite}}).nearest(y)

    parts = [y, *(data[name] for name in names)]
    parts = [part.requires_grad_(part.isfinite().all().item()) for part in parts]
    assert gradcheck(nearest, parts)
    assert gradgradcheck(nearest, parts, fast_mode=True)


def test_derivatives_with_fixed_matrices_and_of_the_chart_are_finite_differences():
    data, _ = random("ordinary", items=3)
    domain = declared(data)
    parts = [data[name].requires_grad_() for name in ("low", "high", "b")]

    def project(v, low, high, b):
        return domain.bind({"low": low, "high": high, "b": b}).project(v)

    assert domain.inputs == 4
    assert gradcheck(project, [normal(3, 4).requires_grad_(), *parts])
    affine = Affine(PerItem(2, 4), PerItem(2))
    parts = [normal(3, 4), normal(3, 2, 4), normal(3, 2)]
    parts = [part.requires_grad_() for part in parts]
    assert gradcheck(lambda y, A, b: affine.bind({"A": A, "b": b}).nearest(y), parts)
    assert gradgradcheck(lambda y, A, b: affine.bind({"A": A, "b": b}).nearest(y), parts)


def test_derivatives_of_boxes_and_balls_are_finite_differences():
    box, ball = Box(PerItem(3), PerItem(3)), Ball(3, PerItem())
    y, low = 2 * normal(5, 3), normal(5, 3)
    parts = [part.requires_grad_() for part in (y, low, low.detach() + 0.5 + uniform(5, 3))]
    for method in ("project", "nearest"):
        assert gradcheck(lambda y, low, high, method=method: getattr(box.bind({"low": low, "high": high}), method)(y), parts)
        radius = (0.5 + uniform(5)).requires_grad_()
        assert gradcheck(lambda y, radius, method=method: getattr(ball.bind({"radius": radius}), method)(y), [parts[0], radius])
    v = torch.zeros(2, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda v: Ball(3, 2.0).project(v), [v])


# --- charts


def test_completion_keeps_equalities_exactly():
    A = torch.cat([normal(3, 8), torch.zeros(1, 8)])
    A[3] = A[0] - 2 * A[1]  # dependent, and consistent
    b = normal(5, 8) @ A.mT
    domain = Affine(A, PerItem(4))
    affine = domain.bind({"b": b})
    y = affine.project(10 * normal(5, domain.inputs))
    assert domain.inputs == 5
    assert (affine.violation(y) <= 1e-13 * (1 + y.norm(dim=-1))).all()
    v = normal(5, 5)
    torch.testing.assert_close((affine.project(v) - affine.project(0 * v)).norm(dim=-1), v.norm(dim=-1))  # orthonormal


def test_box_and_ball_reach_their_sets_alone():
    low = normal(6, 3)
    box = Box(PerItem(3), [9.0] * 3).bind({"low": low})
    ball = Ball(3, PerItem()).bind({"radius": uniform(6)})
    v = 20 * normal(6, 3)
    for domain in (box, ball):
        for y in (domain.project(v), domain.nearest(v), domain.linear(v), domain.act(v.tanh())):
            assert (domain.violation(y) <= 1e-14).all()
        near, s = domain.nearest(v), domain.project(normal(6, 3))
        assert (((v - near) * (s - near)).sum(-1) <= 1e-12).all()
        assert ((v * (domain.linear(v) - s)).sum(-1) <= 1e-12).all()
    torch.testing.assert_close(Box([-1.0], [2.0]).nearest(v[:, :1]), v[:, :1].clamp(-1, 2))


def test_linear_is_a_vertex_and_says_where_there_is_none():
    data, g = random("ordinary", items=4)
    A = torch.cat([data["A"], torch.eye(6, dtype=torch.float64)])
    low, high = (torch.cat([data[name], end + data["low"][:, :6] * 0], -1) for name, end in (("low", -9.0), ("high", 9.0)))
    domain = Polyhedron(A, PerItem(15), PerItem(15), data["E"], PerItem(2)).bind({"low": low, "high": high, "b": data["b"]})
    vertex = domain.linear(g)
    assert (domain.violation(vertex) <= 1e-7).all()
    near = domain.nearest(3 * normal(4, 6))
    assert ((g * (vertex - near)).sum(-1) <= 1e-7).all()
    with pytest.raises(UserError, match=r"Polyhedron\.linear.*unbounded"):
        Polyhedron(torch.eye(2), 0.0, INF).linear(-torch.ones(1, 2))
    with pytest.raises(UserError, match=r"Affine\.linear.*unbounded"):
        Affine([[1.0, 1.0]], [1.0]).linear(torch.ones(1, 2))


def ends(domain: Polyhedron) -> bool:
    """Whether no coordinate is unbounded, by a linear program for each of its two ends."""
    try:
        for sign in (1, -1):
            for e in torch.eye(domain.dim, dtype=torch.float64):
                domain.linear(sign * e[None])
    except UserError:
        return False
    return True


def test_which_polyhedra_are_bounded():
    torch.manual_seed(0)
    found = []
    for i in range(40):
        rows, k = normal(2 + i % 5, 3), i % 2
        high = torch.where(uniform(len(rows)) < 0.2, INF, uniform(len(rows)))
        low = torch.where(uniform(len(rows)) < 0.7, -INF, -uniform(len(rows)))
        E = normal(k, 3) if k else None
        domain = Polyhedron(rows, low, high, E, None if E is None else torch.zeros(k))
        found.append(bool(domain.compact()))
        assert found[-1] == ends(domain), (rows, low, high, E)
    assert 10 < sum(found) < 30
    wedge = torch.tensor([[1.0, 1e-3], [1.0, -1e-3], [-1.0, 0.0]])  # bounded, but far out; and not without its last row
    assert Polyhedron(wedge, -INF, 1.0).compact()
    assert not Polyhedron(wedge[:2], -INF, 1.0).compact()
    strip = Polyhedron([[1.0, 1.0]], -1.0, 1.0)  # every linear program along its row has an answer
    assert not strip.compact()
    assert not Product([Simplex(2), strip]).compact()
    assert Product([Simplex(2), Ball(2, 1.0)]).compact()
    assert not Affine([[1.0, 1.0]], [1.0]).compact()


@pytest.mark.parametrize("matrices", ["fixed", "per item"])
def test_items_are_bounded_or_not_alone(matrices):
    A = torch.cat([torch.eye(2), torch.ones(1, 2)]).double()
    high = torch.tensor([[INF, INF, 1.0], [INF, INF, INF], [1.0, INF, INF], [1.0, 1.0, INF]], dtype=torch.float64)
    domain = Polyhedron(A if matrices == "fixed" else PerItem(3, 2), 0.0, PerItem(3))
    domain = domain.bind({"high": high} | ({} if matrices == "fixed" else {"A": A.expand(4, 3, 2)}))
    assert domain.compact().tolist() == [True, False, False, True]


# --- items


@pytest.mark.parametrize("matrices", ["fixed", "per item"])
def test_items_are_independent_of_their_neighbours(matrices):
    data, y = random("ordinary")
    alone = bound(data, y, matrices).nearest(y)
    low, high = data["low"].clone(), data["high"].clone()
    low[2], high[2] = low[2] + 50 * normal(9), low[2] + 50  # no point
    low[3, 1] = high[3, 1] + 1  # bounds that cross
    low[4, 0] = float("nan")
    domain = bound({**data, "low": low, "high": high}, y, matrices)
    y = y.clone().requires_grad_()
    near, kept = domain.nearest(y), [0, 1, *range(5, 12)]
    torch.testing.assert_close(near[kept], alone[kept], rtol=0, atol=1e-13)
    assert near[[2, 3]].isfinite().all()
    assert near[4].isnan().all()
    assert (domain.violation(near)[[2, 3]] > 0.1).all()
    assert domain.violation(near)[4].isnan()
    assert domain.empty().tolist() == [i in (2, 3) for i in range(12)]
    slope = torch.autograd.grad(near[kept].square().sum() + near[2].sum(), y)[0]
    assert slope[kept].isfinite().all()
    assert (slope[2] == 0).all()


def test_a_matrix_that_is_nan_or_changes_its_rank_concerns_its_item_alone():
    E, y = normal(5, 3, 4), normal(5, 4)
    E[1, 2], E[2, 1:], E[3] = E[1, 0] - E[1, 1], 0, 0  # of rank 2, 1 and 0
    b = (E @ normal(5, 4, 1))[..., 0]
    E[4, 0, 0] = float("nan")
    domain = Affine(PerItem(3, 4), PerItem(3)).bind({"A": E, "b": b})
    near = domain.nearest(y)
    assert (domain.violation(near)[:4] <= 1e-13).all()
    for i in range(4):
        expected = y[i] - torch.linalg.pinv(E[i]) @ (E[i] @ y[i] - b[i])
        torch.testing.assert_close(near[i], expected, rtol=1e-12, atol=1e-12)
    assert near[4].isnan().all()
    b[1, 2] += 1  # the dependent row contradicts the others
    torn = Affine(PerItem(3, 4), PerItem(3)).bind({"A": E, "b": b})
    assert torn.empty().tolist() == [False, True, False, False, False]
    assert torn.violation(torn.nearest(y))[1] > 0.01
    torch.testing.assert_close(torn.nearest(y)[[0, 2, 3]], near[[0, 2, 3]])


def test_the_answer_of_an_empty_set_is_its_least_squares_point():
    data, y = random("no equalities", items=6)
    low = data["low"] + 4 * normal(6, 9)
    high = low + 0.1
    domain = bound({**data, "low": low, "high": high}, y, "fixed")
    near, length = domain.nearest(y), data["A"].norm(dim=-1)
    assert domain.empty().all()
    w = near @ data["A"].mT
    off = (w - w.clamp(low, high)) / length
    stationary = off @ (data["A"] / length[:, None])
    assert (stationary.norm(dim=-1) <= 1e-6 * off.norm(dim=-1)).all()


class Dispatch(ra.Problem):
    """Meet a demand from bounded plants, of which some do not run."""

    domain = Polyhedron(torch.eye(4), 0.0, PerItem(4), torch.ones(1, 4), PerItem(1))
    hidden = ("truth",)

    def contexts(self, count):
        return {"truth": torch.full((count, 4), float("nan")), "price": torch.rand(count, 4), "demand": 0.5 + torch.rand(count)}

    def cost(self, y, x):
        return (x["price"] * y + y.square()).sum(-1)

    def domain_data(self, x):
        assert "truth" not in x
        return {"high": 0.3 + x["price"], "b": x["demand"][:, None]}


def test_a_problem_gives_its_set_from_x():
    problem = Dispatch()
    x = problem.layout.pack(problem.contexts(5))
    y = 3 * torch.randn(5, 4)
    domain = problem.domain.at(x)
    near = domain.nearest(y)
    price, demand = x[:, :4], x[:, 4]
    torch.testing.assert_close(near.sum(-1), demand)
    assert ((near >= -1e-6) & (near <= 0.3 + price + 1e-6)).all()
    assert (problem.domain.dim, problem.domain.inputs, domain.inputs) == (4, 3, 3)
    further = torch.cat([x, torch.full((5, 3), torch.nan)], -1)  # as those of oracles are
    torch.testing.assert_close(problem.domain.at(further).nearest(y), near)
    # repeated items, in blocks, one after the other, and side by side
    several = torch.stack([y, 2 * y, -y])
    expected = torch.stack([domain.nearest(part) for part in several])
    torch.testing.assert_close(problem.domain.at(x.repeat(3, 1)).nearest(several.flatten(0, 1)), expected.flatten(0, 1))
    between = problem.domain.at(x.repeat_interleave(3, 0)).nearest(several.transpose(0, 1).flatten(0, 1))
    torch.testing.assert_close(between, expected.transpose(0, 1).flatten(0, 1))
    torch.testing.assert_close(domain.nearest(several), expected)
    torch.testing.assert_close(domain.violation(several), torch.stack([domain.violation(part) for part in several]))
    torch.testing.assert_close(problem.domain.at(x[[3, 1]]).nearest(y[[3, 1]]), near[[3, 1]])


def test_the_answer_is_differentiable_in_the_parameters_that_give_the_set():
    class Learned(Dispatch):
        def __init__(self):
            super().__init__()
            self.reserve = torch.nn.Parameter(torch.tensor(0.1))

        def domain_data(self, x):
            return {**super().domain_data(x), "b": x["demand"][:, None] + self.reserve}

    problem = Learned()
    x = problem.layout.pack(problem.contexts(6))
    problem.domain.at(x).nearest(torch.randn(6, 4)).sum().backward()
    torch.testing.assert_close(problem.reserve.grad, torch.tensor(6.0))  # the sum of each answer is its demand


def test_sets_without_such_data_are_what_they_were():
    domain = Simplex(3)
    assert domain.at(torch.zeros(2, 5)) is domain
    assert domain.needs == {}
    assert domain.bind({}) is domain


def test_a_copy_of_a_problem_asks_the_copy_and_a_copy_of_its_domain_the_problem(device):
    class Shifted(Dispatch):
        def __init__(self, shift):
            super().__init__()
            self.register_buffer("shift", torch.tensor(shift))

        def domain_data(self, x):
            return {**super().domain_data(x), "b": x["demand"][:, None] + self.shift}

    first, second = Shifted(0.0), Shifted(0.1)
    x, y = first.layout.pack(first.contexts(3)), torch.zeros(3, 4)
    copied, alone = copy.deepcopy(first), copy.deepcopy(first.domain)
    first.shift.fill_(0.2)
    for domain, shift in ((first.domain, 0.2), (alone, 0.2), (copied.domain, 0.0), (second.domain, 0.1)):
        torch.testing.assert_close(domain.at(x).nearest(y).sum(-1), x[:, 4] + shift)
    there, before = first.to(device), second.domain.at(x).nearest(y)
    assert there.domain.at(x.to(device)).nearest(y.to(device)).device.type == device.type
    second.double().float()
    torch.testing.assert_close(second.domain.at(x).nearest(y), before, rtol=0, atol=0)


def test_data_of_a_fixed_set_stay_in_float64_whatever_the_module_becomes():
    thirds = Affine([[1.0 / 3, 1.0]], [1.0]).half().float()
    y = thirds.nearest(torch.zeros(1, 2, dtype=torch.float64))
    assert thirds.violation(y).item() <= 1e-15
    assert abs(y[0, 0].item() / 3 + y[0, 1].item() - 1) <= 1e-15


def test_a_product_hands_each_factor_its_own():
    product = Product([Simplex(2), Affine([[1.0, 1.0]], PerItem(1)), Ball(2, PerItem())])
    assert product.needs == {"1.b": (1,), "2.radius": ()}
    data = {"1.b": torch.tensor([[1.0], [2.0]]), "2.radius": torch.tensor([1.0, 3.0])}
    y = product.bind(data).nearest(torch.full((2, 6), 5.0))
    torch.testing.assert_close(y[:, 2:4].sum(-1), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(y[:, 4:].norm(dim=-1), torch.tensor([1.0, 3.0]))
    assert product.inputs == 2 + 1 + 2


# --- bad input


def missing() -> ra.Problem:
    class Silent(Dispatch):
        domain_data = ra.Problem.domain_data

    return Silent()


def returning(data) -> ra.Problem:
    class Wrong(Dispatch):
        def domain_data(self, x):
            return data

    return Wrong()


def asked(problem: ra.Problem) -> Tensor:
    return problem.domain.at(problem.layout.pack(problem.contexts(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine([[1.0, 2.0], [2.0, 4.0]], [1.0, 3.0]), r"Affine: no point"),
        (lambda: Affine([[1.0, float("nan")]], [1.0]), r"Affine\.A: \[1\.0, nan\] is given in row 0"),
        (lambda: Affine([1.0, 2.0], [1.0]), r"Affine\.A: shape \(2,\)"),
        (lambda: Affine("rows", [1.0]), r"Affine\.A: 'rows' is given"),
        (lambda: Affine([[1.0, 2.0]], [INF]), r"Affine\.b: inf is given in row 0"),
        (lambda: Affine([[1.0, 2.0]], PerItem(2)), r"Affine\.b: PerItem\(2,\)"),
        (lambda: Polyhedron(torch.eye(2), [0.0, 1.0], [1.0, 0.0]), r"Polyhedron\.low: 1\.0 with high 0\.0 in row 1"),
        (lambda: Polyhedron([[1.0, 0.0], [1.0, 0.0]], [0.0, 2.0], [1.0, 3.0]), r"Polyhedron: no point"),
        (lambda: Polyhedron(torch.eye(2), 0.0, 1.0, [[1.0, 1.0]], 3.0), r"Polyhedron: no point"),
        (lambda: Polyhedron(torch.eye(2), 0.0, 1.0, [[1.0, 1.0]]), r"Polyhedron\.b: None"),
        (lambda: Polyhedron(torch.eye(2), 0.0, 1.0, torch.ones(1, 3), 1.0), r"Polyhedron\.E: shape \(1, 3\)"),
        (lambda: Ball(2, -1.0), r"Ball\.radius: -1\.0"),
        (lambda: Ball(2, PerItem(2)), r"Ball\.radius: PerItem"),
        (lambda: Box(PerItem(2), [1.0]), r"Box\.high: shape \(1,\)"),
        (lambda: PerItem(0), r"PerItem\.shape: 0"),
        (lambda: Box([0.0], PerItem(1)).nearest(torch.zeros(1, 1)), r"Box: high comes with each item"),
        (lambda: Affine([[1.0]], PerItem(1)).project(torch.zeros(1, 0)), r"Affine: b comes with each item"),
        (lambda: Dispatch().domain.nearest(torch.zeros(2, 4)), r"Dispatch\.domain\.nearest: its data come from x"),
        (lambda: asked(Dispatch()).nearest(torch.zeros(3, 4)), r"Polyhedron\.nearest: points \(3, 4\) .* 2 items"),
        (lambda: asked(missing()), r"Silent\.domain_data: it is not defined; it gives b, high"),
        (lambda: asked(returning(None)), r"Wrong\.domain_data: a NoneType"),
        (lambda: asked(returning({"b": torch.ones(2, 1)})), r"Wrong\.domain_data: 'high': nothing is given"),
        (lambda: asked(returning({"b": torch.ones(2, 1), "top": torch.ones(2, 4)})), r"'top' is given; allowed: b, high"),
        (lambda: asked(returning({"b": torch.ones(2), "high": torch.ones(2, 4)})), r"'b': shape \(2,\) .* \(B, 1\) is needed"),
        (lambda: asked(returning({"b": torch.ones(3, 1), "high": torch.ones(3, 4)})), r"3 items are given; 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
