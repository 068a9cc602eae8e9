"""`rlamort check`: sound problems pass, and each way of being broken fails on a line that names it."""

import math

import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort.domain import Box, Euclid, Simplex, Sphere
from rlamort.errors import UserError
from rlamort.measure.check import check
from rlamort.problem import Problem


class Sound(Problem):
    """A convex problem on the simplex that defines everything a problem may define."""

    domain = Simplex(4)
    convex = True

    def contexts(self, count):
        return torch.randn(count, 4)

    def cost(self, y, x):
        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)

    def solution(self, x):
        return self.domain.nearest(x)

    def residual(self, y, x):
        return (y - self.map(y, x)).norm(dim=-1)

    def map(self, y, x):
        return self.domain.nearest(y - 0.5 * (y - x))


class Bare(Problem):
    """The two methods that are needed, with contexts of several kinds."""

    domain = Sphere(3)

    def contexts(self, count):
        return {"centre": torch.randn(count, 3), "kind": torch.randint(5, (count,))}

    def cost(self, y, x):
        return (y - x["centre"]).square().sum(-1) * (1 + x["kind"])


def verdict(report, what):
    (line,) = [line for line in report.lines if line.what == what]
    return line


def fits(report):
    return {fit.name: fit.fits for fit in (*report.models, *report.losses)}


def test_a_sound_problem_passes_on_every_line(device):
    report = check(Sound().to(device))
    assert [line.what for line in report.lines if line.verdict != "pass"] == ["constraints"]  # it has none
    assert report.ok
    assert all(fits(report).values())


def test_what_is_optional_is_absent_and_does_not_count(device):
    report = check(Bare().to(device))
    assert report.ok
    absent = {line.what for line in report.lines if line.verdict == "absent"}
    assert absent == {"solution", "residual", "map", "convex", "constraints"}
    assert all(fits(report).values())
    assert "the best of reference solvers" in str(report)


def test_checking_moves_nothing_and_is_the_same_again():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = check(Sound())
    assert torch.equal(torch.get_rng_state(), state)
    assert check(Sound()) == first


class Ring(Bare):
    """Constraints: on a circle of radius x, right of a line."""

    def constraints(self, y, x):
        radius = 0.5 + 0.1 * x["kind"][:, None] if isinstance(x, dict) else 0.5
        return y[:, :2].square().sum(-1, keepdim=True) - radius, 0.1 - y[:, :1]


class Nowhere(Ring):
    def constraints(self, y, x):
        return y[:, :1] - 100.0, y[:, :0]


class Twice(Ring):
    def constraints(self, y, x):
        h = y[:, :1] - 0.1
        return torch.cat([h, 2 * h], -1), y[:, :0]


class Kinked(Ring):
    def constraints(self, y, x):
        return y[:, :1] - (10 * y[:, 1:2]).round().detach() * y[:, :1].detach(), y[:, :0]


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        (Ring, "pass", "1 equalities, 1 inequalities; derivatives agree"),
        (Nowhere, "warn", "no point that meets them was found for 6 of 6 contexts, of which 0 is the first"),
        (Twice, "warn", "equalities depend on each other"),
        (Kinked, "fail", "their derivatives differ from finite differences"),
    ],
)
def test_constraints_have_a_line_and_their_losses(kind, expected, message):
    report = check(kind())
    line = verdict(report, "constraints")
    assert line.verdict == expected, line
    assert message in line.detail
    found = fits(report)
    assert {name for name, fitting in found.items() if not fitting} == {"objective", "iterates", "es", "regress"}
    assert found["penalty"]
    assert found["lagrangian"]


class NoDomain(Sound):
    domain = None


class RaisesContexts(Sound):
    def contexts(self, count):
        raise KeyError("prices")


class Numpy(Sound):
    def contexts(self, count):
        return np.zeros((count, 4))


class Transposed(Sound):
    def contexts(self, count):
        return torch.randn(4, count)


