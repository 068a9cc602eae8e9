"""Checks of a user's problem before anything is trained on it, and the models and losses that fit it.

x context, as the user has it, and as vectors (B, d) · y solution (B, n) · v unconstrained (B, inputs) · f cost (B,)"""

import copy
import math
from typing import NamedTuple

import torch

from rlamort import parts
from rlamort.agents.amortize import Amortize
from rlamort.config import Dtype, convert
from rlamort.env.bandit import Bandit
from rlamort.env.one_step import OneStep
from rlamort.errors import UserError
from rlamort.host.machine import default_dtype
from rlamort.measure import check_cost, check_parts
from rlamort.measure.trial import Line, Trial, Verdict
from rlamort.problem import Problem, begun, learned, presented
from rlamort.run.fitting import require_frozen
from rlamort.solve.refine import STEPS, TRIED, refinement

MODELS = ("full", "choice", "semi", "recurrent", "latent")
LOSSES = ("objective", "regress", "iterates", "rl", "es", "penalty", "lagrangian")


class Fit(NamedTuple):
    """A model or a loss, and whether it can be used on the problem."""

    name: str
    fits: bool
    why: str


class Report(NamedTuple):
    """The results of all checks; as text, the output of `rlamort check`."""

    name: str  # of the problem's class
    lines: list[Line]
    models: list[Fit]
    losses: list[Fit]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(line.verdict != "fail" for line in self.lines)

    def __str__(self) -> str:
        fits = [
            f"{kind} {fit.name:<10} {'fits' if fit.fits else 'does not fit'}: {fit.why}"
            for kind, given in (("model", self.models), ("loss ", self.losses))
            for fit in given
        ]
        return "\n".join([f"{line.verdict:<6} {self.name}.{line.what}: {line.detail}" for line in self.lines] + fits)


def check(problem: Problem, count: int = 6, seed: int = 0, dtype: Dtype = "float32") -> Report:
    """Check a problem's methods on a few contexts. Exceptions become a line; nothing is trained, and generators are restored.

    Args:
        problem: the user's, which is checked on its device.
        count: contexts per batch.
        seed: of what is drawn.
        dtype: in which models are to see it; a copy of the problem moves to float64, if that is it.

    Raises:
        UserError: its class does not call `super().__init__()`, so that nothing can be tried.
    """
    device, dtype = _device(begun(problem)), convert("dtype", dtype, Dtype)
    if dtype == "float64":
        problem = copy.deepcopy(problem).double()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), default_dtype(dtype):
        return _report(Trial(problem, count, seed, device))


def _report(trial: Trial) -> Report:
    needed = (
        ("domain", check_parts.domain),
        ("contexts", check_parts.contexts),
        ("cost", check_cost.cost),
        ("cost, in place", check_cost.in_place),  # whatever comes after these two would blame something else
        ("cost, finite", check_cost.finite),
    )
    optional = (
        ("contexts, seeded", check_parts.reproducible),
        ("cost, batch independence", check_cost.independent),
        ("cost, gradient", check_cost.gradient),
        ("cost, second derivative", check_cost.curvature),
        ("device", check_parts.devices),
        ("solution", check_parts.solution),
        ("residual", check_parts.residual),
        ("map", check_parts.map),
        ("convex", check_parts.convex),
        ("constraints", check_parts.constraints),
    )
    if all(trial.look(what, look) for what, look in needed):
        for what, look in optional:
            trial.look(what, look)
    verdicts = {line.what: line.verdict for line in trial.lines}
    models, losses = _fits(verdicts)
    if verdicts.get("cost, gradient") in ("pass", "warn"):
        models = [_semi(trial, fit) if fit.name == "semi" else fit for fit in models]
    if learned(trial.problem):
        models, losses = _learning(trial.problem, models, losses)
    return Report(type(trial.problem).__name__, trial.lines, models, losses)


def _semi(trial: Trial, fit: Fit) -> Fit:
    """The line of `semi`, with the space of its steps, from a trial."""
    x = presented(trial.problem, TRIED, trial.device)
    found = refinement(trial.f, trial.problem.domain, x)
    inside, chart = found.inside.cost, found.chart.cost
    steps = fit.why if fit.fits else "gradient steps after a network, of which the best is kept"
    if found.better is found.inside:
        return Fit("semi", True, f"{steps}; they are taken in Y") if math.isfinite(inside) else fit
    why = (
        f"{steps}; they are taken in the unconstrained coordinates of Y (model.space={found.chart.space.name}): {STEPS} steps "
        f"from its middle end there at a mean cost of {chart:.4g}, and in Y at {inside:.4g}"
    )
    return Fit("semi", True, why)


