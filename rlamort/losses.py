"""L, the losses that train a model, and the critics' regression targets.

B batch · K iterations · x context (B, d) · y solution (B, n) · f cost (B,)

A loss is `(model, f, batch) -> (scalar, metrics)`; everything else it needs is passed to its constructor.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rlamort.errors import UserError
from rlamort.model import Model
from rlamort.objective import Metrics, Objective
from rlamort.source import Batch, Labelled

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, n), (B, n) -> (B,)
Teacher = Callable[[Tensor], Tensor]  # whole contexts (B, d) -> y* (B, n)


class Posed(Protocol):
    """A batch with contexts x (B, d)."""

    @property
    def x(self) -> Tensor: ...


class Loss(Protocol):
    """A loss for `descend`: its value, 0-d, and detached metrics."""

    def __call__(self, model: Model, f: Objective, batch: Posed) -> tuple[Tensor, Metrics]: ...


def objective(model: Model, f: Objective, batch: Posed) -> tuple[Tensor, Metrics]:
    """L_obj = mean_B f(y_theta(x); x), the objective-based loss (tutorial, eq. 6).

    Where contexts are a function of parameters phi, batch.x has their graph: minimising this loss in phi learns p(x; phi)
    through the optimal value (tutorial, eq. 29).
    """
    cost, metrics = f.report(model(f.seen(batch.x), f.oracle(batch.x)), batch.x)
    loss = cost.mean()
    return loss, {"cost": loss.detach(), **metrics}


def squared(y: Tensor, other: Tensor) -> Tensor:
    """|y - other|^2, (B,)."""
    return (y - other).square().sum(-1)


def precise(y: Tensor, local: Tensor) -> Tensor:
    """KL(N(y, S) || N(u, P^-1)) but for what does not depend on y, (y - u)' P (y - u) / 2: (B,).

    Args:
        y: a prediction (B, n).
        local: u and the rows of P, (B, n + n^2): the Gaussian of a local controller.
    """
    n = y.shape[-1]
    away, P = y - local[:, :n], local[:, n:].view(-1, n, n)
    apart: Tensor = ((P @ away[..., None])[..., 0] * away).sum(-1) / 2
    return apart


class Regress:
    """L_reg = mean_B sum_k w_k distance(y_k(x), y*(x)), the regression-based loss (tutorial, eq. 5; Chen et al., 2018, eq. 17).

    Args:
        teacher: x (B, d) -> y* (B, n): a solver or an expert, which is not trained; None takes the labels of a
            `Labelled` batch.
        distance: between two solutions, (B,); where the model predicts parameters of a density, of these and a solution.
        decay: w_k is proportional to decay^(K - k): 0 scores the last iterate alone.
        start: share of the loss that is the first iterate's distance besides, where K > 0.
    """

    def __init__(self, teacher: Teacher | None, distance: Distance = squared, decay: float = 0.0, start: float = 0.0) -> None:
        self.teacher, self.distance, self.decay, self.start = teacher, distance, decay, start

    def __call__(self, model: Model, f: Objective, batch: Posed) -> tuple[Tensor, Metrics]:
        target = self._target(batch)
        path = model.taught(f.seen(batch.x), target, f.oracle(batch.x))  # (K + 1, B, n)
        scored = path if self.decay else path[-1:]
        distances = torch.stack([self.distance(y, target).mean() for y in scored])
        loss = weighed(distances, self.decay)
        if self.start and len(path) > 1:
            loss = (1 - self.start) * loss + self.start * self.distance(path[0], target).mean()
        return loss, {"distance": distances[-1].detach()}

    @torch.no_grad()
    def _target(self, batch: Posed) -> Tensor:
        if self.teacher is not None:
            return self.teacher(batch.x)
        if not isinstance(batch, Labelled):
            raise UserError(
                f"Regress.teacher: None is given, and a {type(batch).__name__} has no labels; a Labelled batch is needed"
            )
        return batch.y


class OverIterates:
    """L_Sigma = mean_B sum_k w_k f(y_k; x), over a model's iterates (tutorial, section 2.3; Andrychowicz et al., 2016, eq. 3).

    With a share for the start, the network that predicts it learns as it would alone, however little the steps leave it to
    learn, and steps that keep their best iterate can only add to that.

    Args:
        decay: w_k is proportional to decay^(K - k): 1 weighs all equally, 0 is the objective of the last alone.
        start: share of the loss that is f(y_0; x) besides, where K > 0.
    """

    def __init__(self, decay: float = 1.0, start: float = 0.0) -> None:
        self.decay, self.start = decay, start

    def __call__(self, model: Model, f: Objective, batch: Posed) -> tuple[Tensor, Metrics]:
        path = model.iterates(f.seen(batch.x), f.oracle(batch.x))  # (K + 1, B, n)
        scored = path if self.decay else path[-1:]
        reports = [f.report(y, batch.x) for y in scored]
        costs = torch.stack([cost.mean() for cost, _ in reports])
        loss = weighed(costs, self.decay)
        if self.start and len(path) > 1:
            begun = costs[0] if self.decay else f.report(path[0], batch.x)[0].mean()
            loss = (1 - self.start) * loss + self.start * begun
        return loss, {"cost": costs[-1].detach(), **reports[-1][1]}


def weighed(values: Tensor, decay: float) -> Tensor:
    """The weighted mean of iterates' values (K + 1,), oldest first, with weights proportional to decay^(K - k)."""
    if len(values) == 1:
        return values[0]
    weights = decay ** torch.arange(len(values) - 1, -1, -1, device=values.device, dtype=values.dtype)
    return (weights * values).sum() / weights.sum()


