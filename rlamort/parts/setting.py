"""What a model is built for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from torch import Tensor, nn

from rlamort.config import Widths
from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.nets import FLOAT32, Arithmetic, Standardise, mlp
from rlamort.objective import Cost
from rlamort.problem import Problem, presented
from rlamort.update import sparse

SAMPLE = 1_000  # contexts whose mean and spread standardise the input of networks


class Setting(NamedTuple):
    """What a model is built for: where it answers, what it reads, and the problem behind it, where that is known."""

    domain: Domain  # Y, in which it answers and iterates
    x_dim: int  # numbers of a context that it reads
    hidden: Widths  # of networks that do not say otherwise
    arithmetic: Arithmetic = FLOAT32
    problem: Problem | None = None
    contexts: Tensor | None = None  # of it (S, d), whole
    own: Callable[[Sequence[int], int], nn.Module | None] | None = None  # makes the problem's own network over this domain
    previous: bool = False  # whether what it reads ends with a solution of this domain: that of the step before

    @classmethod
    def of(cls, problem: Problem, hidden: Widths) -> Self:
        """For the problem itself."""
        first = next(iter((*problem.parameters(), *problem.buffers())), None)
        contexts = presented(problem, SAMPLE, None if first is None else first.device)
        seen = problem.layout.seen.dim
        return cls(problem.domain, seen, hidden, problem=problem, contexts=contexts, own=problem.network)

    def over(self, domain: Domain) -> Self:
        """For another space of solutions, of which the problem's own network knows nothing."""
        return self._replace(domain=domain, own=None, previous=False)

    @property
    def f(self) -> Cost:
        """The problem's cost."""
        return Cost(self.known("it"))

    def known(self, what: str) -> Problem:
        """The problem. Raises UserError where there is none; `what` needs it."""
        if self.problem is None:
            raise UserError(f"{what}: it asks a problem that is known; a subclass of rlamort.Problem is needed")
        return self.problem

    def features(self) -> nn.Module | None:
        """What standardises contexts, where a sample of them is known."""
        return None if self.contexts is None else Standardise(self.contexts[:, : self.x_dim])

    def network(self, hidden: Widths | None = None, candidates: int = 1) -> nn.Module:
        """A network (B, x_dim) -> (B, candidates * domain.inputs): the problem's own, where it has one, or a ReLU network."""
        widths = self.hidden if hidden is None else hidden
        own = None if self.own is None else self.own(widths, candidates)
        if own is not None:
            return own
        features, net = self.features(), mlp(self.x_dim, widths, candidates * self.domain.inputs, self.arithmetic)
        return net if features is None else nn.Sequential(features, net)

    def ista(self) -> sparse.Ista:
        """The lasso's step, of a problem that has one. Raises UserError where it has none."""
        found = getattr(self.problem, "ista", None)
        if not isinstance(found, sparse.Ista):
            name = "it" if self.problem is None else type(self.problem).__name__
            raise UserError(f"env={name}: it has no `ista`, the step of a lasso; rlamort/Lasso-v0 has one")
        return found
