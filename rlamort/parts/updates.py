"""Steps of solvers, and how losses differentiate through them, as parts."""

from dataclasses import dataclass
from typing import Any, Literal

from rlamort import adjoint as adjoints
from rlamort import update as updates
from rlamort.config import Count, Fixed, Fraction, Part, Positive, Size
from rlamort.parts.setting import Setting
from rlamort.solve.refine import CLIP
from rlamort.update import sparse

# adjoints need nothing from where they stand


@dataclass(frozen=True)
class Adjoint(Part):
    """How losses differentiate through steps."""

    def __call__(self) -> adjoints.Adjoint:
        raise NotImplementedError


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Through every step, second derivatives included."""

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.Unrolled()


@dataclass(frozen=True)
class FirstOrder(Adjoint):
    """Through every step, with gradients as constants."""

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.FirstOrder()


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Through the last steps alone.

    Args:
        steps: how many.
    """

    steps: Count = 5

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.Truncated(self.steps)


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Through the last step alone."""

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.OneStep()


@dataclass(frozen=True)
class Implicit(Adjoint):
    """By the implicit function theorem.

    Args:
        solver: of the linear system: cg, conjugate gradients on the Hessian; neumann, a series of the step's Jacobian.
        iterations: of that solver.
    """

    solver: Literal["cg", "neumann"] = "cg"
    iterations: Count = 20

    def __call__(self) -> adjoints.Adjoint:
        solvers = {"cg": adjoints.ConjugateGradients, "neumann": adjoints.Neumann}
        return adjoints.Implicit(solvers[self.solver](self.iterations))


@dataclass(frozen=True)
class Update(Part):
    """A step of a solver."""

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        """For iterates in `setting.domain`, `steps` of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gradient(Update):
    """Gradient descent.

    Args:
        rate: step size.
        momentum: of the heavy ball.
        clip: the longest gradient, per item.
    """

    rate: Positive = 0.1
    momentum: Fraction = 0.0
    clip: Positive = CLIP

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Gradient(self.rate, self.momentum, self.clip)


@dataclass(frozen=True)
class LearnedGradient(Update):
    """Gradient descent whose step sizes are learned, one for each step and coordinate (Li et al., 2017: Meta-SGD).

    Args:
        rate: step sizes before training.
        clip: the longest gradient, per item.
    """

    rate: Positive = 0.1
    clip: Positive = CLIP

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Gradient(updates.Learned(self.rate, setting.domain.dim, steps), clip=self.clip)


@dataclass(frozen=True)
class Recurrent(Update):
    """A learned step: a recurrent cell reads the iterate, its gradient and the context.

    Args:
        memory: numbers that the cell keeps from step to step.
        head: how the iterate moves; additive adds to it, gated mixes it with a proposal (Marino et al., 2018).
        cell: gru or lstm.
        encoding: of the gradient; logsign (Andrychowicz et al., 2016) or normed.
        reads_context: whether the cell reads x as well.
    """

    memory: Fixed[Size] = 64
    head: Fixed[Literal["additive", "gated"]] = "additive"
    cell: Fixed[Literal["gru", "lstm"]] = "gru"
    encoding: Fixed[Literal["logsign", "normed"]] = "logsign"
    reads_context: Fixed[bool] = True

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        heads: dict[str, Any] = {"additive": updates.Additive, "gated": updates.Gated}
        cells: dict[str, Any] = {"gru": updates.Gru, "lstm": updates.Lstm}
        encodings: dict[str, Any] = {"logsign": updates.LogSign, "normed": updates.Normed}
        return updates.Recurrent(
            setting.domain.dim, self.memory, setting.x_dim if self.reads_context else 0,
            cells[self.cell], encodings[self.encoding](), heads[self.head],
        )  # fmt: skip


@dataclass(frozen=True)
class Cem(Update):
    """The cross-entropy method.

    Args:
        samples: in an iteration.
        elites: of them, which the next mean and spread are of.
        sigma: first standard deviation.
        smoothing: share of the old mean and spread that stays.
        temperature: of a soft choice of elites, through which losses differentiate; null chooses hard.
    """

    samples: Size = 64
    elites: Size = 8
    sigma: Positive = 1.0
    smoothing: Fraction = 0.0
    temperature: Positive | None = None

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        chosen = updates.HardTop() if self.temperature is None else updates.SoftTop(self.temperature)
        return updates.Cem(setting.domain, self.samples, self.elites, self.sigma, self.smoothing, selection=chosen)


@dataclass(frozen=True)
class Lbfgs(Update):
    """Limited-memory BFGS with a parallel line search.

    Args:
        history: pairs of changes that it keeps.
        candidates: step sizes that are tried.
    """

    history: Size = 10
    candidates: Size = 10

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Lbfgs(setting.domain, self.history, self.candidates)


@dataclass(frozen=True)
class Anderson(Update):
    """Anderson acceleration of the problem's fixed-point map.

    Args:
        history: iterates that are combined.
        beta: mixing.
    """

    history: Size = 5
    beta: Fraction = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Anderson(self.history, self.beta)


@dataclass(frozen=True)
class Ista(Update):
    """Proximal gradient on the lasso.

    Args:
        rate: step in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return self.step(setting)

    def step(self, setting: Setting) -> sparse.Ista:
        """The step itself."""
        given = setting.ista()
        return sparse.Ista(given.dictionary, given.alpha, self.rate)


@dataclass(frozen=True)
class Fista(Update):
    """Accelerated proximal gradient on the lasso, which restarts where it goes uphill."""

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Fista(setting.ista(), sparse.GradientRestart())


@dataclass(frozen=True)
class Lista(Update):
    """ISTA with learned matrices and thresholds (Gregor and LeCun, 2010).

    Args:
        rate: ISTA's step before training, in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Lista(Ista(self.rate).step(setting), steps)


@dataclass(frozen=True)
class ListaCp(Update):
    """LISTA with coupled matrices (Chen et al., 2018).

    Args:
        rate: ISTA's step before training, in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.ListaCp(Ista(self.rate).step(setting), steps)


@dataclass(frozen=True)
class Alista(Update):
    """LISTA whose matrix no data has made (Liu et al., 2019)."""

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Alista(setting.ista(), steps)


@dataclass(frozen=True)
class StepIsta(Update):
    """ISTA with learned steps, one for each layer and coordinate (Ablin et al., 2019).

    Args:
        rate: steps before training, in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.StepIsta(Ista(self.rate).step(setting), steps, setting.domain.dim)


@dataclass(frozen=True)
class Momentum(Update):
    """A learned step from a point ahead of the iterate, by learned momentum that begins as FISTA's.

    Args:
        update: the step.
    """

    update: Update = StepIsta()

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Momentum(self.update(setting, steps), steps)


Adjoint.presets = {
    "unrolled": Unrolled(), "first_order": FirstOrder(), "truncated": Truncated(), "one_step": OneStep(),
    "implicit": Implicit(),
}  # fmt: skip
Update.presets = {
    "gradient": Gradient(), "learned_gradient": LearnedGradient(), "recurrent": Recurrent(), "cem": Cem(), "lbfgs": Lbfgs(),
    "anderson": Anderson(), "ista": Ista(), "fista": Fista(), "lista": Lista(), "lista_cp": ListaCp(), "alista": Alista(),
    "step_ista": StepIsta(), "momentum": Momentum(),
}  # fmt: skip
