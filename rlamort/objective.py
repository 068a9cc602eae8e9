"""f, the cost that a model amortizes: lower is better, one number per context.

x context (B, d) · y solution (B, n) · lam density parameters · f cost (B,) · alpha temperature
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from rlamort.critic import Critic, NoTarget, TargetNetwork
from rlamort.domain import Density
from rlamort.errors import UserError
from rlamort.head import pessimistic
from rlamort.problem import Parts, Problem

Metrics = dict[str, Tensor]
Decode = Callable[[Tensor, Tensor], Tensor]  # z (B, m), x (B, d) -> y (B, n)
FLOATS = 2**25  # numbers in y and x together in one evaluation of a cost


class Objective:
    """f : Y x X -> R^B. An objective owns no parameters; the caller of `descend` selects what is trained."""

    def seen(self, x: Tensor) -> Tensor:
        """The part of contexts x (B, d) that models may read: all of it, unless a problem hides some."""
        return x

    def oracle(self, x: Tensor) -> "Oracle":
        """The oracle that a model queries for x (B, d); it need not be of the objective that the loss scores."""
        return Oracle(self, self.seen(x))

    def deterministic_oracle(self, x: Tensor) -> "Oracle":
        """As `oracle`, the same at every call: for deterministic actions."""
        return self.oracle(x)

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, n), x (B, d) -> f(y; x) (B,)."""
        return self.report(y, x)[0]

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        """f(y; x) (B,), and metrics as detached 0-d tensors."""
        raise NotImplementedError

    def map(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, n), x (B, d) -> g(y; x) (B, n), whose fixed point is the solution."""
        raise UserError("oracle.map: this objective has no fixed-point map; a problem whose class defines `map` is needed")


class Oracle:
    """Queries of a semi-amortized model about f(.; x): its value, its gradient, a fixed-point map.

    It is deterministic: the same y has the same value at every query, unless f itself is random.

    Args:
        f: the objective.
        x: contexts (B, d); further data of f per context, such as the noise of a draw, are in further columns.
        second_order: whether gradients have a graph where autograd is on, so that losses differentiate through them.
    """

    def __init__(self, f: Objective, x: Tensor, second_order: bool = True) -> None:
        self.f, self.x, self.second_order = f, x, second_order

    def value(self, y: Tensor) -> Tensor:
        """y (B, n) -> f(y; x) (B,)."""
        return self.f(y, self.x)

    def values(self, ys: Tensor) -> Tensor:
        """ys (S, B, n), several y per context -> (S, B): f on (S B, n), in chunks of bounded memory."""
        many = max(1, FLOATS // max(1, len(self.x) * (self.x.shape[-1] + ys.shape[-1])))
        return torch.cat([self._side_by_side(part) for part in torch.split(ys, many)])

    def _side_by_side(self, ys: Tensor) -> Tensor:
        x = self.x.expand(len(ys), *self.x.shape).flatten(0, 1)
        return self.f(ys.flatten(0, 1), x).view(ys.shape[:2])

    def grad(self, y: Tensor) -> Tensor:
        """y (B, n) -> df/dy (B, n), per item, also inside no_grad."""
        return self.value_and_grad(y)[1]

    def value_and_grad(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, n) -> f(y; x) (B,), detached, and df/dy (B, n) as `grad`, from one evaluation."""
        graph = torch.is_grad_enabled() and self.second_order
        with torch.enable_grad():
            at = y if graph and y.requires_grad else y.detach().requires_grad_()
            value = self.value(at)
            (slope,) = torch.autograd.grad(value.sum(), at, create_graph=graph)
        return value.detach(), slope

    def map(self, y: Tensor) -> Tensor:
        """y (B, n) -> g(y; x) (B, n)."""
        return self.f.map(y, self.x)

    def first_order(self) -> "Oracle":
        """The same oracle, with gradients that have no graph."""
        return Oracle(self.f, self.x, second_order=False)

    def tethered(self, anchor: Tensor, strength: float) -> "Oracle":
        """The oracle of f(y; x) + strength / 2 |y - anchor|^2 with anchor (B, n), which has no map (tutorial, eq. 14)."""
        held = torch.cat([self.x, anchor], dim=-1)
        return Oracle(Tethered(self.f, anchor.shape[-1], strength), held, self.second_order)

    def through(self, decode: Decode, d: int) -> "Oracle":
        """The oracle of f(decode(z, x); x) over z (B, m), which has no map; the first `d` columns of its contexts are x."""
        return Oracle(Decoded(self.f, decode, d), self.x, self.second_order)


