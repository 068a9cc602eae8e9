"""Constraints of a problem, h(y; x) = 0 and g(y; x) <= 0, and the objectives that hold them.

x context as a vector (B, d) · y solution (B, n) · h equalities (B, m) · g inequalities (B, k) · lam and mu their multipliers ·
rho penalty, one a row (B, m + k)
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from rlamort.critic import frozen_copy, polyak
from rlamort.errors import UserError
from rlamort.objective import Deferred, Metrics, Objective, Oracle
from rlamort.problem import Problem, draw

PROBES = 4  # contexts at which constraints are checked
FACTOR, SUFFICIENT = 2.0, 0.8  # of learned multipliers' penalty, where the violation did not fall to this share in a round


class Constraints:
    """h and g of a user's problem, on contexts as vectors, of which only the first columns, without hidden parts, are read.

    Args:
        problem: the user's problem; its class defines `constraints`.
        sizes: m and k.
    """

    def __init__(self, problem: Problem, sizes: tuple[int, int]) -> None:
        self.problem, self.sizes, self.name = problem, sizes, f"{type(problem).__name__}.constraints"

    @classmethod
    def of(cls, problem: Problem) -> Self | None:
        """Those of a problem; None where it has none. They are checked at a few contexts and points of Y.

        Raises:
            UserError: their values have the wrong type or shape, are NaN, or mix the items of a batch.
        """
        if type(problem).constraints is Problem.constraints:
            return None
        try:
            return cls._probed(problem, torch.get_default_dtype())
        except RuntimeError:  # a problem whose tensors are float64 may take no others
            return cls._probed(problem, torch.float64)

    @classmethod
    @torch.no_grad()
    def _probed(cls, problem: Problem, dtype: torch.dtype) -> Self | None:
        own = next(iter((*problem.parameters(), *problem.buffers())), None)
        device = torch.device("cpu") if own is None else own.device  # also while networks' sizes alone are asked, on another
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            x = draw(problem, PROBES, device).to(dtype)
            domain = problem.domain.at(x)
            y = domain.project(torch.randn(PROBES, domain.inputs, dtype=dtype))
            values = problem.constraints(y, problem.layout.seen.unpack(x[:, : problem.layout.seen.dim]))
            if values is None:
                return None
            h, g = _pair(values, y, f"{type(problem).__name__}.constraints")
            found = cls(problem, (h.shape[1], g.shape[1]))
            found.check(y, x)
        return found

    @classmethod
    def none(cls, problem: Problem) -> Self:
        """None, as rows of width 0, of a problem without constraints."""
        return cls(problem, (0, 0))

    def __call__(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, n), x (B, d or more columns) -> h (B, m) and g (B, k)."""
        if self.sizes == (0, 0):
            return y[:, :0], y[:, :0]
        seen = self.problem.layout.seen
        h, g = _pair(self.problem.constraints(y, seen.unpack(x[:, : seen.dim])), y, self.name)
        if (h.shape[1], g.shape[1]) != self.sizes:
            sizes = h.shape[1], g.shape[1]
            raise UserError(
                f"{self.name}: {sizes} equalities and inequalities are returned; {self.sizes}, as before, are needed"
            )
        return h, g

    def violation(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, n), x -> (B,) >= 0: per item the largest of |h_i| and max(g_j, 0), the maximum norm, in the rows' own units."""
        return violation_of(*self(y, x))

    @torch.no_grad()
    def check(self, y: Tensor, x: Tensor) -> None:
        """Raises UserError where values at y (B, n) are NaN, or differ from those of the same item alone."""
        both = torch.cat(self(y, x), -1)  # (B, m + k)
        alone = torch.cat([torch.cat(self(y[i : i + 1], x[i : i + 1]), -1) for i in range(len(y))])
        nan = both.isnan().any(0).nonzero()[:, 0].tolist()
        if nan:
            raise UserError(f"{self.name}: {self._row(nan[0])} is NaN at a point of Y; numbers are needed everywhere in Y")
        slack = both.abs().clamp_min(1) * torch.finfo(both.dtype).eps ** 0.5
        # infinities are equal where they are the same
        mixed = (~((both == alone) | ((both - alone).abs() <= slack))).any(0).nonzero()[:, 0].tolist()
        if mixed:
            raise UserError(
                f"{self.name}: {self._row(mixed[0])} of an item depends on the batch that it is in; "
                "each item's own y and x alone are allowed"
            )

    def _row(self, column: int) -> str:
        m = self.sizes[0]
        return f"equality {column}" if column < m else f"inequality {column - m}"


def violation_of(h: Tensor, g: Tensor) -> Tensor:
    """h (B, m), g (B, k) -> (B,): the largest of |h_i| and max(g_j, 0), 0 where there are none, NaN where one is."""
    return torch.cat([h.new_zeros(len(h), 1), h.abs(), g], -1).amax(-1)


