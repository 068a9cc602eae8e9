"""y_theta, the models that predict a solution.

x context (B, d) · y solution (B, n) · v unconstrained (B, inputs) · z latent solution (B, m) · K steps · B batch
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlamort.adjoint import Adjoint, Step, Unrolled
from rlamort.config import Count, NonNegative, Positive, Whole
from rlamort.domain import Domain, project_each
from rlamort.errors import UserError
from rlamort.objective import Oracle, nothing
from rlamort.update import Update, best_so_far


class Model(nn.Module):
    """y_theta : X -> Y. Calling it returns its last iterate.

    Attributes:
        keeps: points k, beside its answer, from which it goes on in a next problem, such as the plan one step later.
    """

    keeps = 0

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        """x (B, d) -> iterates (K + 1, B, n), oldest first; `oracle` answers queries about f(.; x)."""
        raise NotImplementedError

    def forward(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.iterates(x, oracle)[-1]

    def resumed(self, x: Tensor, oracle: Oracle, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """Its answer (B, n) and, where it `keeps` any, points (B, k, n) to go on from; `kept` are the last problem's."""
        return (self(x, oracle),)

    def taught(self, x: Tensor, y: Tensor, oracle: Oracle | None = None) -> Tensor:
        """Iterates (K + 1, B, n) as a regression on solutions y (B, n) trains them: those of prediction, for most models."""
        return self.iterates(x, oracle)


class Full(Model):
    """Fully amortized: y = project(net(x)), K = 0 (tutorial, section 2.2.1).

    Args:
        net: (B, d) -> (B, domain.inputs).
        domain: Y, or the parameters of a density over it.
    """

    def __init__(self, net: nn.Module, domain: Domain) -> None:
        super().__init__()
        self.net, self.domain = net, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.domain.at(x).project(self.net(x))[None]


class Choice(Model):
    """Several predictions, of which each item keeps the cheapest: for solutions that are discontinuous in x.

    A single network averages over a discontinuity, or stays on one side; here each candidate may represent one branch, and
    losses train the selected one alone (multiple choice learning; Guzman-Rivera, Batra and Kohli, 2012).

    Args:
        net: (B, d) -> (B, candidates * domain.inputs).
        candidates: number of predictions.
        domain: Y.
    """

    def __init__(self, net: nn.Module, candidates: Count, domain: Domain) -> None:
        super().__init__()
        self.net, self.candidates, self.domain = net, candidates, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        v = self.net(x).view(len(x), self.candidates, -1).transpose(0, 1)  # (M, B, inputs)
        ys = project_each(self.domain, x, v)
        with torch.no_grad():
            best = (oracle or nothing(x)).values(ys).nan_to_num(torch.inf).argmin(0)  # (B,)
        return ys.gather(0, best[None, :, None].expand(1, -1, ys.shape[-1]))


