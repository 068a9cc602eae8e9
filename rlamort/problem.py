"""What a user writes: an optimisation problem that is solved again and again, argmin_{y in Y} f(y; x) for x ~ p(x).

x context · y solution (B, n) · f cost (B,) · B batch · d numbers in a context
"""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # with defaults, which Python has from 3.13 on; torch needs it too

from rlamort.domain import ContextDomain, Data, Domain
from rlamort.errors import UserError, first_of

Parts = Tensor | dict[str, Tensor]  # contexts as the user has them: leading axis B
X = TypeVar("X", bound=Parts, default=Any)  # which of the two


class Problem(nn.Module, Generic[X]):
    """argmin_{y in Y} f(y; x) for x ~ p(x) (Amos, Tutorial on amortized optimization, eq. 1).

    `Problem[Tensor]` and `Problem[dict[str, Tensor]]` say to a type checker what its contexts are; nothing else depends on it.

    Subclasses set `domain` and define `contexts` and `cost`, and `constraints` where no domain holds them; what is learned
    together with the solver (a decoder, an energy) is an ordinary parameter.

    Attributes:
        domain: Y; where some of its data are `PerItem`, `domain_data` gives them, and `domain.at(x)` is C(x).
        violation_penalty: weight of the quadratic penalty on violated `constraints` in rewards, for agents that see no more.
        convex: whether f(.; x) and Y are convex for every x, which makes gradients a certificate.
        hidden: keys of a dict context that neither networks nor solvers on their way ever read: a query set, the true code of a
            signal, an expert's label. `cost` scores with them, and losses learn from them.
    """

    domain: Domain
    violation_penalty: float = 0.0
    convex: bool = False
    hidden: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        declared = getattr(type(self), "domain", None)
        if isinstance(declared, Domain):  # one of its own, which moves to a device with the problem
            self.domain = copy.deepcopy(declared)

    def contexts(self, count: int) -> X:
        """x ~ p(x), `count` of them: a tensor, or a dict of tensors, with leading axis `count`; from torch's generator."""
        raise UserError(f"{type(self).__name__}.contexts: it is not defined; contexts(count), the contexts x, is needed")

    def held_out(self, count: int) -> X:
        """x ~ p(x) that `contexts` never gives, where contexts are data and run out: what evaluations are of."""
        return self.contexts(count)

    def cost(self, y: Tensor, x: X) -> Tensor:
        """y (B, n), x -> f(y; x) (B,): lower is better, and no item depends on another."""
        raise UserError(f"{type(self).__name__}.cost: it is not defined; cost(y, x), one number per item, is needed")

    def support(self, y: Tensor, x: X) -> Tensor:
        """y (B, n), x without what is hidden -> (B,), what solvers may ask while they solve; the cost itself by default."""
        return self.cost(y, x)

    def constraints(self, y: Tensor, x: X) -> tuple[Tensor, Tensor] | None:
        """y (B, n), x without what is hidden -> (equalities h (B, m) = 0, inequalities g (B, k) <= 0); None: there are none.

        For what no `domain` holds, such as nonlinear constraints. m or k may be 0, and both are the same at every call;
        differentiable in y; no item depends on another. Their unit is that in which violations are said.
        """
        return None

    def domain_data(self, x: X) -> Data:
        """x without what is hidden -> the data of C(x), (B, ...) by the names in `domain.needs`; differentiable in x."""
        raise UserError(f"{type(self).__name__}.domain_data: it is not defined; it gives {', '.join(self.domain.needs)}")

    def data_at(self, x: Tensor) -> Data:
        """As `domain_data`, of contexts as vectors (B, d), of which further columns are ignored."""
        seen = self.layout.seen
        return self.domain_data(cast(X, seen.unpack(x[:, : seen.dim])))

    def solution(self, x: X) -> Tensor | None:
        """x -> y*(x) (B, n), where something knows it: for regression, gaps and certificates."""
        return None

    def residual(self, y: Tensor, x: X) -> Tensor | None:
        """y (B, n), x -> (B,) >= 0, how far y is from being a solution, where that is cheap to tell."""
        return None

    def map(self, y: Tensor, x: X) -> Tensor | None:
        """y (B, n), x -> g(y; x) (B, n), where y* is a fixed point of g."""
        return None

    def network(self, hidden: Sequence[int], candidates: int) -> nn.Module | None:
        """A network of its own, rows (B, d) -> (B, candidates * domain.inputs), where the problem has symmetries to respect.

        Args:
            hidden: widths of its hidden layers.
            candidates: how many predictions it makes for a context.
        """
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            begun(self)
        if name == "domain" and isinstance(value, Domain) and value.needs and not isinstance(value, ContextDomain):
            value = ContextDomain(value, self)
        super().__setattr__(name, value)
        if name == "domain" and isinstance(getattr(type(self), name, None), Domain):
            self.__dict__[name] = self._modules[name]  # or Python would find the class's first

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        begun(self)
        super().register_buffer(name, tensor, persistent)

    @functools.cached_property
    def layout(self) -> "Layout":
        """How its contexts lie in a row of numbers."""
        with torch.random.fork_rng(), drawing_on(device_of(self)):
            return Layout.of(type(self).__name__, self.contexts(2), self.hidden)


def begun(problem: Problem) -> Problem:
    """The problem, where its class has called `super().__init__()`; without that it has neither a domain of its own nor parts.

    Raises:
        UserError: it has not.
    """
    if "_modules" not in vars(problem):
        raise UserError(f"{type(problem).__name__}.__init__: super().__init__() is not called; it must be, before all else")
    return problem


