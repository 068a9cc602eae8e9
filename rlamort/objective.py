"""f, the cost that a model amortizes: lower is better, one number per context.

x context (B, d) · y solution (B, n) · lam density parameters · f cost (B,) · alpha temperature
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlamort.critic import Critic
from rlamort.domain import Density
from rlamort.errors import UserError
from rlamort.problem import Problem

Metrics = dict[str, Tensor]
Face = Callable[[Tensor], Tensor]


class Oracle:
    """What a semi-amortized model may ask about f(.; x) while it solves: its value, its gradient, a fixed-point map.

    Args:
        value: y (B, n) -> f(y; x) (B,).
        map: y (B, n) -> g(y; x) (B, n), whose fixed point is the solution.
        second_order: whether gradients carry a graph where gradients are recorded, so that losses differentiate through them.
    """

    def __init__(self, value: Face | None = None, map: Face | None = None, second_order: bool = True) -> None:
        self._value, self._map, self.second_order = value, map, second_order

    def value(self, y: Tensor) -> Tensor:
        """y (B, n) -> f(y; x) (B,)."""
        if self._value is None:
            raise UserError("oracle.value: this objective has no value to ask for; an update that asks for its map is needed")
        return self._value(y)

    def values(self, ys: Tensor) -> Tensor:
        """ys (S, B, n), several y for each context -> (S, B), at once."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # from vmap, which may be as slow as one by one
            try:
                return torch.vmap(self.value, randomness="different")(ys)
            except RuntimeError:  # a cost may do what vmap cannot, such as look at a value; one by one is always right
                return torch.stack([self.value(y) for y in ys])

    def grad(self, y: Tensor) -> Tensor:
        """y (B, n) -> df/dy (B, n), also inside no_grad; per item, whatever the batch."""
        graph = torch.is_grad_enabled() and self.second_order
        with torch.enable_grad():
            at = y if graph and y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.value(at).sum(), at, create_graph=graph)
        return slope

    def map(self, y: Tensor) -> Tensor:
        """y (B, n) -> g(y; x) (B, n)."""
        if self._map is None:
            raise UserError("oracle.map: this objective has no fixed-point map; a problem whose class defines `map` is needed")
        return self._map(y)

    def first_order(self) -> "Oracle":
        """The same, with gradients that carry no graph."""
        return Oracle(self._value, self._map, second_order=False)

    def tethered(self, anchor: Tensor, strength: float) -> "Oracle":
        """That of f(y; x) + strength / 2 |y - anchor|^2 with anchor (B, n), which has no map (tutorial, eq. 14)."""
        return Oracle(lambda y: self.value(y) + strength / 2 * (y - anchor).square().sum(-1), second_order=self.second_order)

    def through(self, decode: Face) -> "Oracle":
        """That of f(decode(z); x) over z (B, m), which has no map."""
        return Oracle(lambda z: self.value(decode(z)), second_order=self.second_order)


class Objective:
    """f : Y x X -> R^B. An objective owns nothing that learns; whoever calls `descend` says what moves."""

    def oracle(self, x: Tensor) -> Oracle:
        """What a model may ask while it solves for x (B, d); that need not be what the loss scores."""
        return Oracle(lambda y: self(y, x))

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, n), x (B, d) -> f(y; x) (B,)."""
        return self.report(y, x)[0]

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        """f(y; x) (B,), and what is worth knowing of it as detached 0-d tensors."""
        raise NotImplementedError


class Cost(Objective):
    """f of a user's problem, on contexts as rows.

    Args:
        problem: what defines it.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        cost = self.problem.cost(y, self.problem.layout.unpack(x))
        if cost.shape != y.shape[:1]:
            raise UserError(
                f"{type(self.problem).__name__}.cost: shape {tuple(cost.shape)} is returned for y of shape "
                f"{tuple(y.shape)}; one number per item, ({len(y)},), is needed"
            )
        return _narrowed(cost, y), {}

    def oracle(self, x: Tensor) -> Oracle:
        def step(y: Tensor) -> Tensor:
            mapped = self.problem.map(y, self.problem.layout.unpack(x))
            if mapped is None:
                raise UserError(f"oracle.map: {type(self.problem).__name__} defines no `map`, which this update asks for")
            return _narrowed(mapped, y)

        return Oracle(lambda y: self(y, x), step)


def _narrowed(given: Tensor, y: Tensor) -> Tensor:
    """In y's dtype where that is the narrower one, as it is where a user computes with NumPy's numbers."""
    return given.to(y.dtype) if torch.promote_types(given.dtype, y.dtype) != y.dtype else given


class MaxQ(Objective):
    """f(y; x) = -(mean_i Q_i(x, y) - beta std_i Q_i(x, y)), the max-Q problem of an ensemble of critics.

    std is the population's: beta = 1 over two critics is exactly -min(Q_1, Q_2) (Fujimoto et al., 2018, eq. 10).

    Args:
        critic: Q_1..Q_E.
        beta: pessimism.
        members: how many of the ensemble, from the first, take part; None for all.
    """

    def __init__(self, critic: Critic, beta: float = 1.0, members: int | None = None) -> None:
        self.critic, self.beta, self.members = critic, beta, members

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        q = self.critic(x, y, self.members)  # (E, B)
        return self.beta * q.std(0, correction=0) - q.mean(0), {}


class Temperature(nn.Module):
    """alpha > 0, held as its logarithm so that no gradient step can make it negative.

    Args:
        alpha: initial value; 0 is allowed, and then it stays.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(alpha) if alpha > 0 else -math.inf))

    def forward(self) -> Tensor:
        return self.log.exp()


class Soft(Objective):
    """f(lam; x) = E_{y ~ q(.; lam)}[f(y; x) + alpha log q(y; lam)], estimated by one reparameterised draw.

    With f = -Q this is SAC's actor loss (Haarnoja et al., 2018b, eq. 7), with alpha = 0 that of SVG(0), and with
    f = -log p(x, y) and alpha = 1 it is -ELBO (tutorial, eqs. 31 and 75).

    Args:
        f: the objective of a single solution.
        density: q.
        alpha: temperature; what is passed is shared, not copied.
    """

    def __init__(self, f: Objective, density: Density, alpha: Temperature) -> None:
        self.f, self.density, self.alpha = f, density, alpha

    def report(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        y, logq = self.density.sample(lam)
        cost, metrics = self.f.report(y, x)
        # the temperature is a price here, not a variable: whoever minimises f must not move it
        return cost + self.alpha().detach() * logq, metrics | {"entropy": -logq.detach().mean()}
