"""Models, as parts."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import nn

from rlamort import model as models
from rlamort import radial as made
from rlamort.config import Fixed, Fraction, NonNegative, Part, Positive, Size, Whole, Widths
from rlamort.domain import Euclid
from rlamort.errors import UserError
from rlamort.nets import Concatenated, Zeros, mlp
from rlamort.norm import Normed
from rlamort.parts.setting import Setting
from rlamort.parts.updates import (
    Adjoint,
    Alista,
    Detached,
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
from rlamort.radial import Sine
from rlamort.solve.refine import refinement, repeats
from rlamort.update import InChart as Chart
from rlamort.update import InY, sparse


@dataclass(frozen=True)
class Model(Part):
    """y_theta, a model that predicts a solution."""

    @property
    def detached(self) -> bool:
        """Whether its steps do not train the model of their start."""
        return False

    @property
    def taught(self) -> bool:
        """Whether labels are among what it reads in training, so that its predictions must be of their kind."""
        return False

    def __call__(self, setting: Setting) -> models.Model:
        raise NotImplementedError

    def tune(self, setting: Setting) -> Self:
        """This part with its open choices made, by trial; they are recorded with the run."""
        return self


@dataclass(frozen=True)
class Full(Model):
    """One network predicts the solution.

    Args:
        hidden: widths of the hidden layers; null takes the method's.
        norm: before every ReLU: layer for layer normalisation; batch for batch normalisation, also of inputs; renorm for its
            renormalisation, as in CrossQ; or none.
    """

    hidden: Fixed[Widths | None] = None
    norm: Fixed[Normed] = "none"

    def __call__(self, setting: Setting) -> models.Model:
        return models.Full(setting.network(self.hidden, norm=self.norm), setting.domain)


@dataclass(frozen=True)
class Middle(Model):
    """The middle of Y for every context, which is the prior if solutions are parameters of a density."""

    def __call__(self, setting: Setting) -> models.Model:
        return models.Full(Zeros(setting.domain.inputs), setting.domain)


@dataclass(frozen=True)
class Start(Model):
    """A learned point of Y, the same for every context, as MAML's initialisation."""

    def __call__(self, setting: Setting) -> models.Model:
        return models.Start(setting.domain)


@dataclass(frozen=True)
class Previous(Model):
    """The previous plan, shifted by one action: a planner's warm start."""

    def __call__(self, setting: Setting) -> models.Model:
        if setting.horizon is None:
            raise UserError("model: previous starts from the previous plan, which only planners in Y itself have")
        return models.Previous(setting.domain)


@dataclass(frozen=True)
class PsdEncoder(Model):
    """The encoder of predictive sparse decomposition (Kavukcuoglu, Ranzato and LeCun, 2010)."""

    def __call__(self, setting: Setting) -> models.Model:
        return models.Full(sparse.Psd(setting.ista()), setting.domain)


@dataclass(frozen=True)
class Choice(Model):
    """The cheapest of several predictions.

    Args:
        candidates: number of predictions.
        hidden: widths of the hidden layers; null takes the method's.
    """

    candidates: Fixed[Size] = 4
    hidden: Fixed[Widths | None] = None

    def __call__(self, setting: Setting) -> models.Model:
        return models.Choice(setting.network(self.hidden, self.candidates), self.candidates, setting.domain)


@dataclass(frozen=True)
class Unroll(Model):
    """Steps of a solver from another model's prediction, each projected onto Y.

    Args:
        init: model of the first iterate.
        update: the solver's step.
        steps: number of steps.
        adjoint: how losses differentiate through the steps.
        shrinkage: weight of weight / 2 |y - y_0|^2, which is added to the solver's objective.
        keep_best: whether each iterate is the best so far, if f is deterministic.
    """

    init: Model = Full()
    update: Update = LearnedGradient()
    steps: Fixed[Whole] = 5
    adjoint: Adjoint = Unrolled()
    shrinkage: NonNegative = 0.0
    keep_best: bool = False

    @property
    def detached(self) -> bool:
        return self.adjoint.detached

    def __call__(self, setting: Setting) -> models.Model:
        return models.Unroll(
            self.init(setting), self.update(setting, self.steps), self.steps, setting.domain, self.adjoint(), self.shrinkage,
            keep_best=self.keep_best and _repeats(setting),
        )  # fmt: skip


@dataclass(frozen=True)
class InChart(Model):
    """A model over the unconstrained coordinates of Y, in which its boundary is infinitely far away.

    Args:
        inner: the model over them.
    """

    inner: Model = Unroll(keep_best=True)

    @property
    def detached(self) -> bool:
        return self.inner.detached

    def __call__(self, setting: Setting) -> models.Model:
        chart = Chart(setting.domain)
        inner = self.inner(setting._replace(domain=chart.domain, horizon=None))
        return models.Latent(chart.decode, inner, setting.domain)