class Unequal(Bare):
    def contexts(self, count):
        return super().contexts(count) | {"kind": torch.zeros(2, dtype=torch.long)}


class Changing(Bare):
    def contexts(self, count):
        x = super().contexts(count)
        return x if count == 2 else {"centre": x["centre"]}


class NanContexts(Sound):
    def contexts(self, count):
        return super().contexts(count).sqrt()


class Identifiers(Bare):
    """Whole numbers that float32 cannot hold."""

    def contexts(self, count):
        return super().contexts(count) | {"kind": torch.full((count,), 2**24 + 1)}


class Elsewhere(Sound):
    def contexts(self, count):
        return super().contexts(count).to("meta")


class Unseeded(Sound):
    def contexts(self, count):
        return torch.from_numpy(np.random.default_rng().normal(size=(count, 4))).float()


class Mean(Sound):
    def cost(self, y, x):
        return super().cost(y, x).mean()


class Column(Sound):
    def cost(self, y, x):
        return super().cost(y, x)[:, None]


class OtherSize(Sound):
    domain = Simplex(5)


class Whole(Sound):
    def cost(self, y, x):
        return (y > 0.5).sum(-1)


class Arrays(Sound):
    def cost(self, y, x):
        return super().cost(y, x).numpy(force=True)


class Nothing(Sound):
    def cost(self, y, x):
        super().cost(y, x)


class Infinite(Sound):
    def cost(self, y, x):
        return super().cost(y, x) / (y[:, 0] - y[:, 1])


class Holes(Sound):
    def cost(self, y, x):
        return super().cost(y, x) + torch.where(x[:, 0] > 0, math.nan, 0.0)


class Mixes(Sound):
    def cost(self, y, x):
        return super().cost(y - y.mean(0), x)


class MixesSilently(Sound):
    """No gradient crosses, yet values do."""

    def cost(self, y, x):
        return super().cost(y, x) + x.mean()


class Ordered(Sound):
    """Every item alone is right, but position counts."""

    def cost(self, y, x):
        return super().cost(y, x) + torch.arange(len(y), device=y.device)


class WrongGradient(Sound):
    def cost(self, y, x):
        cost = super().cost(y, x)
        return cost.detach() + 3 * (cost - cost.detach())


class NanGradient(Sound):
    def cost(self, y, x):
        return super().cost(y, x) + (y - y.detach()).norm(dim=-1).sqrt()


class ChangesX(Sound):
    def cost(self, y, x):
        x -= 1
        return super().cost(y, x)


class ChangesY(Sound):
    """Without effect on what it is tried on."""

    def cost(self, y, x):
        return super().cost(y.clamp_(0, 1), x)


class ChangesPart(Bare):
    def cost(self, y, x):
        x["kind"][x["kind"] > 2] = 2
        return super().cost(y, x)


