"""How a loss differentiates through a solver, independently of the solver.

y solution (B, n) · h carry: a solver's state, tensors with leading axis B · g map of a step, y -> y · K steps

K gradient steps under `Unrolled` are MAML, under `FirstOrder` FOMAML, under `Implicit(ConjugateGradients())` with shrinkage
iMAML; `Truncated` is truncated backpropagation through time, `Implicit(Neumann())` a DEQ's derivative and `OneStep` JFB's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from rlamort.config import Count, NonNegative, Whole
from rlamort.errors import UserError
from rlamort.objective import Oracle

Carry = tuple[Tensor, ...]
Linear = Callable[[Tensor], Tensor]


class Steps(Protocol):
    """What a solver's `Update` does."""

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        """The carry h before the first step from y (B, n)."""

    def __call__(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        """One step."""


class Step(NamedTuple):
    """One step of a solver on B instances, (y, h) -> (y, h)."""

    update: Steps
    nearest: Callable[[Tensor], Tensor]  # onto Y
    x: Tensor  # (B, d)
    oracle: Oracle

    def __call__(self, y: Tensor, h: Carry) -> tuple[Tensor, Carry]:
        y, h = self.update(y, h, self.x, self.oracle)
        return self.nearest(y), h

    def start(self, y: Tensor) -> Carry:
        """The carry before the first step from y (B, n)."""
        return self.update.start(y, self.x, self.oracle)

    def first_order(self) -> Self:
        return self._replace(oracle=self.oracle.first_order())

    def run(self, y: Tensor, h: Carry, steps: int) -> tuple[list[Tensor], Carry]:
        """Take `steps` steps: the iterates after y, oldest first, and the last carry."""
        path = []
        for _ in range(steps):
            y, h = self(y, h)
            path.append(y)
        return path, h


class Adjoint:
    """Runs K steps and determines their autograd graph. Without gradients all adjoints run the same steps."""

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        """y (B, n) -> (K + 1, B, n), oldest first, y itself included."""
        raise NotImplementedError


class Unrolled(Adjoint):
    """Through every step, second derivatives of f included (tutorial, section 2.2.2). Memory grows with K."""

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        return torch.stack([y, *step.run(y, step.start(y), steps)[0]])


class FirstOrder(Adjoint):
    """Through every step, with f's gradients as constants: without second derivatives (Finn et al., 2017, section 5.2)."""

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        step = step.first_order()
        return torch.stack([y, *step.run(y, step.start(y), steps)[0]])


class Detached(Adjoint):
    """The start is a constant of the steps, which do not train the model that predicts it; another adjoint is of the steps.

    So that model learns from what a loss says of its own prediction, the first iterate, as it would alone, and steps that keep
    their best iterate can only add to it.

    Args:
        inner: the adjoint of the steps.
    """

    def __init__(self, inner: Adjoint) -> None:
        self.inner = inner

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        return torch.cat([y[None], self.inner.iterates(step, y.detach(), steps)[1:]])


class Truncated(Adjoint):
    """Truncated backpropagation, through at most `steps` steps back from each iterate.

    The iterates are cut into windows of that length, counted from the end, so that the last iterate has a whole one; the
    first window, which may be shorter, includes the start.

    Args:
        steps: length of a window; with K or more nothing is truncated.
    """

    def __init__(self, steps: Count) -> None:
        if steps < 1:
            raise UserError(f"adjoint.steps: {steps} given; a window of at least 1 step is needed")
        self.steps = steps

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        path, h = [y], step.start(y)
        for k in range(steps):
            if k > 0 and (steps - k) % self.steps == 0:
                y, h = y.detach(), tuple(part.detach() for part in h)
            y, h = step(y, h)
            path.append(y)
        return torch.stack(path)


class OneStep(Adjoint):
    """Through the last step alone, memory constant in K: Jacobian-free backpropagation (Fung et al., 2022).

    The iterates between the first and the last are constants.
    """

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        if steps == 0:
            return y[None]
        with torch.no_grad():
            path, carry = step.run(y, step.start(y), steps - 1)
        last, _ = step((path[-1] if path else y).detach(), carry)
        return torch.stack([y, *path, last])


class Equation:
    """An equation that a solution satisfies, r(y) = 0, and a linear solver for its adjoint; for `Implicit`."""

    def residual(self, step: Step, y: Tensor, h: Carry) -> Tensor:
        """r (B, n), with a graph to y and to everything else that r depends on."""
        raise NotImplementedError

    def solve(self, step: Step, y: Tensor, residual: Tensor, adjoint: Linear, gradient: Tensor) -> Tensor:
        """v with adjoint(v) = gradient, (B, n) each; adjoint is v -> (dr/dy)^T v, per item."""
        raise NotImplementedError


class Implicit(Adjoint):
    """By the implicit function theorem at the last iterate, memory constant in K (tutorial, section 2.2.2; Bai et al., 2019).

    Its error is that of the last iterate as a solution. A solution does not depend on the starting point, which gets no
    gradient unless shrinkage ties the solution to it (Rajeswaran et al., 2019, lemma 1). The iterates between the first and
    the last are constants.

    Args:
        equation: the equation of the last iterate, with a solver for its linear system.
    """

    def __init__(self, equation: Equation) -> None:
        self.equation = equation

    def iterates(self, step: Step, y: Tensor, steps: int) -> Tensor:
        with torch.no_grad():
            path, carry = step.run(y, step.start(y), steps)
        if path and torch.is_grad_enabled():
            path[-1] = self._attach(step, path[-1], carry)
        return torch.stack([y, *path])

    def _attach(self, step: Step, y: Tensor, h: Carry) -> Tensor:
        at = y.detach().requires_grad_()
        residual = self.equation.residual(step, at, h)

        def adjoint(v: Tensor) -> Tensor:
            return torch.autograd.grad(residual, at, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

        def solve(gradient: Tensor) -> Tensor:
            return self.equation.solve(step, at, residual, adjoint, gradient)

        attached: Tensor = _Root.apply(y, residual, solve)  # type: ignore[no-untyped-call]
        return attached


class _Root(torch.autograd.Function):
    """y, as the root of r: d loss / d r = -(dr/dy)^-T d loss / d y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, residual: Tensor, solve: Linear) -> Tensor:
        ctx.solve = solve
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, -ctx.solve(gradient), None


class ConjugateGradients(Equation):
    """grad f(y) = 0, solved by conjugate gradients on Hessian-vector products.

    On the boundary of Y the equation and the system are restricted to the active face, from the derivative of
    the Euclidean projection at y - grad f(y). That is exact for the faces of a polyhedron (box, orthant, simplex); for curved
    boundaries use `Neumann`. An item stops at a direction whose curvature is not positive.

    Args:
        iterations: Hessian-vector products; n suffice in exact arithmetic.
        damping: added to the Hessian.
    """

    def __init__(self, iterations: Count = 20, damping: NonNegative = 0.0) -> None:
        self.iterations, self.damping = iterations, damping

    def residual(self, step: Step, y: Tensor, h: Carry) -> Tensor:
        return step.oracle.grad(y)

    def solve(self, step: Step, y: Tensor, residual: Tensor, adjoint: Linear, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            before = (y - residual).detach().requires_grad_()
            after = step.nearest(before)

        def face(v: Tensor) -> Tensor:
            return torch.autograd.grad(after, before, v, retain_graph=True)[0]

        r = p = face(gradient)
        v, square = torch.zeros_like(p), r.square().sum(-1, keepdim=True)
        enough = square * torch.finfo(r.dtype).eps ** 2
        for _ in range(self.iterations):
            along = face(p)
            product = face(adjoint(along)) + p - along + self.damping * p  # the identity across the face: round-off stays there
            curvature = (p * product).sum(-1, keepdim=True)
            active = (square > enough) & (curvature > 0)
            length = torch.where(active, square / torch.where(active, curvature, 1), 0)
            v, r = v + length * p, r - length * product
            fresh = r.square().sum(-1, keepdim=True)
            p = r + torch.where(active, fresh / torch.where(active, square, 1), 0) * p
            square = torch.where(active, fresh, 0)
        return v


class Neumann(Equation):
    """y = g(y), where g is one step of the solver with its carry fixed, solved by the truncated series sum_i (dg/dy)^i.

    It converges as fast as the solver does, and is valid on every domain, whatever its boundary. With 0 iterations it is
    `OneStep` at the last iterate.

    Args:
        iterations: vector products with g's Jacobian.
    """

    def __init__(self, iterations: Whole = 50) -> None:
        self.iterations = iterations

    def residual(self, step: Step, y: Tensor, h: Carry) -> Tensor:
        return y - step(y, h)[0]

    def solve(self, step: Step, y: Tensor, residual: Tensor, adjoint: Linear, gradient: Tensor) -> Tensor:
        v = gradient
        for _ in range(self.iterations):
            v = v + gradient - adjoint(v)
        return v