@dataclass(frozen=True)
class Latent(Model):
    """A model over a latent space, decoded to solutions by a network.

    Args:
        dim: dimension of the latent space.
        inner: the model over it.
        hidden: widths of the decoder's hidden layers; null takes the method's.
        reads_context: whether x is an input of the decoder, beside z.
    """

    dim: Fixed[Size] = 8
    inner: Model = Unroll()
    hidden: Fixed[Widths | None] = None
    reads_context: Fixed[bool] = True

    @property
    def detached(self) -> bool:
        return self.inner.detached

    def __call__(self, setting: Setting) -> models.Model:
        widths = setting.hidden if self.hidden is None else self.hidden
        read = setting.x_dim if self.reads_context else 0
        net = mlp(self.dim + read, widths, setting.domain.inputs, setting.arithmetic)
        decode = Concatenated(net, (setting.features() or nn.Identity()) if read else Zeros(0))
        return models.Latent(decode, self.inner(setting.over(Euclid(self.dim))), setting.domain)


@dataclass(frozen=True)
class Refined(Model):
    """Gradient steps of learned size after a prediction, with the space and initial step size chosen by trial.

    Args:
        init: model of the first iterate.
        steps: number of steps.
        adjoint: how losses differentiate through the steps.
        space: of the steps: solution, Y itself, with projection; chart, its unconstrained coordinates; auto tries both, and is
            solution if `rate` is set.
        rate: initial step size; null takes the best of a trial.
    """

    init: Model = Full()
    steps: Fixed[Size] = 5
    adjoint: Adjoint = Detached()
    space: Literal["auto", "solution", "chart"] = "auto"
    rate: Positive | None = None

    @property
    def detached(self) -> bool:
        return self.adjoint.detached

    def tune(self, setting: Setting) -> Self:
        if self.rate is not None:
            return replace(self, space=InY.name if self.space == "auto" else self.space)
        problem = setting.known("model.rate, which is null, so that it is found by trial")
        assert setting.contexts is not None, "a setting of a problem has them"
        found = refinement(setting.f, problem.domain, setting.contexts)
        trial = found.better if self.space == "auto" else found.of(self.space)
        return replace(self, space=trial.space.name, rate=trial.rate)

    def __call__(self, setting: Setting) -> models.Model:
        chosen = self.tune(setting)
        assert chosen.rate is not None, "tune has chosen it"
        steps = Unroll(self.init, LearnedGradient(chosen.rate), self.steps, self.adjoint, keep_best=True)
        part: Model = {InY.name: steps, Chart.name: InChart(steps)}[chosen.space]
        return part(setting)


@dataclass(frozen=True)
class TwoStep(Model):
    """Two predictions of one network, the second from the first: the minimal iterative policy (arXiv 2512.01809).

    Args:
        t: of the second step; training reads labels with noise of standard deviation 1 - t there.
        hidden: widths of the hidden layers; null takes the method's.
    """

    t: Fraction = 0.9
    hidden: Fixed[Widths | None] = None

    @property
    def taught(self) -> bool:
        return True

    def __call__(self, setting: Setting) -> models.Model:
        widths = setting.hidden if self.hidden is None else self.hidden
        n = setting.domain.dim
        net = mlp(n + 1 + setting.x_dim, widths, setting.domain.inputs, setting.arithmetic)
        return models.TwoStep(Concatenated(net, setting.features() or nn.Identity()), setting.domain, self.t)


@dataclass(frozen=True)
class Radial(Model):
    """A sum of Gaussian functions, bounded by a sine: the policy of PILCO.

    Args:
        basis: number of functions.
    """

    basis: Fixed[Size] = 100

    def __call__(self, setting: Setting) -> models.Model:
        return Sine(made.Radial(setting.x_dim, self.basis, setting.domain.dim), setting.domain)


@dataclass(frozen=True)
class Safeguarded(Model):
    """A learned solver of the lasso that at prediction is never worse than ISTA at any layer; training has no safeguard.

    Args:
        inner: the learned solver.
    """

    inner: Unroll = Unroll(Middle(), Lista(), 16)

    def __call__(self, setting: Setting) -> models.Model:
        trained = self.inner(setting)
        assert isinstance(trained, models.Unroll)
        update = sparse.Safeguarded(trained.update, setting.ista())
        return models.Guarded(trained, models.Unroll(trained.init, update, trained.steps, trained.domain))


def _repeats(setting: Setting) -> bool:
    """Whether f is deterministic; a random one cannot tell which iterate is the best."""
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
    "mip": TwoStep(),
    "radial": Radial(),
    "psd": Unroll(PsdEncoder(), Ista(), 16),
    "lista": Unroll(Middle(), Lista(), 16),
    "lista_cp": Unroll(Middle(), ListaCp(), 16),
    "alista": Unroll(Middle(), Alista(), 16),
    "slista": Unroll(Middle(), StepIsta(), 16),
}