class ChangesItself(Sound):
    """Large data in place, at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("prices", torch.ones(100_000))

    def cost(self, y, x):
        self.prices *= 0.9
        return super().cost(y, x) * self.prices[0]


class ChangesArray(ChangesItself):
    def __init__(self):
        Sound.__init__(self)
        self.prices = np.ones(100_000)


class Replaces(ChangesArray):
    def cost(self, y, x):
        self.prices = 0.9 * self.prices
        return Sound.cost(self, y, x) * self.prices[0]


class Settles(ChangesItself):
    """The same, once: the cost is a function."""

    def cost(self, y, x):
        self.prices /= self.prices.sum()
        return super(ChangesItself, self).cost(y, x) * self.prices.sum()


class ChangesInSolution(Sound):
    def solution(self, x):
        return super().solution(x.add_(1))


class ChangesInResidual(Sound):
    def residual(self, y, x):
        return (y.sub_(x)).norm(dim=-1)


class ChangesInMap(Sound):
    def map(self, y, x):
        return self.domain.nearest(x.mul_(0.5) + 0.5 * y)


class Corners(Problem):
    """Contexts in the corners of the box, where y may well end."""

    domain = Box([-1.0, -1.0], [1.0, 1.0])

    def contexts(self, count):
        return {"corner": torch.randn(count, 2).sign(), "weight": torch.rand(count)}

    def cost(self, y, x):
        return x["weight"] * (y - x["corner"]).norm(dim=-1)


class Roots(Corners):
    def cost(self, y, x):
        return x["weight"] * (y - x["corner"]).square().sum(-1).sqrt()


class RootsInside(Roots):
    """Only y = x shows it: x is neither 0 nor on the border."""

    def contexts(self, count):
        return {"corner": 0.5 * torch.rand(count, 2) + 0.1, "weight": torch.rand(count)}


class RootOfNothing(Sound):
    """At 0 alone."""

    domain = Euclid(4)

    def cost(self, y, x):
        return y.square().sum(-1).sqrt() + (y - x).square().sum(-1)


class RootAtSolution(Sound):
    def solution(self, x):
        return self.domain.nearest(x / 10)

    def cost(self, y, x):
        return (y - self.solution(x)).square().sum(-1).sqrt()


class Logarithm(Sound):
    """-log y, whose solutions lie inside: at the border it is infinite, which is as it should be."""

    def contexts(self, count):
        return torch.rand(count, 4) + 0.1

    def cost(self, y, x):
        return -(x * y.log()).sum(-1)

    def solution(self, x):
        return x / x.sum(-1, keepdim=True)

    def residual(self, y, x):
        return None

    def map(self, y, x):
        return None


class Entropy(Logarithm):
    def cost(self, y, x):
        return -torch.special.entr(y).sum(-1) - (x * y).sum(-1)

    def solution(self, x):
        return x.softmax(-1)


class NanEntropy(Entropy):
    def cost(self, y, x):
        return (y * y.log()).sum(-1) - (x * y).sum(-1)


class Bottomless(Logarithm):
    def cost(self, y, x):
        return -super().cost(y, x)


class Spills(Simplex):
    """Its projection forgets the sum of what is large."""

    def nearest(self, y):
        return super().nearest(y) if bool((y.abs() < 10).all()) else y.clamp(0, 1)


class Spilt(Sound):
    domain = Spills(4)


class Highest(Simplex):
    def linear(self, g):
        return super().linear(-g)


class Uncertified(Sound):
    domain = Highest(4)


class RaisesSolution(Sound):
    def solution(self, x):
        raise ZeroDivisionError("division by zero")


class SolutionShape(Sound):
    def solution(self, x):
        return super().solution(x)[:, :3]


class Outside(Sound):
    def solution(self, x):
        return x


class Worse(Sound):
    def solution(self, x):
        return torch.full_like(x, 0.25)


class ResidualShape(Sound):
    def residual(self, y, x):
        return super().residual(y, x)[:, None]


class Negative(Sound):
    def residual(self, y, x):
        return super().residual(y, x) - 1


class NotZero(Sound):
    def residual(self, y, x):
        return super().residual(y, x) + 1


class MovesSolution(Sound):
    def map(self, y, x):
        return y / 2

    def residual(self, y, x):
        return None


class ConvexOnASphere(Bare):
    convex = True


class Concave(Sound):
    def cost(self, y, x):
        return -super().cost(y, x)

    def solution(self, x):
        return None

    def residual(self, y, x):
        return None

    def map(self, y, x):
        return None


class Small(Sound):
    """In a unit in which costs are small, as daily returns are."""

    def cost(self, y, x):
        return 1e-4 * super().cost(y, x)


class SmallWorse(Worse, Small):
    pass


class SmallConcave(Concave):
    def cost(self, y, x):
        return 1e-4 * super().cost(y, x)


class Cancelling(Small):
    """Small costs of terms that are not, whose rounding is as large as differences between costs."""

    def cost(self, y, x):
        return -(1 - super().cost(y, x)).log()


BROKEN = [
    (NoDomain, "domain", "nothing is given; a domain of rlamort.domain is needed"),
    (RaisesContexts, "contexts", "it raised KeyError: 'prices'"),
    (Numpy, "contexts", "a ndarray is given; a tensor, or a dict of tensors, is needed"),
    (Transposed, "contexts", "its leading axis must be the count"),
    (Unequal, "contexts", "contexts(1)['kind'] has shape (2,); (1,) is needed"),
    (Changing, "contexts", "contexts(1) gives ('centre',); contexts(2) gives ('centre', 'kind')"),
    (NanContexts, "contexts", "holds nan; finite numbers are needed"),
    (Identifiers, "contexts", "numbers of torch.int64 do not survive in torch.float32"),
    (Elsewhere, "contexts", "is on meta, the problem on cpu"),
    (Unseeded, "contexts, seeded", "the same seed gives different contexts"),
    (Mean, "cost", "Mean.cost: shape () is returned for y of shape (6, 4); one number per item, (6,), is needed"),
    (Column, "cost", "shape (6, 1) is returned"),
    (OtherSize, "cost", "it raised RuntimeError: The size of tensor"),
    (Whole, "cost", "numbers of torch.int64 are returned; floating ones are needed"),
    (Arrays, "cost", "Arrays.cost: a ndarray is returned; a tensor, one number per item, (6,), is needed"),
    (Nothing, "cost", "Nothing.cost: a NoneType is returned; a tensor"),
    (Infinite, "cost, finite", "6 of 6 costs are"),
    (Holes, "cost, finite", "costs are nan at y = project(0 v)"),
    (Mixes, "cost, batch independence", "the cost of item 0 depends on y of item 1"),
    (MixesSilently, "cost, batch independence", "alone and"),
    (Ordered, "cost, batch independence", "another order of the batch gives other costs"),
    (WrongGradient, "cost, gradient", "it agrees with finite differences in 0 of 24 directions"),
    (NanGradient, "cost, gradient", "it holds nan; finite numbers are needed"),
    (ChangesX, "cost, in place", "it changes x in place, which its caller uses later; clone it first, x.clone()"),
    (ChangesY, "cost, in place", "it changes y in place"),
    (ChangesPart, "cost, in place", "it changes x['kind'] in place"),
    *((kind, "cost, in place", "it changes prices of the problem: item") for kind in (ChangesItself, ChangesArray, Replaces)),
    (ChangesInSolution, "solution", "it changes x in place"),
    (ChangesInResidual, "residual", "it changes y in place"),
    (ChangesInMap, "map", "it changes x in place"),
    (Roots, "cost, gradient", "it is nan at corners of Y (a root or a norm of 0 needs a little under the root"),
    (RootsInside, "cost, gradient", "it is nan at y = x['corner']"),
    (RootOfNothing, "cost, gradient", "it is nan at the point of Y nearest to 0"),
    (RootAtSolution, "cost, gradient", "it is nan at `solution`"),
    (NanEntropy, "cost, finite", "costs are nan at corners of Y; a number, or inf, is needed (0 log 0 needs torch.special"),
    (Bottomless, "cost, finite", "costs are -inf at corners of Y"),
    (Spilt, "domain", "outside Y, by its `violation`, for numbers of size 1000; a point of Y is needed"),
    (Uncertified, "domain", "linear gives points that are not the lowest of Y along g"),
    (RaisesSolution, "solution", "it raised ZeroDivisionError: division by zero"),
    (SolutionShape, "solution", "shape (6, 3) is returned; (6, 4) is needed"),
    (Outside, "solution", "outside Simplex; a point in it is needed"),
    (Worse, "solution", "was found in a few trials; a minimiser is needed"),
    (ResidualShape, "residual", "shape (6, 1) is returned; (6,) is needed"),
    (Negative, "residual", "it must not be negative"),
    (NotZero, "residual", "at `solution`"),
    (MovesSolution, "map", "a solution must be its fixed point"),
    (ConvexOnASphere, "convex", "Sphere is not convex"),
    (Concave, "convex", "f is not convex in y"),
    (SmallWorse, "solution", "was found in a few trials; a minimiser is needed"),
    (SmallConcave, "convex", "f is not convex in y"),
]


@pytest.mark.parametrize(("kind", "what", "detail"), BROKEN, ids=[row[0].__name__ for row in BROKEN])
def test_each_way_of_being_broken_fails_on_its_own_line(kind, what, detail):
    report = check(kind())
    line = verdict(report, what)
    assert line.verdict == "fail"
    assert detail in line.detail
    assert not report.ok
    assert f"fail   {kind.__name__}.{what}: " in str(report)


def test_a_cost_may_change_what_the_problem_holds_where_it_stays_a_function():
    assert check(Settles()).ok


@pytest.mark.parametrize("kind", [Small, Cancelling])
def test_small_costs_are_judged_by_their_size_and_their_rounding_is_not(kind):
    report = check(kind())
    assert verdict(report, "solution").verdict == verdict(report, "convex").verdict == "pass"


@pytest.mark.parametrize(("kind", "said"), [(Arrays, "a ndarray"), (Nothing, "a NoneType"), (Whole, "numbers of torch.int64")])
def test_a_cost_of_the_wrong_type_is_refused_before_it_is_trained_on(kind, said):
    with pytest.raises(UserError, match=rf"{kind.__name__}.cost: {said} \w+ returned"):
        ra.amortize(kind, steps=1, hidden=(8,))


class Logarithms(Sound):
    """NaN where an asset is short, which makes other checks fail, and the same item cost what it does not."""

    domain = Box([-1.0] * 4, [1.0] * 4)

    def cost(self, y, x):
        return -y.log().sum(-1)


@pytest.mark.parametrize("kind", [Logarithms, Holes, Infinite])
def test_a_cost_that_is_not_finite_is_blamed_for_that_alone(kind):
    """Its NaN was random numbers, or another item's cost, to the checks after it, and steps were said to fit it."""
    report = check(kind())
    assert [line.what for line in report.lines if line.verdict == "fail"] == ["cost, finite"]
    assert not any("random" in line.detail for line in report.lines)
    assert not any(fits(report).values())