def _fits(verdicts: dict[str, Verdict]) -> tuple[list[Fit], list[Fit]]:
    """Models and losses, from the results of the checks."""
    broken = [what for what in ("domain", "contexts", "cost", "cost, in place", "cost, finite", "cost, batch independence")
              if verdicts.get(what, "fail") == "fail"]  # fmt: skip
    if broken:
        why = f"{broken[0]} failed"
        return [Fit(name, False, why) for name in MODELS], [Fit(name, False, why) for name in LOSSES]
    smooth = verdicts["cost, gradient"] in ("pass", "warn")
    walled = verdicts["cost, finite"] == "warn"
    steps = smooth and not walled and verdicts["cost, gradient"] == "pass"
    no_gradient = "the cost has no useful gradient"
    no_steps = "its steps may end where the cost or its gradient is infinite" if smooth else no_gradient
    first_order = ", with model.adjoint=first_order" if verdicts["cost, second derivative"] == "warn" else ""
    solved = verdicts["solution"] == "pass"
    by = "" if smooth else ", trained by es, rl" + (" or regress" if solved else "")
    taught = "on a solver's answers, since `solution` cannot be used" if smooth else f"no `solution`, and {no_gradient}"
    values = "needs values alone" + (", though a gradient is available" if smooth else "")
    models = [
        Fit("full", True, f"a network alone{by}"),
        Fit("choice", True, f"the cheapest of several predictions, by values{by}"),
        Fit("semi", steps, f"gradient steps after a network{first_order}" if steps else no_steps),
        Fit("recurrent", steps, "learned steps on gradients after a network" if steps else no_steps),
        Fit("latent", smooth, f"gradient steps in a latent space{first_order}" if smooth else no_gradient),
    ]
    losses = [
        Fit("objective", smooth, "the cost itself" if smooth else f"{no_gradient}; rl and es need values alone"),
        Fit("regress", solved or smooth, "on `solution`" if solved else taught),
        Fit("iterates", smooth, "the cost of every iterate" if smooth else no_gradient),
        Fit("rl", True, values),
        Fit("es", not walled, "its samples may end where the cost is infinite" if walled else values),
    ]
    if verdicts["constraints"] != "absent":
        why = "it ignores the constraints; penalty and lagrangian heed them"
        blind = ("objective", "iterates", "es") if solved else ("objective", "iterates", "es", "regress")
        losses = [Fit(fit.name, False, why) if fit.name in blind else fit for fit in losses]
        only = "on `solution`, of models that do not ask for the cost, such as full"
        losses = [Fit(fit.name, True, only) if fit.name == "regress" and fit.fits else fit for fit in losses]
        losses += [
            Fit("penalty", smooth, "the cost and a quadratic penalty on violations" if smooth else no_gradient),
            Fit("lagrangian", smooth, "with multipliers that a second network predicts" if smooth else no_gradient),
        ]
    return models, losses


def _learning(problem: Problem, models: list[Fit], losses: list[Fit]) -> tuple[list[Fit], list[Fit]]:
    """Models and losses of a problem with parameters that are to be learned: those that fit train them, too."""
    usual = next((fit.name for fit in losses if fit.fits and fit.name in ("objective", "penalty", "es")), "")
    tried = {fit.name: misfit(problem, fit.name, usual) if fit.fits and usual else "" for fit in models}
    models = [Fit(fit.name, False, tried[fit.name]) if tried[fit.name] else fit for fit in models]
    taken, judged = [fit.name for fit in models if fit.fits] or ["full"], []
    for fit in losses:
        wrong = {model: misfit(problem, model, fit.name) for model in taken} if fit.fits else {}
        able = [model for model, why in wrong.items() if not why]
        if wrong and not able:
            fit = Fit(fit.name, False, wrong[taken[0]])
        elif len(able) < len(wrong):
            fit = Fit(fit.name, True, f"{fit.why}; with model={' or '.join(able)}, which ask for what is learned")
        judged.append(fit)
    return models, judged


def misfit(problem: Problem, model: str, loss: str) -> str:
    """Why a model and a loss do not fit the problem together, by what an agent says before it learns; empty if they do."""
    try:
        env = OneStep(problem, 1, _device(problem))
        if loss == "rl":
            require_frozen(Bandit(env).spec)
        else:
            y, L = parts.Model.named(model, "model"), parts.Loss.named(loss, "loss")
            Amortize(env.spec, model=y, loss=L, hidden=(8,)).to(env.device).require_trained()
    except UserError as error:
        return str(error)
    return ""


def _device(problem: Problem) -> torch.device:
    for tensor in (*problem.parameters(), *problem.buffers()):
        return tensor.device
    return torch.device("cpu")