class Smoothed:
    """The objective-based loss of a cost without gradients, by antithetic evolution strategies (tutorial, eq. 15).

    The gradient with respect to y is that of the smoothed cost E_e f(y + sigma e; x), e ~ N(0, 1)
    (Nesterov and Spokoiny, 2017), and theta's follows by the chain rule. The loss's value is f at the prediction itself, whose
    gradient with respect to parameters of f, where it has one, is autograd's.

    Args:
        sigma: standard deviation of the smoothing, in the units of y.
        pairs: number of antithetic pairs e and -e.
        nearest: projects evaluation points y (B, n) onto Y, given the contexts x (B, d).
        start: share of the loss that is the first iterate's besides, where K > 0.
    """

    def __init__(
        self,
        sigma: float,
        pairs: int,
        nearest: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y,
        start: float = 0.0,
    ) -> None:
        self.sigma, self.pairs, self.nearest, self.start = sigma, pairs, nearest, start

    def __call__(self, model: Model, f: Objective, batch: Posed) -> tuple[Tensor, Metrics]:
        path = model.iterates(f.seen(batch.x), f.oracle(batch.x))
        loss, metrics = self._score(path[-1], f, batch.x)
        if self.start and len(path) > 1:
            loss = (1 - self.start) * loss + self.start * self._score(path[0], f, batch.x)[0]
        return loss, metrics

    def _score(self, y: Tensor, f: Objective, x: Tensor) -> tuple[Tensor, Metrics]:
        """The cost of y (B, n), whose gradient in y is that of the smoothed cost."""
        cost, metrics = f.report(y.detach(), x)
        with torch.no_grad():
            slope = torch.zeros_like(y)
            for _ in range(self.pairs):
                e = torch.randn_like(y)
                ahead, behind = (f(self.nearest(y + side * self.sigma * e, x), x) for side in (1, -1))
                slope += (ahead - behind)[:, None] * e / (2 * self.sigma * self.pairs)
        along = (slope * y).sum(-1).mean()
        loss = cost.mean() + along - along.detach()
        return loss, {"cost": cost.detach().mean(), **metrics}


class Downstream:
    """mean_B g(y_theta(x), x), a downstream loss of solutions; minimised in phi, it learns p(x; phi) (tutorial, eq. 30).

    Args:
        g: y (B, n), x (B, d) -> (B,).
    """

    def __init__(self, g: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.g = g

    def __call__(self, model: Model, f: Objective, batch: Posed) -> tuple[Tensor, Metrics]:
        loss = self.g(model(f.seen(batch.x), f.oracle(batch.x)), batch.x).mean()
        return loss, {"downstream": loss.detach()}


def td_target(batch: Batch, value_next: Tensor) -> Tensor:
    """r + gamma^m (1 - terminated) V(x_next): a truncated episode bootstraps, a terminated one does not.

    Args:
        batch: of B transitions.
        value_next: V(x_next) (B,), or several values per transition (B, M), such as quantiles.

    Returns:
        Of the shape of `value_next`.
    """
    reward, discount, ended = (
        one.view(-1, *[1] * (value_next.ndim - 1)) for one in (batch.reward, batch.discount, batch.terminated)
    )
    # where, not a product: the value of a terminal state is arbitrary, and may be NaN
    return reward + discount * torch.where(ended, torch.zeros_like(value_next), value_next)