@pytest.mark.parametrize("kind", [Holes, Mixes, Mean, Transposed, ChangesX, Spilt])
def test_nothing_fits_what_is_broken_at_its_root(kind):
    report = check(kind())
    assert not any(fits(report).values())
    assert all(fit.why.endswith("failed") for fit in (*report.models, *report.losses))


class Rounded(Sound):
    """A cost that cannot be differentiated, which is nobody's fault."""

    def cost(self, y, x):
        return super().cost(y, x).detach()

    convex = False


class Steps(Sound):
    convex = False

    def cost(self, y, x):
        return (5 * y).round().square().sum(-1)

    def solution(self, x):
        return None

    def residual(self, y, x):
        return None

    def map(self, y, x):
        return None


@pytest.mark.parametrize("kind", [Rounded, Steps])
def test_costs_without_a_gradient_are_no_failure_and_say_what_is_left(kind):
    report = check(kind())
    assert report.ok, str(report)
    assert verdict(report, "cost, gradient").verdict == "absent"
    taught = ["regress"] if verdict(report, "solution").verdict == "pass" else []
    assert {name for name, fitting in fits(report).items() if fitting} == {"full", "choice", "rl", "es", *taught}


class Kinks(Sound):
    """Differentiable almost everywhere is enough."""

    convex = False

    def cost(self, y, x):
        return (y - x).abs().sum(-1)

    def solution(self, x):
        return None

    def residual(self, y, x):
        return None

    def map(self, y, x):
        return None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, y):
        context.save_for_backward(y)
        return y.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, slope):
        return 2 * context.saved_tensors[0] * slope