def learned(problem: Problem) -> list[str]:
    """The names of its parameters that are trained with a solver."""
    return [name for name, parameter in problem.named_parameters() if parameter.requires_grad]


def require_frozen(problem: Problem, what: str, instead: str) -> None:
    """Raises UserError if the problem has parameters that are to be learned, for which `what` has no gradient."""
    if names := learned(problem):
        raise UserError(
            f"{what} no gradient for the parameters of {type(problem).__name__}, which are trained with a model "
            f"({first_of(names)}); freeze them (requires_grad_(False)), or take {instead}"
        )


class Layout(NamedTuple):
    """Contexts of any structure as rows of numbers (B, d), so that networks, replay and environments see tensors alone."""

    keys: tuple[str, ...] | None  # of a dict of tensors, those that are hidden last; None for a single tensor
    shapes: tuple[tuple[int, ...], ...]  # without the batch
    dtypes: tuple[torch.dtype, ...]
    hidden: int = 0  # how many of the keys

    @classmethod
    def of(cls, name: str, x: Parts, hidden: Sequence[str] = ()) -> Self:
        """From two contexts of the problem class `name`.

        Raises:
            UserError: they are no tensors, or of unequal count, or lack what is hidden.
        """
        known = list(x) if isinstance(x, dict) else []
        for key in hidden:
            if key not in known:
                raise UserError(f"{name}.hidden: {key!r} is no key of its contexts; allowed: {', '.join(known) or 'none'}")
        if known and set(hidden) == set(known):
            raise UserError(f"{name}.hidden: it hides every key; at least one is needed that models may read")
        keys = tuple(sorted(known, key=lambda key: key in hidden)) if isinstance(x, dict) else None
        parts = [x[key] for key in keys or ()] if isinstance(x, dict) else [x]
        for key, part in zip(keys or ("",), parts, strict=True):
            where = f"{name}.contexts(2)" + (f"[{key!r}]" if key else "")
            if not isinstance(part, Tensor):
                raise UserError(f"{where}: a {type(part).__name__} is given; a tensor, or a dict of tensors, is needed")
            if part.ndim == 0 or len(part) != 2:
                raise UserError(f"{where}: shape {tuple(part.shape)} is given; its leading axis must be the count, 2")
        return cls(keys, tuple(tuple(p.shape[1:]) for p in parts), tuple(p.dtype for p in parts), len(hidden))

    @property
    def seen(self) -> Self:
        """That of contexts without what is hidden, which are the first numbers of a row."""
        if not self.hidden:
            return self
        keys = self.keys and self.keys[: -self.hidden]
        return self._replace(keys=keys, shapes=self.shapes[: -self.hidden], dtypes=self.dtypes[: -self.hidden], hidden=0)

    @property
    def dim(self) -> int:
        """d."""
        return sum(math.prod(shape) for shape in self.shapes)

    def pack(self, x: Parts) -> Tensor:
        """x -> (B, d), in the widest floating dtype among its parts."""
        parts = [x] if isinstance(x, Tensor) else [x[key] for key in self.keys or ()]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        if not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        flat = [part.reshape(len(part), -1).to(dtype) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def unpack(self, row: Tensor) -> Parts:
        """(B, d) -> x. Floating parts keep the row's dtype."""
        if self.keys is None and self.dtypes[0].is_floating_point:  # the usual case, at every update
            return row if len(self.shapes[0]) == 1 else row.reshape(len(row), *self.shapes[0])
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [
            part.reshape(len(row), *shape).to(part.dtype if dtype.is_floating_point else dtype)
            for part, shape, dtype in zip(torch.split(row, sizes, dim=-1), self.shapes, self.dtypes, strict=True)
        ]
        return parts[0] if self.keys is None else dict(zip(self.keys, parts, strict=True))


def device_of(problem: Problem) -> torch.device | None:
    """The device of its parameters and buffers, those of its domain included; None if it has none."""
    first = next(itertools.chain(problem.parameters(), problem.buffers()), None)
    return None if first is None else first.device


def draw(problem: Problem, count: int, device: torch.device | None = None) -> Tensor:
    """x ~ p(x) (count, d) as vectors, drawn on `device`; from torch's generator."""
    with drawing_on(device):
        x = problem.layout.pack(problem.contexts(count))
    return x if device is None else x.to(device)


def unseen(problem: Problem, count: int, device: torch.device | None = None) -> Tensor:
    """As `draw`, of what is held out."""
    with drawing_on(device):
        x = problem.layout.pack(problem.held_out(count))
    return x if device is None else x.to(device)


def drawing_on(device: torch.device | None) -> contextlib.AbstractContextManager[object]:
    """While it holds, tensors that a problem makes without saying where are on `device`, beside its parameters.

    What is compiled cannot enter it (torch refuses, or forgets the device), so that it must hold around.
    """
    outside = device is None or device.type == "cpu" or torch.compiler.is_compiling()
    return contextlib.nullcontext() if outside else cast(contextlib.AbstractContextManager[object], device)


Drawn = Callable[[Problem, int, torch.device | None], Tensor]  # x (count, d) as rows


def presented(problem: Problem, count: int, device: torch.device | None = None, drawn: Drawn = draw) -> Tensor:
    """What is drawn, by `draw` or `unseen`, as networks see it: in torch's default dtype, whatever `contexts` gives."""
    return drawn(problem, count, device).to(torch.get_default_dtype())