def _pair(values: Any, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(values, tuple) or len(values) != 2:
        kind = f"{len(values)} values" if isinstance(values, tuple) else f"a {type(values).__name__}"
        raise UserError(f"{name}: {kind} is returned; a pair is needed, equalities (B, m) and inequalities (B, k)")
    for what, size, part in zip(("equalities", "inequalities"), "mk", values, strict=True):
        if not isinstance(part, Tensor):
            raise UserError(f"{name}: {what}: a {type(part).__name__} is returned; a tensor ({len(y)}, {size}) is needed")
        if part.ndim != 2 or len(part) != len(y):
            raise UserError(
                f"{name}: {what}: shape {tuple(part.shape)} is returned for y of shape {tuple(y.shape)}; "
                f"({len(y)}, {size}) is needed, with {size} = 0 where there are none"
            )
        if not part.is_floating_point():
            raise UserError(f"{name}: {what}: {part.dtype} is returned; floating-point numbers are needed")
    h, g = (part.to(y.dtype) if torch.promote_types(part.dtype, y.dtype) != y.dtype else part for part in values)
    return h, g


class Penalised(Objective):
    """f(y; x) + weight / 2 (|h|^2 + |max(g, 0)|^2), the quadratic penalty (Nocedal and Wright, 2006, section 17.1).

    Its report's metrics are those of f, with `cost`, f itself, and the mean and the largest `violation` of a batch.

    Args:
        f: the cost.
        constraints: h and g.
        weight: of the penalty.
    """

    def __init__(self, f: Objective, constraints: Constraints, weight: float) -> None:
        self.f, self.constraints, self.weight = f, constraints, weight

    def seen(self, x: Tensor) -> Tensor:
        return self.f.seen(x)

    def oracle(self, x: Tensor) -> Oracle:
        asked = self.f.oracle(x)
        return Oracle(Penalised(asked.f, self.constraints, self.weight), asked.x)

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        cost, metrics = self.f.report(y, x)
        h, g = self.constraints(y, x)
        penalty = h.square().sum(-1) + g.clamp_min(0).square().sum(-1)
        return cost + self.weight / 2 * penalty, metrics | measured(cost, h, g)


def measured(cost: Tensor, h: Tensor, g: Tensor) -> Metrics:
    """f and the violation of a batch, detached."""
    violation = violation_of(h, g).detach()
    return {"cost": cost.detach().mean(), "violation": violation.mean(), "violation_max": violation.amax()}


class Multipliers(NamedTuple):
    """What an augmented Lagrangian holds of each item."""

    equality: Tensor  # lam (B, m)
    inequality: Tensor  # mu (B, k) >= 0
    penalty: Tensor  # rho (B, m + k) > 0, one a row, so that rows of any unit can be weighed alike

    def updated(self, h: Tensor, g: Tensor) -> Self:
        """lam + rho h and max(mu + rho g, 0), the first-order estimates (Birgin and Martinez, 2014, algorithm 4.1)."""
        m = h.shape[1]
        equality = self.equality + self.penalty[:, :m] * h
        return self._replace(equality=equality, inequality=(self.inequality + self.penalty[:, m:] * g).clamp_min(0))

    def shortfall(self, g: Tensor) -> Tensor:
        """max(g, -mu / rho) (B, k): 0 where g <= 0, mu >= 0 and their product is 0 (as there)."""
        return torch.maximum(g, -self.inequality / self.penalty[:, self.penalty.shape[1] - g.shape[1] :])


class AugmentedLagrangian(Objective):
    """The function of Powell, Hestenes and Rockafellar, over contexts (x | lam | mu | rho).

    f + sum_i (lam_i h_i + rho_i / 2 h_i^2) + sum_j (mu_j s_j + rho_j / 2 s_j^2) with s_j = max(g_j, -mu_j / rho_j): the form of
    Rockafellar (1974), which is f at a KKT point. That of Birgin and Martinez (2014, section 4.1) differs by a constant.

    Args:
        f: the cost.
        constraints: h and g.
    """

    def __init__(self, f: Objective, constraints: Constraints) -> None:
        self.f, self.constraints = f, constraints
        self.columns = 2 * sum(constraints.sizes)

    def contexts(self, x: Tensor, multipliers: Multipliers) -> Tensor:
        """x (B, d), and multipliers of its items -> contexts of this objective (B, d + 2 (m + k))."""
        return torch.cat([x, *(part.to(x.dtype) for part in multipliers)], -1)

    def parts(self, x: Tensor) -> tuple[Tensor, Multipliers]:
        """What `contexts` joined."""
        m, k = self.constraints.sizes
        bare, lam, mu, rho = torch.split(x, [x.shape[1] - self.columns, m, k, m + k], -1)
        return bare, Multipliers(lam, mu, rho)

    def seen(self, x: Tensor) -> Tensor:
        return self.f.seen(self.parts(x)[0])

    def oracle(self, x: Tensor) -> Oracle:
        bare, multipliers = self.parts(x)
        asked = self.f.oracle(bare)
        over = AugmentedLagrangian(asked.f, self.constraints)
        return Oracle(over, over.contexts(asked.x, multipliers))

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        bare, multipliers = self.parts(x)
        cost, metrics = self.f.report(y, bare)
        h, g = self.constraints(y, bare)
        row = torch.cat([h, multipliers.shortfall(g)], -1)  # (B, m + k)
        weights = torch.cat([multipliers.equality, multipliers.inequality], -1)
        return cost + (weights * row + multipliers.penalty / 2 * row.square()).sum(-1), metrics | measured(cost, h, g)


class Predicted(nn.Module):
    """Multipliers of each context by a network, trained as the dual network of primal-dual learning.

    Park and Van Hentenryck (2023), algorithm 1: the network regresses to the updates lam + rho h and max(mu + rho g, 0) of
    frozen multipliers, and rho grows where the violation did not fall enough since the round before. Their frozen network is a
    copy, made once a round; here it follows at a rate, as target networks do, so that every update is the same function.

    Args:
        net: (B, columns that models read) -> (B, m + k).
        frozen: a copy of it, without gradients.
        sizes: m and k.
        penalty: rho at the beginning.
        rate: share by which the frozen network moves to the other in every update.
        bound: largest absolute value of a multiplier, which keeps those of infeasible contexts finite.
        every: updates in a round.
        most: largest factor by which rho grows.
    """

    rho: Tensor
    steps: Tensor
    rounds: Tensor

    def __init__(
        self,
        net: nn.Module,
        frozen: nn.Module,
        sizes: tuple[int, int],
        penalty: float,
        rate: float,
        bound: float,
        every: int = 500,
        most: float = 100.0,
    ) -> None:
        super().__init__()
        self.net, self.frozen, self.sizes = net, frozen_copy(net, frozen), sizes
        self.rate, self.bound, self.every, self.most = rate, bound, every, most * penalty
        self.register_buffer("rho", torch.tensor(float(penalty)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer(
            "rounds", torch.tensor([0.0, torch.finfo(torch.float32).max])
        )  # violation so far, and the round's before

    @torch.no_grad()
    def forward(self, x: Tensor) -> Multipliers:
        """x (B, d), what models read -> the frozen multipliers."""
        lam, mu = torch.split(self.frozen(x), list(self.sizes), -1)
        rho = self.rho.to(x.dtype).expand(len(x), sum(self.sizes))
        return Multipliers(lam.clamp(-self.bound, self.bound), mu.clamp(0, self.bound), rho)

    def loss(self, x: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """The squared distance of the network's multipliers to the updated ones of x (B, d) with h (B, m) and g (B, k), 0-d."""
        target = self(x).updated(h, g)
        aim = torch.cat([target.equality.clamp(-self.bound, self.bound), target.inequality.clamp_max(self.bound)], -1)
        loss: Tensor = (self.net(x) - aim.detach()).square().sum(-1).mean()
        return loss

    @torch.no_grad()
    def follow(self, x: Tensor, h: Tensor, g: Tensor) -> None:
        """Move the frozen network, and rho at the end of a round, after an update of the network."""
        polyak(self.frozen, self.net, self.rate)
        short = torch.cat([h.abs(), self(x).shortfall(g).abs()], -1).amax(-1).mean()
        self.steps += 1
        over = self.steps % self.every == 0
        mean, before = self.rounds[0] + short.to(self.rounds) / self.every, self.rounds[1]
        grown = (FACTOR * self.rho).clamp_max(self.most)
        self.rho.copy_(torch.where(over & (mean > SUFFICIENT * before), grown, self.rho))
        self.rounds.copy_(torch.stack([torch.where(over, 0.0, mean), torch.where(over, mean, before)]))


class Dual(Objective):
    """The augmented Lagrangian at a network's multipliers, an objective over contexts x of the cost.

    Args:
        f: the cost.
        constraints: h and g.
        multipliers: the network, which is shared, not owned.
    """

    def __init__(self, f: Objective, constraints: Constraints, multipliers: Predicted) -> None:
        self.f, self.constraints, self.multipliers = f, constraints, multipliers

    def seen(self, x: Tensor) -> Tensor:
        return self.f.seen(x)

    def oracle(self, x: Tensor) -> Oracle:
        return Deferred(lambda: self._held(x))

    def _held(self, x: Tensor) -> Oracle:
        asked = self.f.oracle(x)
        over = AugmentedLagrangian(asked.f, self.constraints)
        return Oracle(over, over.contexts(asked.x, self.multipliers(self.f.seen(x))))

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        over = AugmentedLagrangian(self.f, self.constraints)
        return over.report(y, over.contexts(x, self.multipliers(self.f.seen(x))))