class FirstOrder(Kinks):
    def cost(self, y, x):
        return Once.apply(y).sum(-1)


def test_kinks_pass_and_a_missing_second_derivative_is_a_warning():
    assert verdict(check(Kinks()), "cost, gradient").verdict == "pass"
    report = check(FirstOrder())
    line = verdict(report, "cost, second derivative")
    assert line.verdict == "warn"
    assert "semi-amortized models need model.adjoint=first_order" in line.detail
    assert report.ok
    assert "adjoint=first_order" in next(fit.why for fit in report.models if fit.name == "semi")


def test_where_derivatives_break_is_looked_for_and_said():
    """Second ones at y = x alone: unrolled gradient steps give NaN there, others do not."""
    report = check(Corners())
    assert report.ok
    assert verdict(report, "cost, gradient").verdict == "pass"
    line = verdict(report, "cost, second derivative")
    assert line.verdict == "warn"
    assert "it is not finite at corners of Y, the boundary of Y, y = x['corner']; semi-amortized models need" in line.detail
    assert "adjoint=first_order" in next(fit.why for fit in report.models if fit.name == "semi")
    told = verdict(check(Sound()), "cost, finite").detail
    assert all(where in told for where in ("nearest to 0", "corners of Y", "the boundary of Y", "nearest to x", "`solution`"))


