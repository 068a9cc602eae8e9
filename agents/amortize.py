"""Amortization of an objective that is known, or learned together with its solver (Amos, Tutorial on amortized optimization).

f = the cost · Y = its domain · p(x) = its contexts · y_theta = full, choice, semi, recurrent or latent · L = as asked.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from rlamort.adjoint import FirstOrder, Unrolled
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Count, Positive, Size, Widths
from rlamort.domain import Euclid
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.losses import Loss, OverIterates, Regress, Smoothed, objective
from rlamort.model import Choice, Expert, Full, Latent, Model, Unroll
from rlamort.nets import Concatenated, Standardise, Zeros, mlp
from rlamort.objective import Cost, Metrics
from rlamort.problem import Problem, presented
from rlamort.solve.classical import solution_of, within
from rlamort.solve.refine import CLIP, Space, refinement, repeats, steps_in
from rlamort.source import Contexts
from rlamort.update import Additive, Gated, Gradient, Lbfgs, Learned, Recurrent

SAMPLE = 1_000  # contexts whose mean and spread standardise the network's input


class Amortize(Agent):
    """A model of a problem's solutions, trained on the problem itself.

    Args:
        spec: of the problem's environment.
        model: full predicts; choice makes several predictions, and keeps the one of lowest cost; semi refines the prediction by
            gradient steps of learned size; recurrent by learned steps; latent by gradient steps in a space that is decoded.
        loss: objective scores the answer; regress its distance to the reference solution; iterates every iterate on the way;
            es the answer to a cost without gradients. `rlamort amortize` has one more, rl: TD3 on the problem as an
            environment.
        hidden: widths of the hidden layers, of the problem's own network where it has one.
        iterations: steps of semi, recurrent and latent.
        space: where semi takes its steps: in Y itself (solution), or in the chart, the unconstrained numbers that are projected
            to Y; auto tries both, and is Y where inner_rate is given.
        inner_rate: size of the gradient steps of semi and latent, before it is learned; null lets semi try which is best, and
            is 0.1 for latent.
        start: where semi and recurrent begin: at a network's prediction, or in the middle of the domain, which is the prior
            where solutions are parameters of a density.
        head: how recurrent's steps move: additive adds to the iterate, gated mixes it with a proposal (Marino et al., 2018).
        memory: numbers that recurrent's cell keeps from step to step.
        latent_dim: coordinates of latent's space.
        candidates: predictions of choice.
        learning_rate: Adam's step size.
        decay_updates: updates over which it falls to zero along a cosine; null keeps it.
        sigma: width of es's smoothing.
        pairs: antithetic pairs of es.
        adjoint: unrolled differentiates through gradient steps, first_order takes the gradients for constants, as recurrent
            always does.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        model: Literal["full", "choice", "semi", "recurrent", "latent"] = "full",
        loss: Literal["objective", "regress", "iterates", "es"] = "objective",
        hidden: Widths = (128, 128),
        iterations: Size = 5,
        space: Literal["auto", "solution", "chart"] = "auto",
        inner_rate: Positive | None = None,
        start: Literal["prediction", "middle"] = "prediction",
        head: Literal["additive", "gated"] = "additive",
        memory: Size = 64,
        latent_dim: Size = 8,
        candidates: Size = 4,
        learning_rate: Positive = 1e-3,
        decay_updates: Count | None = None,
        sigma: Positive = 0.1,
        pairs: Size = 8,
        adjoint: Literal["unrolled", "first_order"] = "unrolled",
    ) -> None:
        super().__init__(spec, normalise=False)
        problem = self.problem = posed(spec)
        self.f, y = Cost(problem), problem.domain
        through = {"unrolled": Unrolled(), "first_order": FirstOrder()}[adjoint]
        sample = presented(problem, SAMPLE)
        statistics = Standardise(self.f.seen(sample))

        def plain(outputs: int) -> nn.Module:
            return nn.Sequential(statistics, mlp(spec.x_dim, hidden, outputs))

        def network() -> nn.Module:
            return problem.network(hidden, 1) or plain(y.inputs)

        def first() -> nn.Module:
            return network() if start == "prediction" else Zeros(y.inputs)

        def semi() -> Model:
            where: Space = "chart" if space == "chart" else "solution"
            x, rate = sample.to(self.device), inner_rate  # where the problem is
            if rate is None:
                found = refinement(self.f, y, x)
                where = found.space if space == "auto" else where
                rate = found.trials[where].rate
            keep_best = repeats(self.f, y, x)
            self.chosen = {"space": where, "inner_rate": rate}
            net, dim = first(), y.dim if where == "solution" else y.inputs
            return steps_in(where, net, y, Learned(rate, dim, iterations), iterations, through, keep_best)

        def recurrent() -> Recurrent:
            heads: dict[str, type[Additive | Gated]] = {"additive": Additive, "gated": Gated}
            return Recurrent(y.dim, memory, contexts=spec.x_dim, head=heads[head])

        def choice() -> Choice:
            return Choice(problem.network(hidden, candidates) or plain(candidates * y.inputs), candidates, y)

        def latent() -> Latent:
            z = Euclid(latent_dim)
            decode = Concatenated(mlp(latent_dim + spec.x_dim, hidden, y.inputs), statistics)
            steps = Gradient(Learned(inner_rate or 0.1, latent_dim, iterations), clip=CLIP)
            return Latent(decode, Unroll(Full(plain(latent_dim), z), steps, iterations, z, through), y)

        models: dict[str, Callable[[], Model]] = {
            "full": lambda: Full(network(), y),
            "semi": semi,
            "recurrent": lambda: Unroll(Full(first(), y), recurrent(), iterations, y, FirstOrder()),
            "latent": latent,
            "choice": choice,
        }
        losses: dict[str, Callable[[], Loss]] = {
            "objective": lambda: objective,
            "regress": lambda: Regress(teacher(problem)),
            "iterates": OverIterates,
            "es": lambda: Smoothed(sigma, pairs, y.nearest),
        }
        if loss == "regress" and any(p.requires_grad for p in problem.parameters()):
            raise UserError(
                f"loss=regress: it does not reach the parameters of {type(problem).__name__}, which are learnt with the model; "
                f"freeze them (requires_grad_(False)), or take another loss"
            )
        self.model, self.loss = models[model](), losses[loss]()
        # what `improve` trains: the model, and the problem's own parameters, where it has some to learn
        self.owned = [p for p in (*self.model.parameters(), *problem.parameters()) if p.requires_grad]
        self.adam = Adam(self.owned, learning_rate, horizon=decay_updates)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        y: Tensor = self.model(x, self.f.oracle(x))
        return y

    def evaluate(self, batch: Contexts) -> Metrics:
        return {}  # f is known

    def improve(self, batch: Contexts) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.owned, self.adam)
        return {f"model/{name}": value for name, value in metrics.items()}


def posed(spec: Spec) -> Problem:
    """The problem behind an environment. Raises UserError where there is none."""
    if spec.problem is None:
        raise UserError("env: its objective is not known; a subclass of rlamort.Problem is needed to amortize one")
    return spec.problem


def teacher(problem: Problem) -> Model:
    """What regression learns from: the problem's own solution, or what L-BFGS finds from the middle of Y.

    Raises:
        UserError: its own solution is not in Y.
    """
    solution, name = solution_of(problem), f"{type(problem).__name__}.solution"
    y = solution(presented(problem, 2))
    if y is not None:
        if not within(problem.domain, y).all():
            outside, kind = problem.domain.violation(y).max().item(), type(problem.domain).__name__
            raise UserError(f"loss=regress: {name} gives points {outside:.3g} outside {kind}; points in it are needed")
        return Expert(solution, name)
    return Unroll(Full(Zeros(problem.domain.inputs), problem.domain), Lbfgs(problem.domain), 50, problem.domain)
