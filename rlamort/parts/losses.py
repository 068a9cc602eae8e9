"""Losses and their teachers, as parts."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from rlamort import losses as trained
from rlamort import model as models
from rlamort import objective as objectives
from rlamort import update as updates
from rlamort.config import Fraction, Part, Positive, Size
from rlamort.config.fields import Range
from rlamort.constraints import Dual, Penalised, Predicted
from rlamort.domain import Density, Domain, Euclid, Point, SquashedGaussian, within
from rlamort.errors import UserError
from rlamort.nets import Zeros
from rlamort.objective import Cost, Oracle
from rlamort.parts.models import Model
from rlamort.parts.setting import Setting
from rlamort.problem import Problem, device_of, presented, require_frozen
from rlamort.solve.classical import solution_of
from rlamort.solve.constrained import met
from rlamort.solve.precision import widened
from rlamort.solve.quadratic import exactly, possible
from rlamort.update import sparse


@dataclass(frozen=True)
class Teacher(Part):
    """The target of a regression loss; None as its value stands for the labels of the batch."""

    def __call__(self, setting: Setting) -> trained.Teacher | None:
        raise NotImplementedError


@dataclass(frozen=True)
class Solution(Teacher):
    """The problem's own solution, or that of the quadratic program that it is, or L-BFGS from the middle of Y."""

    def __call__(self, setting: Setting) -> trained.Teacher:
        problem = setting.known("loss.teacher")
        solution, name = solution_of(problem), f"{type(problem).__name__}.solution"
        x = presented(problem, 2, device_of(problem))
        y = solution(x)
        if y is None and setting.constraints is not None:
            raise UserError(
                f"loss=regress: {name} is not known, and the search that replaces it ignores constraints; "
                "loss=penalty or loss=lagrangian is needed"
            )
        if y is None:
            return _solved(problem, _searched(setting, updates.Lbfgs(problem.domain), 50))
        domain = problem.domain.at(x)
        if not within(domain, y).all():
            outside, kind = domain.violation(y).max().item(), type(domain).__name__
            raise UserError(f"loss=regress: {name} returns points {outside:.3g} outside {kind}; points in it are needed")
        if setting.constraints is not None and not met(setting.constraints, y, x).all():
            off = setting.constraints.violation(y, x).max().item()
            raise UserError(
                f"loss=regress: {name} violates {setting.constraints.name} by {off:.3g}; points that meet them are needed"
            )
        return models.Expert(solution, name)


@dataclass(frozen=True)
class Label(Teacher):
    """A hidden part of the context, such as a true code or an expert's action.

    Args:
        key: its key in the context.
    """

    key: str = "label"

    def __call__(self, setting: Setting) -> trained.Teacher:
        problem = setting.known("loss.teacher")
        if self.key not in problem.hidden:
            named = ", ".join(problem.hidden) or "none"
            raise UserError(f"loss.teacher.key={self.key}: it is not a hidden key of {type(problem).__name__}: {named}")

        def label(x: Tensor) -> Tensor:
            parts = problem.layout.unpack(x)
            assert isinstance(parts, dict)
            return parts[self.key].flatten(1)

        return label


@dataclass(frozen=True)
class Accelerated(Teacher):
    """FISTA from zero, on the lasso.

    Args:
        steps: number of iterations.
    """

    steps: Size = 50

    def __call__(self, setting: Setting) -> trained.Teacher:
        return _searched(setting, sparse.Fista(setting.ista(), sparse.GradientRestart()), self.steps)


@dataclass(frozen=True)
class Labelled(Teacher):
    """The labels of the data set, which were found once: those of the key `labels`."""

    def __call__(self, setting: Setting) -> None:
        if not setting.labelled:
            raise UserError("loss.teacher=labels: the data set has none; labels=solution, search or file is needed, too")


Teacher.presets = {"solution": Solution(), "label": Label(), "labels": Labelled(), "fista": Accelerated()}