def test_an_infinite_border_is_no_failure_and_says_who_suffers():
    barred = check(Logarithm())
    assert barred.ok, str(barred)
    assert verdict(barred, "cost, finite").verdict == "warn"
    assert {name for name, fitting in fits(barred).items() if not fitting} == {"recurrent", "es"}
    steep = check(Entropy())
    assert steep.ok, str(steep)
    assert verdict(steep, "cost, gradient").verdict == "warn"
    assert verdict(steep, "cost, finite").verdict == "pass"
    assert {name for name, fitting in fits(steep).items() if not fitting} == {"recurrent"}
    for report in (barred, steep):
        (semi,) = (fit for fit in report.models if fit.name == "semi")
        assert semi.why == "gradient steps after a network, of which the best is kept; they are taken in Y"


class Noisy(Kinks):
    def cost(self, y, x):
        return (y - x + 0.1 * torch.randn_like(y)).square().sum(-1)


class Point(Sound):
    def contexts(self, count):
        return torch.ones(count, 4)


class StaysBehind(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.prices = torch.ones(4)


def test_what_may_be_meant_is_a_warning_or_passes():
    noisy = check(Noisy())
    assert noisy.ok
    assert "it draws random numbers" in verdict(noisy, "cost, batch independence").detail
    point = check(Point())
    assert point.ok
    assert verdict(point, "contexts, seeded").verdict == "warn"
    line = verdict(check(StaysBehind()), "device")
    if not torch.cuda.is_available():
        assert line.verdict == "warn"
        assert line.detail.startswith("prices would stay behind")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_tensor_that_stays_behind_fails_where_there_is_a_gpu():
    class Uses(StaysBehind):
        def cost(self, y, x):
            return super().cost(y * self.prices, x)

    assert verdict(check(Uses()), "device").verdict == "fail"


def test_a_problem_that_cannot_be_moved_to_float64_is_compared_in_its_own(monkeypatch):
    class Single(Kinks):
        def cost(self, y, x):
            assert y.dtype == torch.float32
            return (y - x).square().sum(-1)

    assert verdict(check(Single()), "cost, gradient").verdict == "pass"


def test_a_box_of_bounds_passes_whatever_its_scale():
    class Scaled(Problem):
        domain = Box([-1e3, 0.0], [1e3, 1e-3])

        def contexts(self, count):
            return torch.randn(count, 2)

        def cost(self, y, x):
            return 1e6 * (y - x).square().sum(-1)

        def solution(self, x):
            return self.domain.nearest(x)

    assert check(Scaled()).ok
