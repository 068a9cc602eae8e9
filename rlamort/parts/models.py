"""Models, as parts."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import nn

from rlamort import model as models
from rlamort.config import Fixed, NonNegative, Part, Positive, Size, Whole, Widths
from rlamort.domain import Euclid
from rlamort.errors import UserError
from rlamort.nets import Concatenated, Zeros, mlp
from rlamort.parts.setting import Setting
from rlamort.parts.updates import (
    Adjoint,
    Alista,
    FirstOrder,
    Ista,
    LearnedGradient,
    Lista,
    ListaCp,
    Recurrent,
    StepIsta,
    Unrolled,
    Update,
)
from rlamort.solve.refine import refinement, repeats
from rlamort.update import sparse


@dataclass(frozen=True)
class Model(Part):
    """y_theta, what predicts a solution."""

    def __call__(self, setting: Setting) -> models.Model:
        raise NotImplementedError

    def settled(self, setting: Setting) -> Self:
        """Itself with what was left open chosen, by trying; what it chose is recorded with the run."""
        return self


@dataclass(frozen=True)
class Full(Model):
    """One network predicts the solution.

    Args:
        hidden: widths of its hidden layers; null takes the method's.
    """

    hidden: Fixed[Widths | None] = None

    def __call__(self, setting: Setting) -> models.Model:
        return models.Full(setting.network(self.hidden), setting.domain)


@dataclass(frozen=True)
class Middle(Model):
    """The middle of Y for every context, which is the prior where solutions are parameters of a density."""

    def __call__(self, setting: Setting) -> models.Model:
        return models.Full(Zeros(setting.domain.inputs), setting.domain)


@dataclass(frozen=True)
class Start(Model):
    """A learned point of Y, the same for every context: what MAML learns."""

    def __call__(self, setting: Setting) -> models.Model:
        return models.Start(setting.domain)


@dataclass(frozen=True)
class Previous(Model):
    """The plan of the step before, moved on by one action: where a planner begins that starts warm."""

    def __call__(self, setting: Setting) -> models.Model:
        if not setting.previous:
            raise UserError("model: previous begins where the step before ended, which only planners in Y itself remember")
        return models.Previous(setting.domain)


@dataclass(frozen=True)
class PsdEncoder(Model):
    """The encoder of predictive sparse decomposition (Kavukcuoglu, Ranzato and LeCun, 2010)."""

    def __call__(self, setting: Setting) -> models.Model:
        return models.Full(sparse.Psd(setting.ista()), setting.domain)


@dataclass(frozen=True)
class Choice(Model):
    """Several predictions, of which the cheapest is kept.

    Args:
        candidates: how many.
        hidden: widths of the network's hidden layers; null takes the method's.
    """

    candidates: Fixed[Size] = 4
    hidden: Fixed[Widths | None] = None

    def __call__(self, setting: Setting) -> models.Model:
        return models.Choice(setting.network(self.hidden, self.candidates), self.candidates, setting.domain)


@dataclass(frozen=True)
class Unroll(Model):
    """Steps of a solver from where another model says, in Y: each is followed by the Euclidean projection.

    Args:
        init: where they begin.
        update: the step.
        steps: how many.
        adjoint: how losses differentiate through them.
        shrinkage: strength of strength / 2 |y - y_0|^2, which the solver sees added to f.
        keep_best: whether each iterate is the one of lowest f so far, where f gives the same value twice.
    """

    init: Model = Full()
    update: Update = LearnedGradient()
    steps: Fixed[Whole] = 5
    adjoint: Adjoint = Unrolled()
    shrinkage: NonNegative = 0.0
    keep_best: bool = False

    def __call__(self, setting: Setting) -> models.Model:
        return models.Unroll(
            self.init(setting), self.update(setting, self.steps), self.steps, setting.domain, self.adjoint(), self.shrinkage,
            keep_best=self.keep_best and _repeats(setting),
        )  # fmt: skip


@dataclass(frozen=True)
class InChart(Model):
    """A model over the unconstrained numbers that are projected to Y, whose border lies infinitely far away there.

    Args:
        inner: the model, such as steps.
    """

    inner: Model = Unroll(keep_best=True)

    def __call__(self, setting: Setting) -> models.Model:
        chart = setting._replace(domain=Euclid(setting.domain.inputs), previous=False)
        return models.Latent(models.itself, self.inner(chart), setting.domain)


@dataclass(frozen=True)
class Latent(Model):
    """A model over another space, whose points a network decodes to solutions.

    Args:
        dim: coordinates of that space.
        inner: the model over it, such as steps.
        hidden: widths of the decoder's hidden layers; null takes the method's.
    """

    dim: Fixed[Size] = 8
    inner: Model = Unroll()
    hidden: Fixed[Widths | None] = None

    def __call__(self, setting: Setting) -> models.Model:
        widths = setting.hidden if self.hidden is None else self.hidden
        net = mlp(self.dim + setting.x_dim, widths, setting.domain.inputs, setting.arithmetic)
        decode = Concatenated(net, setting.features() or nn.Identity())
        return models.Latent(decode, self.inner(setting.over(Euclid(self.dim))), setting.domain)


@dataclass(frozen=True)
class Refined(Model):
    """Gradient steps of learned size after a prediction, in the space and from the size that are found best by trying both.

    Args:
        init: where they begin.
        steps: how many.
        adjoint: how losses differentiate through them.
        space: where they are taken: solution, in Y itself; chart, in the unconstrained numbers that are projected to Y; auto
            tries both, and is Y where `rate` is given.
        rate: their size before it is learned; null tries which is best.
    """

    init: Model = Full()
    steps: Fixed[Size] = 5
    adjoint: Adjoint = Unrolled()
    space: Literal["auto", "solution", "chart"] = "auto"
    rate: Positive | None = None

    def settled(self, setting: Setting) -> Self:
        if self.rate is not None:
            return replace(self, space="solution" if self.space == "auto" else self.space)
        problem = setting.known("model.rate, which is null, so that it is found by trying")
        assert setting.contexts is not None, "of a problem they are known"
        found = refinement(setting.f, problem.domain, setting.contexts)
        space = found.space if self.space == "auto" else self.space
        return replace(self, space=space, rate=found.trials[space].rate)

    def __call__(self, setting: Setting) -> models.Model:
        chosen = self.settled(setting)
        assert chosen.rate is not None, "it is chosen now"
        steps = Unroll(self.init, LearnedGradient(chosen.rate), self.steps, self.adjoint, keep_best=True)
        return (InChart(steps) if chosen.space == "chart" else steps)(setting)


@dataclass(frozen=True)
class Safeguarded(Model):
    """A learned solver of the lasso which is never above ISTA at any layer where it answers; it is trained without that.

    Args:
        inner: the solver.
    """

    inner: Unroll = Unroll(Middle(), Lista(), 16)

    def __call__(self, setting: Setting) -> models.Model:
        trained = self.inner(setting)
        assert isinstance(trained, models.Unroll)
        update = sparse.Safeguarded(trained.update, setting.ista())
        return models.Guarded(trained, models.Unroll(trained.init, update, trained.steps, trained.domain))


def _repeats(setting: Setting) -> bool:
    """Whether f gives the same value twice; one that draws cannot say which iterate is the best."""
    if setting.problem is None or setting.contexts is None:
        return True
    return repeats(setting.f, setting.problem.domain, setting.contexts)


Model.presets = {
    "full": Full(),
    "choice": Choice(),
    "semi": Refined(),
    "recurrent": Unroll(update=Recurrent(), adjoint=FirstOrder()),
    "latent": Latent(),
    "middle": Middle(),
    "prior": Middle(),
    "start": Start(),
    "previous": Previous(),
    "psd": Unroll(PsdEncoder(), Ista(), 16),
    "lista": Unroll(Middle(), Lista(), 16),
    "lista_cp": Unroll(Middle(), ListaCp(), 16),
    "alista": Unroll(Middle(), Alista(), 16),
    "slista": Unroll(Middle(), StepIsta(), 16),
}