@dataclass(frozen=True)
class Loss(Part):
    """L, the loss that trains a model."""

    @property
    def scores_start(self) -> bool:
        """Whether it scores the first iterate, too, so that it trains what predicts a start that steps are detached from."""
        return False

    def require_trained(self, model: Model) -> None:
        """Raises UserError if this would not train all of `model`."""
        if model.detached and not self.scores_start:
            raise UserError(
                f"loss={self.label()}: it scores no first iterate, and with model.adjoint=detached the start would "
                "not be learned; a loss that scores it is needed, as with loss.start above 0, or model.adjoint=unrolled"
            )

    def require_frozen(self, problem: Problem) -> None:
        """Raises UserError if the problem has parameters that are to be learned, and this has no gradient for them."""

    @property
    def labelled(self) -> bool:
        """Whether it learns from labels of the data set."""
        return False

    def density(self, domain: Domain) -> Density:
        """What is predicted of solutions in `domain`, whose parameters the model gives: the solution itself, for most."""
        return Point(domain)

    @property
    def constrained(self) -> bool:
        """Whether what it trains heeds a problem's constraints."""
        return False

    def multipliers(self, setting: Setting) -> Predicted | None:
        """The network of multipliers that it learns; None for most."""
        return None

    def objective(self, setting: Setting, multipliers: Predicted | None) -> objectives.Objective:
        """What models ask and the loss scores: the cost itself for most."""
        return setting.f

    def __call__(self, setting: Setting) -> trained.Loss:
        raise NotImplementedError


@dataclass(frozen=True)
class Objective(Loss):
    """The cost of the prediction.

    Args:
        start: share of the loss that is the cost of the first iterate, of models that have several.
    """

    start: Fraction = 0.5

    @property
    def scores_start(self) -> bool:
        return self.start > 0

    def __call__(self, setting: Setting) -> trained.Loss:
        return trained.OverIterates(0.0, self.start) if self.start else trained.objective


@dataclass(frozen=True)
class Iterates(Loss):
    """The cost of every iterate.

    Args:
        decay: factor of an iterate's weight per later iterate; 1 weighs all equally.
    """

    decay: Fraction = 1.0

    @property
    def scores_start(self) -> bool:
        return self.decay > 0

    def __call__(self, setting: Setting) -> trained.Loss:
        return trained.OverIterates(self.decay)


@dataclass(frozen=True)
class Regress(Loss):
    """The squared distance to a teacher's solution.

    Args:
        teacher: of the target solutions.
        decay: factor of an iterate's weight per later iterate; 0 scores the last alone.
        start: share of the loss that is the distance of the first iterate, of models that have several.
    """

    teacher: Teacher = Solution()
    decay: Fraction = 0.0
    start: Fraction = 0.5

    @property
    def scores_start(self) -> bool:
        return self.start > 0 or self.decay > 0

    @property
    def labelled(self) -> bool:
        return isinstance(self.teacher, Labelled)

    @property
    def constrained(self) -> bool:
        return True  # as its teacher's solutions do

    def require_frozen(self, problem: Problem) -> None:
        require_frozen(problem, "loss=regress: it has", "another loss")

    def __call__(self, setting: Setting) -> trained.Loss:
        return trained.Regress(self.teacher(setting), decay=self.decay, start=self.start)


