"""Sparse coding, predicted or unfolded: PSD, LISTA and what followed it.

f = the lasso · Y = codes · p(x) = signals · y_theta = an encoder or a learned solver · L = objective, regress, or true codes.
"""

import functools
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

from rlamort.agents.amortize import posed
from torch import Tensor

from rlamort.agent import Adam, Agent, descend
from rlamort.config import Count, Fraction, Positive, Size, Whole
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.losses import Loss, OverIterates, Regress, objective, weighed
from rlamort.model import Full, Model, Unroll
from rlamort.nets import Zeros
from rlamort.objective import Cost, Metrics, Objective
from rlamort.source import Batch, Contexts
from rlamort.update import Update
from rlamort.update.sparse import Alista, Fista, GradientRestart, Ista, Lista, ListaCp, Momentum, Psd, Safeguarded, StepIsta


class Code(Agent):
    """A model of a sparse coding problem's solutions, trained on the problem itself.

    Args:
        spec: of the problem's environment.
        model: psd predicts a code, which steps of ISTA refine; lista, lista_cp, alista and slista (learned steps) are solvers.
        layers: steps of the solver.
        loss: objective scores the answer; iterates every layer's; regress its distance to what FISTA makes of the prediction;
            truth every layer's distance to the codes that made the signals, where these are known.
        decay: of a layer's weight in iterates and truth, for each layer that follows.
        rate: ISTA's step before training, in units of 1 / L, which psd keeps.
        momentum: fista begins with FISTA's and learns it.
        safeguard: ista answers with a step of ISTA where a learned one does not lower the objective.
        teacher_steps: of FISTA in regress.
        learning_rate: Adam's step size.
        decay_updates: updates over which it falls to zero along a cosine; null keeps it.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        model: Literal["psd", "lista", "lista_cp", "alista", "slista"] = "lista",
        layers: Whole = 16,
        loss: Literal["objective", "iterates", "regress", "truth"] = "iterates",
        decay: Fraction = 0.5,
        rate: Positive = 1.0,
        momentum: Literal["none", "fista"] = "none",
        safeguard: Literal["none", "ista"] = "none",
        teacher_steps: Size = 50,
        learning_rate: Positive = 2e-3,
        decay_updates: Count | None = None,
    ) -> None:
        super().__init__(spec, normalise=False)
        problem = self.problem = posed(spec)
        plain = getattr(problem, "ista", None)
        if not isinstance(plain, Ista):
            raise UserError(f"env={type(problem).__name__}: it has no `ista`, the step of a lasso; rlamort/Lasso-v0 has one")
        self.f, y = Cost(problem), problem.domain
        ista = Ista(plain.dictionary, plain.alpha, rate)
        atoms = plain.dictionary.shape[1]
        updates: dict[str, Callable[[], Update]] = {
            "psd": lambda: ista,
            "lista": lambda: Lista(ista, layers),
            "lista_cp": lambda: ListaCp(ista, layers),
            "alista": lambda: Alista(ista, layers),
            "slista": lambda: StepIsta(ista, layers, atoms),
        }
        if model == "psd" and (momentum, safeguard) != ("none", "none"):
            raise UserError("model=psd: its steps are ISTA's own; momentum=none and safeguard=none are needed")
        if safeguard == "ista" and loss == "truth":
            raise UserError("safeguard=ista: it holds codes to the objective, which loss=truth does not train; none is needed")
        start = Full(Psd(plain) if model == "psd" else Zeros(atoms), y)
        update = updates[model]()
        if momentum == "fista":
            update = Momentum(update, layers)
        trained = Unroll(start, update, layers, y)
        self.model = Unroll(start, Safeguarded(update, plain), layers, y) if safeguard == "ista" else trained
        losses: dict[str, Callable[[], Loss]] = {
            "objective": lambda: objective,
            "iterates": lambda: OverIterates(decay),
            "regress": lambda: Regress(Unroll(start, Fista(plain, GradientRestart()), teacher_steps, y)),
            "truth": lambda: Truth(problem, decay),
        }
        self.loss = functools.partial(losses[loss](), trained)
        self.adam = Adam(self.model.parameters(), learning_rate, horizon=decay_updates)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        y: Tensor = self.model(x, self.f.oracle(x))
        return y

    def evaluate(self, batch: Contexts) -> Metrics:
        return {}  # f is known

    def improve(self, batch: Contexts) -> Metrics:
        loss, metrics = self.loss(self.f, batch)
        descend(loss, self.model.parameters(), self.adam)
        return {f"model/{name}": value for name, value in metrics.items()}


@runtime_checkable
class KnownCodes(Protocol):
    """A problem whose signals are made of codes."""

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Signals (count, M), and the codes (count, N) that made them."""


class Truth:
    """mean_B sum_k w_k |y_k - y|^2 over layers, y the codes that made the signals (Chen et al., 2018, eq. 17).

    Signals with their codes are drawn anew, as many as the batch has: contexts do not hold codes, which would let networks read
    the answer.

    Args:
        problem: what draws them.
        decay: w_k is proportional to decay^(K - k).

    Raises:
        UserError: it does not know the codes.
    """

    def __init__(self, problem: object, decay: float) -> None:
        if not isinstance(problem, KnownCodes):
            raise UserError(f"loss=truth: {type(problem).__name__} has no `pairs`, signals with true codes; SparseRecovery has")
        self.problem, self.decay = problem, decay

    def __call__(self, model: Model, f: Objective, batch: Batch | Contexts) -> tuple[Tensor, Metrics]:
        x, y = (part.to(batch.x) for part in self.problem.pairs(len(batch.x)))
        path = model.iterates(x, f.oracle(x))  # (K + 1, B, N)
        distances = (path - y).square().sum(-1).mean(-1)
        return weighed(distances, self.decay), {"distance": distances[-1].detach()}
