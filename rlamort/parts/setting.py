"""The setting that parts are built for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from torch import Tensor, nn

from rlamort.config import Widths
from rlamort.constraints import Constraints
from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.nets import FLOAT32, Arithmetic, NormedMlp, Standardise, mlp
from rlamort.norm import NORMS, Normed
from rlamort.objective import Cost, Objective
from rlamort.problem import Problem, device_of, presented
from rlamort.update import sparse

SAMPLE = 1_000  # contexts whose mean and spread standardise the input of networks


class Setting(NamedTuple):
    """What a part is built for: the domain of predictions, the size of contexts, and the problem, where it is known."""

    domain: Domain  # Y, the domain of predictions and iterates
    x_dim: int  # numbers of a context that models read
    hidden: Widths  # of hidden layers, unless a part sets its own
    arithmetic: Arithmetic = FLOAT32
    problem: Problem | None = None
    contexts: Tensor | None = None  # a sample of the problem's (S, d), hidden parts included
    own: Callable[[Sequence[int], int], nn.Module | None] | None = None  # builds the problem's own network over this domain
    horizon: int | None = None  # actions in a solution, of planners; what they read ends with the plan of the step before
    labelled: bool = False  # whether batches hold solutions that were found before
    constraints: Constraints | None = None  # of the problem, where it has any
    objective: Objective | None = None  # what models ask and losses score; None for the problem's cost

    @classmethod
    def of(cls, problem: Problem, hidden: Widths, labelled: bool = False) -> Self:
        """The setting of a problem's own domain."""
        contexts = presented(problem, SAMPLE, device_of(problem))
        seen = problem.layout.seen.dim
        return cls(problem.domain, seen, hidden, problem=problem, contexts=contexts, own=problem.network, labelled=labelled,
                   constraints=Constraints.of(problem))  # fmt: skip

    def over(self, domain: Domain) -> Self:
        """The setting of another domain, which the problem's own network does not predict."""
        return self._replace(domain=domain, own=None, horizon=None)

    @property
    def f(self) -> Objective:
        """The objective: the problem's cost, unless it holds constraints, too."""
        return self.objective or Cost(self.known("it"))

    def bound(self, what: str) -> Constraints:
        """The problem's constraints. Raises UserError if there are none; `what` needs them."""
        problem = self.known(what)
        if self.constraints is None:
            raise UserError(
                f"{what}: {type(problem).__name__} has no constraints; a problem with `constraints(y, x)` is needed"
            )
        return self.constraints

    def actions(self, what: str) -> int:
        """The number of actions in a plan. Raises UserError if solutions are no plans; `what` needs them."""
        if self.horizon is None:
            raise UserError(f"{what}: solutions are no plans here, which only planners in Y itself have")
        return self.horizon

    def known(self, what: str) -> Problem:
        """The problem. Raises UserError if there is none; `what` needs it."""
        if self.problem is None:
            raise UserError(f"{what}: it needs a known problem, a subclass of rlamort.Problem")
        return self.problem

    def features(self) -> nn.Module | None:
        """A layer that standardises contexts, where a sample of them is known."""
        return None if self.contexts is None else Standardise(self.contexts[:, : self.x_dim])

    def network(self, hidden: Widths | None = None, candidates: int = 1, norm: Normed = "none") -> nn.Module:
        """A network (B, x_dim) -> (B, candidates * domain.inputs): the problem's own if it has one, else a ReLU network.

        Raises:
            UserError: `norm` is to normalise the problem's own.
        """
        widths = self.hidden if hidden is None else hidden
        own = None if self.own is None else self.own(widths, candidates)
        outputs = candidates * self.domain.inputs
        if own is not None and norm != "none":
            raise UserError(f"model.norm={norm}: {type(self.problem).__name__} has a network of its own; only none is allowed")
        if own is not None:
            return own
        if norm == "none":
            net: nn.Module = mlp(self.x_dim, widths, outputs, self.arithmetic)
        else:
            net = NormedMlp(self.x_dim, widths, outputs, NORMS[norm], self.arithmetic)
        features = self.features()
        return net if features is None else nn.Sequential(features, net)

    def ista(self) -> sparse.Ista:
        """The ISTA step of a lasso problem. Raises UserError for other problems."""
        found = getattr(self.problem, "ista", None)
        if not isinstance(found, sparse.Ista):
            name = "it" if self.problem is None else type(self.problem).__name__
            raise UserError(f"env={name}: it has no `ista`, the step of a lasso; rlamort/Lasso-v0 has one")
        return found