@dataclass(frozen=True)
class Likelihood(Loss):
    """Minus the log-likelihood of the label of a control, under a squashed Gaussian whose parameters the model predicts.

    Args:
        margin: labels nearer to the bounds of Y than this count as so near, since the Gaussian has no finite value there.
        low: lower bound of the logarithm of the standard deviation, without which one label alone has no finite optimum.
    """

    margin: Annotated[float, Range(0, 1, above=True, below=True)] = 1e-3
    low: float = -5.0

    @property
    def labelled(self) -> bool:
        return True

    def require_trained(self, model: Model) -> None:
        super().require_trained(model)
        if model.taught:
            raise UserError(
                f"loss={self.label()}: model={model.label()} reads labels as predictions of its own, which are parameters of "
                "a density here; loss=regress loss.teacher=labels is needed"
            )

    def density(self, domain: Domain) -> SquashedGaussian:
        return SquashedGaussian(domain.dim, log_std_low=self.low)

    def __call__(self, setting: Setting) -> trained.Loss:
        if setting.problem is not None:
            raise UserError(f"loss={self.label()}: it is for controls in a box; loss=regress is for the solutions of a problem")
        density, bound = SquashedGaussian(setting.domain.dim // 2, log_std_low=self.low), 1 - self.margin
        return trained.Regress(None, lambda lam, y: -density.log_density(lam, y.clamp(-bound, bound)))


@dataclass(frozen=True)
class Smoothed(Loss):
    """The smoothed cost of the prediction, by evolution strategies, for costs without gradients.

    Args:
        sigma: standard deviation of the smoothing, in the units of y.
        pairs: antithetic pairs of evaluations per estimate.
        start: share of the loss that is the cost of the first iterate, of models that have several.
    """

    sigma: Positive = 0.1
    pairs: Size = 8
    start: Fraction = 0.5

    @property
    def scores_start(self) -> bool:
        return self.start > 0

    def __call__(self, setting: Setting) -> trained.Loss:
        return trained.Smoothed(self.sigma, self.pairs, lambda y, x: setting.domain.at(x).nearest(y), self.start)


@dataclass(frozen=True)
class Penalty(Loss):
    """The cost of the prediction plus a quadratic penalty on violated constraints, which models ask, too.

    Args:
        weight: of the penalty; what remains of the violation is inversely proportional to it.
        decay: factor of an iterate's weight per later iterate; 0 scores the last alone.
        start: share of the loss that is the cost of the first iterate, of models that have several.
    """

    weight: Positive = 100.0
    decay: Fraction = 0.0
    start: Fraction = 0.5

    @property
    def scores_start(self) -> bool:
        return self.start > 0 or self.decay > 0

    @property
    def constrained(self) -> bool:
        return True

    def objective(self, setting: Setting, multipliers: Predicted | None) -> objectives.Objective:
        return Penalised(setting.f, setting.bound("loss=penalty"), self.weight)

    def __call__(self, setting: Setting) -> trained.Loss:
        setting.bound("loss=penalty")
        return trained.OverIterates(self.decay, self.start)


@dataclass(frozen=True)
class Lagrangian(Loss):
    """The augmented Lagrangian of the prediction, at multipliers that a second network learns for each context.

    Primal-dual learning (Park and Van Hentenryck, 2023), with a frozen network that follows. The penalty doubles, up to
    a hundredfold, where 500 updates did not lower the mean violation by a fifth.

    Args:
        weight: of the quadratic penalty at the beginning.
        rate: share by which the multipliers move in every update.
        bound: largest absolute value of a multiplier.
        decay: factor of an iterate's weight per later iterate; 0 scores the last alone.
        start: share of the loss that is the cost of the first iterate, of models that have several.
    """

    weight: Positive = 10.0
    rate: Fraction = 0.01
    bound: Positive = 1e4
    decay: Fraction = 0.0
    start: Fraction = 0.5

    @property
    def scores_start(self) -> bool:
        return self.start > 0 or self.decay > 0

    @property
    def constrained(self) -> bool:
        return True

    def multipliers(self, setting: Setting) -> Predicted:
        sizes = setting.bound("loss=lagrangian").sizes
        over = setting.over(Euclid(sum(sizes)))
        return Predicted(over.network(), over.network(), sizes, self.weight, self.rate, self.bound)

    def objective(self, setting: Setting, multipliers: Predicted | None) -> objectives.Objective:
        assert multipliers is not None, "they are its own"
        return Dual(setting.f, setting.bound("loss=lagrangian"), multipliers)

    def __call__(self, setting: Setting) -> trained.Loss:
        setting.bound("loss=lagrangian")
        return trained.OverIterates(self.decay, self.start)


def _solved(problem: Problem, search: trained.Teacher) -> trained.Teacher:
    """A teacher of exact solutions where items are convex quadratic programs, in float64, and of a search where not."""

    def teacher(x: Tensor) -> Tensor:
        if not possible(problem.domain, x):  # then nothing asks for float64
            return search(x)
        twin = widened(problem, x.new_empty(len(x), problem.domain.dim), x)
        y = exactly(Cost(twin), twin.domain, x.double())
        if y is None:
            return search(x)
        whole = y.isfinite().all(-1, keepdim=True)
        return y.to(x) if bool(whole.all()) else y.to(x).where(whole, search(x))

    return teacher


def _searched(setting: Setting, update: updates.Update, steps: int) -> trained.Teacher:
    """A teacher that runs a solver from the middle of Y on f itself, which reads hidden parts of x, too: it is what scores."""
    start = models.Full(Zeros(setting.domain.inputs), setting.domain)
    search = models.Unroll(start, update, steps, setting.domain)
    return lambda x: search(setting.f.seen(x), Oracle(setting.f, x))


Loss.presets = {
    "objective": Objective(), "iterates": Iterates(), "regress": Regress(), "likelihood": Likelihood(),
    "es": Smoothed(), "penalty": Penalty(), "lagrangian": Lagrangian(),
    "truth": Regress(Label("codes"), decay=0.5, start=0.0),
}  # fmt: skip