class Unroll(Model):
    """Semi-amortized: K steps of a solver from another model's prediction (tutorial, section 2.2.2).

    It also works inside no_grad, without a graph. Items are independent.

    Args:
        init: the model that predicts the first iterate.
        update: a step of the solver.
        steps: K; 0 returns init's prediction.
        domain: Y, onto which each step's result is projected.
        adjoint: how losses differentiate through the steps.
        shrinkage: weight of weight / 2 |y - y_0|^2, which is added to the solver's objective (tutorial, eq. 14).
        keep_best: whether each iterate is the best so far, so that none is worse than the start; f must be deterministic.
    """

    def __init__(
        self,
        init: Model,
        update: Update,
        steps: Whole,
        domain: Domain,
        adjoint: Adjoint | None = None,
        shrinkage: NonNegative = 0.0,
        *,
        keep_best: bool = False,
    ) -> None:
        super().__init__()
        for field, given in {"steps": steps, "shrinkage": shrinkage}.items():
            if given < 0:
                raise UserError(f"model.{field}: {given} given; 0 or more is needed")
        self.init, self.update, self.steps, self.domain = init, update, steps, domain
        self.adjoint, self.shrinkage, self.keep_best = adjoint or Unrolled(), shrinkage, keep_best
        self.keeps = update.keeps

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        y, oracle = self.init(x, oracle), oracle or nothing(x)
        path = self.adjoint.iterates(self._step(y, x, oracle), y, self.steps)
        return best_so_far(path, oracle) if self.keep_best else path

    def resumed(self, x: Tensor, oracle: Oracle, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        if kept is None:
            return super().resumed(x, oracle)
        y = self.init(x, oracle)
        step = self._step(y, x, oracle)
        path, h = step.run(y, self.update.resume(y, kept, x, step.oracle), self.steps)
        points = torch.stack([y, *path])
        return (best_so_far(points, oracle) if self.keep_best else points)[-1], self.update.kept(points[-1], h)

    def _step(self, y: Tensor, x: Tensor, oracle: Oracle) -> Step:
        """A step of the solver from y."""
        asked = oracle.tethered(y, self.shrinkage) if self.shrinkage else oracle
        return Step(self.update, self.domain.at(x).nearest, x, asked)


class Latent(Model):
    """A model in a latent space, y = project(decode(z, x)) (tutorial, section 2.2.2; Amos and Yarats, 2020, section 4).

    Args:
        decode: z (B, m), x (B, d) -> v (B, domain.inputs).
        inner: the model over z, whose oracle is that of f composed with `decode`.
        domain: Y.
    """

    def __init__(self, decode: Callable[[Tensor, Tensor], Tensor], inner: Model, domain: Domain) -> None:
        super().__init__()
        self.decode, self.inner, self.domain = decode, inner, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return decoded(self.inner, self.point, x, oracle)

    def point(self, z: Tensor, x: Tensor) -> Tensor:
        """z (B, m), x (B, d) -> y (B, n) in Y."""
        return self.domain.at(x).project(self.decode(z, x))


def decoded(inner: Model, point: Callable[[Tensor, Tensor], Tensor], x: Tensor, oracle: Oracle | None) -> Tensor:
    """The solutions (K + 1, B, n) that `point`, z (B, m), x (B, d) -> y (B, n), makes of the iterates of a model over z."""
    path = inner.iterates(x, oracle and oracle.through(point, x.shape[-1]))
    return torch.stack([point(z, x) for z in path])


class SupportPoints(Model):
    """A model over a plan's values at few support points, with the plan in Y nearest to what a kernel interpolates.

    With steps of MPPI over them it is KMPPI (of the package pytorch_mppi). Nothing is learned.

    Args:
        points: the support points.
        inner: the model over their values.
        domain: Y, plans.
    """

    def __init__(self, points: "Interpolation", inner: Model, domain: Domain) -> None:
        super().__init__()
        self.points, self.inner, self.domain = points, inner, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return decoded(self.inner, self.plan, x, oracle)

    def plan(self, z: Tensor, x: Tensor) -> Tensor:
        """Values z (B, P n), x (B, d) -> a plan (B, H n) in Y."""
        return self.domain.at(x).nearest(self.points(z))


class Interpolation(nn.Module):
    """Values at P points, spread evenly over H steps, and between them by a Gaussian kernel: K(t, s) K(s, s)^-1 z.

    Args:
        horizon: H.
        points: P, at most H.
        width: of the kernel, in distances between neighbouring points.

    Raises:
        UserError: there are more points than steps.
    """

    weights: Tensor
    fitting: Tensor

    def __init__(self, horizon: Count, points: Count, width: Positive = 1.0) -> None:
        super().__init__()
        if not 1 <= points <= horizon:
            raise UserError(f"model.points: {points} given; at least 1 and at most the {horizon} actions of a plan are needed")
        at = torch.linspace(0, horizon - 1, points, dtype=torch.float64)
        scale = width * (horizon - 1) / max(points - 1, 1) or 1.0

        def kernel(t: Tensor) -> Tensor:
            return (-((t[:, None] - at) / scale).square() / 2).exp()

        weights = torch.linalg.solve(kernel(at), kernel(torch.arange(horizon, dtype=torch.float64)), left=False)
        self.register_buffer("weights", weights, persistent=False)  # (H, P)
        self.register_buffer("fitting", torch.linalg.pinv(weights), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Values at the points (B, P n) -> at all steps (B, H n)."""
        return _along(self.weights, z)

    def fit(self, y: Tensor) -> Tensor:
        """The least-squares inverse: (B, H n) -> (B, P n)."""
        return _along(self.fitting, y)


def _along(weights: Tensor, plan: Tensor) -> Tensor:
    """weights (T, P), plan (B, P n) -> (B, T n)."""
    return (weights.to(plan) @ plan.view(len(plan), weights.shape[1], -1)).flatten(1)


class Fitted(Model):
    """Support points' values that fit the plan of another model, K = 0: a planner's warm start.

    Args:
        init: the model of the plan.
        points: the support points.
        domain: of their values.
    """

    def __init__(self, init: Model, points: Interpolation, domain: Domain) -> None:
        super().__init__()
        self.init, self.points, self.domain = init, points, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.domain.nearest(self.points.fit(self.init(x, oracle)))[None]


class Start(Model):
    """A learned point of Y, the same for every context, K = 0: what MAML learns (Finn et al., 2017).

    Args:
        domain: Y, with the initial value.
    """

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain, self.v = domain, nn.Parameter(domain.initial())

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.domain.at(x).project(self.v.expand(len(x), -1))[None]


class TwoStep(Model):
    """A prediction, and the same network's second one from it: the minimal iterative policy (arXiv 2512.01809).

    With pi(t, y, x) the network, y_0 = pi(0, 0, x) and y_1 = pi(t, y_0, x). A regression trains the second step from noisy
    labels, y + (1 - t) e with e ~ N(0, 1), instead of from the first prediction, so that no gradient joins the two.

    Args:
        net: an iterate and its t (B, n + 1), x (B, d) -> (B, domain.inputs).
        domain: Y.
        t: of the second step, between 0 and 1; 1 - t is the standard deviation of the noise.
    """

    def __init__(self, net: nn.Module, domain: Domain, t: float) -> None:
        super().__init__()
        self.net, self.domain, self.t = net, domain, t

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        first = self._first(x)
        return torch.stack([first, self._step(self.t, first, x)])

    def taught(self, x: Tensor, y: Tensor, oracle: Oracle | None = None) -> Tensor:
        noisy = y + (1 - self.t) * torch.randn_like(y)
        return torch.stack([self._first(x), self._step(self.t, noisy, x)])

    def _first(self, x: Tensor) -> Tensor:
        return self._step(0.0, x.new_zeros(len(x), self.domain.dim), x)

    def _step(self, t: float, y: Tensor, x: Tensor) -> Tensor:
        return self.domain.at(x).project(self.net(torch.cat([y, y.new_full((len(y), 1), t)], -1), x))


class Previous(Model):
    """The solution that stands at the end of the context, K = 0: where the step before left off.

    Args:
        domain: Y.
    """

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain = domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return x[None, :, -self.domain.dim :]


class Guarded(Model):
    """A solver that is trained without safeguards, and predicts with them.

    Which of both answers follows from whether gradients are recorded: a loss differentiates, and a prediction does not.
    `Agent.predict`, players, scores and `Solver` run inside no_grad whatever the caller does; who calls a model itself, with
    gradients, is taken for a loss, and gets what is trained.

    Args:
        trained: the model that losses differentiate through.
        acting: the model that predicts inside no_grad, with the same parameters.
    """

    def __init__(self, trained: Model, acting: Model) -> None:
        super().__init__()
        self.trained, self.acting = trained, acting

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return (self.trained if torch.is_grad_enabled() else self.acting).iterates(x, oracle)


class Expert(Model):
    """A function as a model with one iterate: a solution in closed form, a classical solver, demonstrations.

    Args:
        field: x (B, d) -> y (B, n), or None where no solution is known.
        name: of the function, for messages.
    """

    def __init__(self, field: Callable[[Tensor], Tensor | None], name: str = "the expert") -> None:
        super().__init__()
        self.field, self.name = field, name

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        y = self.field(x)
        if y is None:
            raise UserError(f"{self.name}: None is returned; y, of shape ({len(x)}, n), is needed")
        return y[None]
