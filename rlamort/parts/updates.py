"""Steps of solvers, and how losses differentiate through them, as parts."""

from dataclasses import dataclass
from typing import Any, Literal

from rlamort import adjoint as adjoints
from rlamort import update as updates
from rlamort.config import Count, Fixed, Fraction, Part, Positive, Size
from rlamort.parts.setting import Setting
from rlamort.solve.refine import CLIP
from rlamort.update import sparse

# adjoints take no setting


@dataclass(frozen=True)
class Adjoint(Part):
    """How losses differentiate through steps."""

    @property
    def detached(self) -> bool:
        """Whether they do not differentiate into the start."""
        return False

    def __call__(self) -> adjoints.Adjoint:
        raise NotImplementedError


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through every step, with second derivatives."""

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.Unrolled()


@dataclass(frozen=True)
class FirstOrder(Adjoint):
    """Backpropagation through every step, with f's gradients as constants."""

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.FirstOrder()


@dataclass(frozen=True)
class Detached(Adjoint):
    """Backpropagation through the steps, but not into the start, which learns from a loss's own part for it.

    Args:
        inner: how losses differentiate through the steps.
    """

    inner: Adjoint = Unrolled()

    @property
    def detached(self) -> bool:
        return True

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.Detached(self.inner())


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Truncated backpropagation.

    Args:
        steps: length of a window.
    """

    steps: Count = 5

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.Truncated(self.steps)


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Backpropagation through the last step alone."""

    def __call__(self) -> adjoints.Adjoint:
        return adjoints.OneStep()


@dataclass(frozen=True)
class Implicit(Adjoint):
    """By the implicit function theorem.

    Args:
        solver: of the linear system: cg, conjugate gradients on the Hessian; neumann, a Neumann series of the step's Jacobian.
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
        """The update for `steps` iterates in `setting.domain`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gradient(Update):
    """Gradient descent.

    Args:
        rate: step size.
        momentum: heavy-ball momentum.
        clip: largest gradient norm, per item.
    """

    rate: Positive = 0.1
    momentum: Fraction = 0.0
    clip: Positive = CLIP

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Gradient(self.rate, self.momentum, self.clip)


@dataclass(frozen=True)
class LearnedGradient(Update):
    """Gradient descent with learned step sizes, one per step and coordinate (Li et al., 2017: Meta-SGD).

    Args:
        rate: initial step sizes.
        clip: largest gradient norm, per item.
    """

    rate: Positive = 0.1
    clip: Positive = CLIP

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Gradient(updates.Learned(self.rate, setting.domain.dim, steps), clip=self.clip)


@dataclass(frozen=True)
class Adam(Update):
    """Adam, per item, with a decreasing step size.

    Args:
        rate: initial step size.
    """

    rate: Positive = 0.1

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Adam(self.rate)


@dataclass(frozen=True)
class LineSearch(Update):
    """Projected gradient descent with the best of twelve step sizes at every step, or none: f never increases."""

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.LineSearch(setting.domain)


@dataclass(frozen=True)
class SpectralGradient(Update):
    """Spectral projected gradient: Barzilai-Borwein step sizes (Birgin, Martinez and Raydan, 2000).

    Args:
        memory: costs that the nonmonotone rule compares with.
    """

    memory: Size = 10

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.SpectralGradient(setting.domain, self.memory)


@dataclass(frozen=True)
class Recurrent(Update):
    """A learned step: a recurrent cell reads the iterate, its gradient and the context.

    Args:
        memory: size of the cell's state.
        head: additive adds the output to the iterate, gated mixes the iterate with a proposal (Marino et al., 2018).
        cell: gru or lstm.
        encoding: of the gradient; logsign (Andrychowicz et al., 2016) or normed.
        reads_context: whether x is an input of the cell.
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
class Lbfgs(Update):
    """Limited-memory BFGS with a parallel line search.

    Args:
        history: number of curvature pairs.
        candidates: step sizes in the line search.
    """

    history: Size = 10
    candidates: Size = 10

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Lbfgs(setting.domain, self.history, self.candidates)


@dataclass(frozen=True)
class Anderson(Update):
    """Anderson acceleration of the problem's fixed-point map.

    Args:
        history: number of iterates that are combined.
        beta: mixing parameter.
    """

    history: Size = 5
    beta: Fraction = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return updates.Anderson(self.history, self.beta)


@dataclass(frozen=True)
class Ista(Update):
    """Proximal gradient on the lasso.

    Args:
        rate: step size in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return self.step(setting)

    def step(self, setting: Setting) -> sparse.Ista:
        """The update with its own methods, on which learned variants are initialised."""
        given = setting.ista()
        return sparse.Ista(given.dictionary, given.alpha, self.rate)


@dataclass(frozen=True)
class Fista(Update):
    """Accelerated proximal gradient on the lasso, with adaptive gradient restarts."""

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Fista(setting.ista(), sparse.GradientRestart())


@dataclass(frozen=True)
class Lista(Update):
    """ISTA with learned matrices and thresholds (Gregor and LeCun, 2010).

    Args:
        rate: ISTA's step size at initialisation, in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Lista(Ista(self.rate).step(setting), steps)


@dataclass(frozen=True)
class ListaCp(Update):
    """LISTA with coupled matrices (Chen et al., 2018).

    Args:
        rate: ISTA's step size at initialisation, in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.ListaCp(Ista(self.rate).step(setting), steps)


@dataclass(frozen=True)
class Alista(Update):
    """LISTA with an analytic, data-free weight matrix (Liu et al., 2019)."""

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Alista(setting.ista(), steps)


@dataclass(frozen=True)
class StepIsta(Update):
    """ISTA with learned step sizes, one per layer and coordinate (Ablin et al., 2019).

    Args:
        rate: initial step sizes, in units of 1 / L.
    """

    rate: Positive = 1.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.StepIsta(Ista(self.rate).step(setting), steps, setting.domain.dim)


@dataclass(frozen=True)
class Momentum(Update):
    """A learned step from an extrapolated point, with learned momentum that is initialised as FISTA's.

    Args:
        update: the learned step.
    """

    update: Update = StepIsta()

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        return sparse.Momentum(self.update(setting, steps), steps)


Adjoint.presets = {
    "unrolled": Unrolled(), "first_order": FirstOrder(), "truncated": Truncated(), "one_step": OneStep(),
    "implicit": Implicit(), "detached": Detached(),
}  # fmt: skip
Update.presets = {
    "gradient": Gradient(), "learned_gradient": LearnedGradient(), "adam": Adam(), "spectral": SpectralGradient(),
    "line_search": LineSearch(), "recurrent": Recurrent(), "lbfgs": Lbfgs(), "anderson": Anderson(), "ista": Ista(),
    "fista": Fista(), "lista": Lista(), "lista_cp": ListaCp(), "alista": Alista(), "step_ista": StepIsta(),
    "momentum": Momentum(),
}  # fmt: skip