class Deferred(Oracle):
    """An oracle that is made when it is first asked, so that a model which asks nothing costs nothing.

    Args:
        make: the oracle.
    """

    def __init__(self, make: Callable[[], Oracle]) -> None:
        self._make, self._made, self.second_order = make, cast(Oracle | None, None), True

    def _oracle(self) -> Oracle:
        self._made = self._made or self._make()
        return self._made

    @property
    def f(self) -> Objective:  # type: ignore[override]
        return self._oracle().f

    @property
    def x(self) -> Tensor:  # type: ignore[override]
        return self._oracle().x


class Tethered(Objective):
    """f(y; x) + strength / 2 |y - anchor|^2, over contexts (x | anchor).

    Args:
        f: what is tethered.
        dim: n, the columns of the anchor.
        strength: of the tether.
    """

    def __init__(self, f: Objective, dim: int, strength: float) -> None:
        self.f, self.dim, self.strength = f, dim, strength

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        cost, metrics = self.f.report(y, x[:, : -self.dim])
        return cost + self.strength / 2 * (y - x[:, -self.dim :]).square().sum(-1), metrics


class Decoded(Objective):
    """f(decode(z, x); x), an objective over z (B, m).

    Args:
        f: over y.
        decode: z (B, m), x (B, d) -> y (B, n).
        d: columns of contexts that are x.
    """

    def __init__(self, f: Objective, decode: Decode, d: int) -> None:
        self.f, self.decode, self.d = f, decode, d

    def report(self, z: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return self.f.report(self.decode(z, x[:, : self.d]), x)


class Unknown(Objective):
    """An objective without value or gradient, for models that make no queries."""

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        raise UserError("oracle.value: this objective has no value; an update that uses its map is needed")


def nothing(x: Tensor) -> Oracle:
    """An oracle for contexts x (B, d) without value or gradient."""
    return Oracle(Unknown(), x)


class Cost(Objective):
    """f of a user's problem, on contexts as vectors; its oracle is of the problem's `support`, without hidden parts.

    Args:
        problem: the user's problem.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def seen(self, x: Tensor) -> Tensor:
        return x[:, : self.problem.layout.seen.dim]

    def oracle(self, x: Tensor) -> Oracle:
        return Oracle(Support(self.problem), self.seen(x))

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return _checked(self.problem.cost(y, self.problem.layout.unpack(x)), y, f"{type(self.problem).__name__}.cost"), {}

    def map(self, y: Tensor, x: Tensor) -> Tensor:
        return _mapped(self.problem, y, self.problem.layout.unpack(x))


class Support(Objective):
    """The objective that models query: a problem's `support`, on contexts without their hidden parts.

    Args:
        problem: the user's problem.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        cost = self.problem.support(y, self.problem.layout.seen.unpack(x))
        return _checked(cost, y, f"{type(self.problem).__name__}.support"), {}

    def map(self, y: Tensor, x: Tensor) -> Tensor:
        return _mapped(self.problem, y, self.problem.layout.seen.unpack(x))


def _mapped(problem: Problem, y: Tensor, x: Parts) -> Tensor:
    mapped = problem.map(y, x)
    if mapped is None:
        raise UserError(f"oracle.map: {type(problem).__name__} defines no `map`, which this update needs")
    return _narrowed(mapped, y)


def _checked(cost: Tensor, y: Tensor, what: str) -> Tensor:
    if not isinstance(cost, Tensor):
        raise UserError(f"{what}: a {type(cost).__name__} is returned; a tensor, one number per item, ({len(y)},), is needed")
    if cost.shape != y.shape[:1]:
        raise UserError(
            f"{what}: shape {tuple(cost.shape)} is returned for y of shape {tuple(y.shape)}; "
            f"one number per item, ({len(y)},), is needed"
        )
    if not cost.is_floating_point():
        raise UserError(f"{what}: numbers of {cost.dtype} are returned; floating ones are needed")
    return _narrowed(cost, y)


def _narrowed(given: Tensor, y: Tensor) -> Tensor:
    """In y's dtype if that is the narrower one, as with a user's float64 computations."""
    return given.to(y.dtype) if torch.promote_types(given.dtype, y.dtype) != y.dtype else given


class MaxQ(Objective):
    """f(y; x) = -(mean_i Q_i(x, y) - beta std_i Q_i(x, y)), the max-Q problem of an ensemble of critics.

    std is the population's: beta = 1 over two critics is exactly -min(Q_1, Q_2) (Fujimoto et al., 2018, eq. 10).

    Args:
        critic: Q_1..Q_E.
        beta: pessimism.
        members: how many members of the ensemble, from the first, are used; None for all.
    """

    def __init__(self, critic: Critic | NoTarget | TargetNetwork, beta: float = 1.0, members: int | None = None) -> None:
        self.critic, self.beta, self.members = critic, beta, members

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        q = self.critic(x, y, self.members)  # (E, B)
        return -pessimistic(q, self.beta), {}


class Temperature(nn.Module):
    """alpha > 0, parametrised by its logarithm.

    Args:
        alpha: initial value; 0 is allowed, and stays 0 however the logarithm is moved.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        # of 0 a finite logarithm, so that losses of it are finite: its exponential is 0, as long as steps are of Adam's size
        self.log = nn.Parameter(torch.tensor(math.log(alpha) if alpha > 0 else -1e4))

    def forward(self) -> Tensor:
        return self.log.exp()


class Soft(Objective):
    """f(lam; x) = E_{y ~ q(.; lam)}[f(y; x) + alpha log q(y; lam)], estimated by reparameterised draws.

    With f = -Q this is SAC's actor loss (Haarnoja et al., 2018b, eq. 7), with alpha = 0 that of SVG(0), and with
    f = -log p(x, y) and alpha = 1 it is -ELBO (tutorial, eqs. 31 and 75).

    Args:
        f: the objective of a single solution.
        density: q.
        alpha: temperature, shared, not copied.
        draws: S, over which it is the mean; one half of the noise mirrors the other.
    """

    def __init__(self, f: Objective, density: Density, alpha: Temperature, draws: int = 1) -> None:
        self.f, self.density, self.alpha, self.draws = f, density, alpha, draws

    def seen(self, x: Tensor) -> Tensor:
        return self.f.seen(x)

    def oracle(self, x: Tensor) -> Oracle:
        """Over lam, with fixed noise per context (common random numbers), so that it is deterministic."""
        return Deferred(lambda: self._held(x, self._noise(x)))

    def deterministic_oracle(self, x: Tensor) -> Oracle:
        """With the same draws for every context and at every call: learned steps have met gradients at draws alone."""
        halves = -(-self.draws // 2), self.density.dim
        noise = torch.randn(halves, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
        return self._held(x, _mirrored(noise[None], self.draws).expand(len(x), -1))

    def _held(self, x: Tensor, noise: Tensor) -> Oracle:
        asked = self.f.oracle(x)
        return Oracle(Drawn(Soft(asked.f, self.density, self.alpha, self.draws)), torch.cat([asked.x, noise], dim=-1))

    def _noise(self, x: Tensor) -> Tensor:
        """For contexts x (B, d): (B, S n)."""
        half = -(-self.draws // 2)
        drawn = self.density.noise(x.new_empty(len(x) * half, self.density.parameters.dim))
        return _mirrored(drawn.view(len(x), half, -1), self.draws)

    def report(self, lam: Tensor, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """As of any objective.

        Args:
            lam: parameters (B, parameters.dim).
            x: contexts (B, d).
            noise: of the draws (B, S n); None draws it.
        """
        if self.draws > 1:
            noise = (self._noise(x) if noise is None else noise).reshape(len(lam) * self.draws, -1)
            lam, x = (part.repeat_interleave(self.draws, 0) for part in (lam, x))
        y, logq = self.density.sample(lam, noise)
        cost, metrics = self.f.report(y, x)
        # the temperature is a constant of f: minimising f must not change it
        cost = (cost + self.alpha().detach() * logq).view(-1, self.draws).mean(-1)
        return cost, metrics | {"entropy": -logq.detach().mean()}


def _mirrored(half: Tensor, draws: int) -> Tensor:
    """Noise (B, ceil(S / 2), n) and its mirror image, S of both -> (B, S n)."""
    return torch.cat([half, -half], 1)[:, :draws].flatten(1)


class Drawn(Objective):
    """A soft objective with fixed noise, over contexts (x | noise).

    Args:
        soft: the objective.
    """

    def __init__(self, soft: Soft) -> None:
        self.soft = soft

    def report(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        n = self.soft.draws * self.soft.density.dim
        return self.soft.report(lam, x[:, :-n], x[:, -n:])
