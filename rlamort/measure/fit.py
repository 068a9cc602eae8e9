"""From a user's problem to a solver, with its quality, speed and certificates.

x contexts as vectors (B, d) · y solution (B, n) · f cost (B,)
"""

import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlamort.agent import Agent
from rlamort.config import Dtype, nested
from rlamort.constraints import Constraints
from rlamort.domain import Domain
from rlamort.env.one_step import problem_of
from rlamort.errors import UserError, nearest
from rlamort.host.machine import default_dtype
from rlamort.measure.check import check, misfit
from rlamort.measure.plot import draw_gaps
from rlamort.measure.report import Report, table
from rlamort.measure.table import Row, measure
from rlamort.measure.trainings import asked_of, pairs, require_keys, require_trainings, require_values
from rlamort.model import Model
from rlamort.objective import Cost, Oracle
from rlamort.parts import Loss
from rlamort.problem import Problem, device_of, learned, presented, unseen
from rlamort.run.learner import Learner, learner_class
from rlamort.run.restore import unasked
from rlamort.run.stored import as_here, values_of
from rlamort.score import interval
from rlamort.solve.certificate import Tolerance
from rlamort.solve.classical import LBFGS, PROJECTED, Reference, best_found, extended, solution_of
from rlamort.solve.solver import EXACT, Solver

HELD_OUT, CONSTRAINED = 1_000, 100  # held-out contexts, on which all are measured; of a problem with constraints
SEED = 1_000_000  # of those contexts
CERTIFIED = Tolerance(1e-4, 1e-4)  # at which the report solves with a certificate
Given = Problem | type[Problem] | str


class Acting(Model):
    """A policy of reinforcement learning as a model of solutions: y = domain.act(policy(x)).

    Args:
        agent: the policy; its actions lie in [-1, 1]^inputs.
        domain: Y.
    """

    def __init__(self, agent: Agent, domain: Domain) -> None:
        super().__init__()
        self.agent, self.domain = agent, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.domain.at(x).act(self.agent.act(x, explore=False))[None]


def amortize(problem: Given, *, loss: Any = "objective", steps: int = 5_000, **fields: Any) -> Solver:
    """Train a model of a problem's solutions, as `rlamort train amortize` does, and return it as a solver.

    Args:
        problem: an instance or class derived from `rlamort.Problem`, `module:Class`, or a registered id.
        loss: objective, regress, iterates or es (see `rlamort train amortize --help`), a mapping with a `kind` and keys of its
            own, or a part of `rlamort.parts`; or rl: TD3 on the problem as an environment, which needs only values of the
            cost.
        steps: updates, over which the learning rate falls to zero unless `decay_updates` is set.
        fields: keys of `rlamort train amortize --help` (of `rlamort train td3 --help` with loss=rl), checked by name; keys of
            parts nested, such as `model={"kind": "semi", "steps": 8}`.

    Raises:
        UserError: the problem, a key or a value is invalid; before any work starts.
        Diverged: a trained parameter is not finite.
    """
    posed, asked = problem_of(problem), {"steps": steps, **fields}
    if isinstance(loss, str) and loss not in (known := (*Loss.names(), "rl")) and not {".", ":"} & set(loss):
        raise UserError(f"loss={loss}: there is no such loss. {nearest(loss, known)}")
    started = time.perf_counter()
    if loss == "rl":
        learner = _by_acting(posed, asked)
        model: Model = Acting(learner.agent, posed.domain)
        facts = {"loss": "rl"}
    else:
        asked = {"decay_updates": steps, "loss": loss, **asked}
        learner = learner_class("amortize")(posed, **asked)
        learner.learn(learner.config.run.steps)  # a whole number, whatever was given
        model, facts = _model_of(learner), {}
    plain = learner.config.plain()
    solver = Solver(
        model, posed, {name: plain[name] for name in (*nested(asked), *learner.agent.chosen) if name in plain} | facts
    )
    solver.training_seconds = time.perf_counter() - started
    solver.check_finite()
    return solver


def _by_acting(problem: Problem, asked: dict[str, Any]) -> Learner:
    if asked.pop("model", "full") != "full":
        raise UserError("loss=rl: a policy is a full model; model=full is needed")
    learner = learner_class("td3")(problem, **asked)
    return learner.learn(learner.config.run.steps)


def _model_of(learner: Learner) -> Model:
    model = learner.agent.model
    assert isinstance(model, Model)
    return model


def load_solver(folder: str | Path, problem: Given) -> Solver:
    """Load what `Solver.save` wrote. The problem is an argument, since files never cause imports.

    Raises:
        UserError: no solver is saved there, or it does not fit the problem.
    """
    posed = problem_of(problem)

    def build(facts: dict[str, Any]) -> Model:
        if facts["loss"] == "rl":
            fields = {name: value for name, value in facts.items() if name not in ("loss", "model")}
            return Acting(unasked("td3", posed, as_here(values_of("td3", fields))).agent, posed.domain)
        return _model_of(unasked("amortize", posed, as_here(values_of("amortize", facts))))

    return Solver.load(Path(folder), posed, build)


def report(
    problem: Given,
    models: Sequence[str] = ("full", "semi"),
    losses: Sequence[str] = ("objective",),
    out: Path | None = None,
    dtype: Dtype = "float32",
    **fields: Any,
) -> Report:
    """Train every model with every loss that fits, and compare each with the reference on held-out contexts.

    Args:
        problem: as for `amortize`.
        models: of MODELS.
        losses: of LOSSES.
        out: a folder for the solvers, two plots and the data; None writes nothing.
        dtype: of networks, contexts and the problem.
        fields: as for `amortize`.

    Raises:
        UserError: the problem fails a check, or a name is unknown; before any work starts.
    """
    chosen, fields = pairs(models, losses), nested(fields)
    if dtype != "float32" and "rl" in losses:
        raise UserError(f"dtype={dtype}: loss=rl trains TD3, whose replay is float32; leave one of them out")
    require_keys(models, losses, fields)
    posed = problem_of(problem)
    looked = check(posed, dtype=dtype)
    if not looked.ok:
        wrong = [f"{line.what}: {line.detail}" for line in looked.lines if line.verdict == "fail"]
        raise UserError("\n  ".join([f"{looked.name}: it cannot be amortized yet", *wrong]))
    for fit in (*looked.models, *looked.losses):
        if fit.name in (*models, *losses) and not fit.fits:
            raise UserError(f"{fit.name}: it does not fit {looked.name}: {fit.why}")
    if learned(posed) or Constraints.of(posed) is not None:
        with torch.random.fork_rng(), default_dtype(dtype):
            wrong = [f"{model}, {loss}: {why}" for model, loss in chosen if (why := misfit(posed, model, loss))]
        if wrong:
            raise UserError("\n  ".join([f"{looked.name}: what does not fit together", *wrong]))
    solvers: dict[str, Solver] = {}
    exact = {} if dtype == "float32" else {"dtype": dtype}
    require_values(chosen, fields | exact)
    for model, loss in chosen:
        name = model if len(losses) == 1 else f"{model}, {loss}"
        print(f"training: {name}", flush=True)
        solvers[name] = amortize(posed, **asked_of(model, loss, fields | exact))
    return held_out(posed, solvers, out)


def held_out(problem: Problem, solvers: dict[str, Solver], out: Path | None = None) -> Report:
    """The table of solvers on held-out contexts, the time of certification, and the plots."""
    first = next(iter(solvers.values()))
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        bound = Constraints.of(problem) is not None
        x = first.draw(CONSTRAINED if bound else HELD_OUT)
        with torch.no_grad():
            predictions = {name: solver.predict_rows(x) for name, solver in solvers.items()}
        print(f"solving: {len(x):,} contexts held out, for the reference", flush=True)
        best = min(predictions.values(), key=lambda y: extended(first.f, problem.domain, y, x).mean().item())
        reference = first.reference(x, y=best)
        print(f"timing: {', '.join(solvers)}, and classical solvers", flush=True)
        sizes = (1, CONSTRAINED // 2) if bound else (1, 1000)
        rows = [measure(name, solver, x, reference, solver.training_seconds, sizes) for name, solver in solvers.items()]
        certified = [_certified(name, solver, x) for name, solver in solvers.items()]
    agreed = "" if reference.label in ("solution", EXACT) else f"; {reference.agreement:.0%} of its starts agree"
    if bound:
        agreed = f"; {reference.agreement:.0%} of the contexts are solved, and the others are left out of gaps"
    lines = [
        f"{type(problem).__name__}: {len(x):,} contexts held out, {torch.get_num_threads()} threads",
        f"reference: {reference.label}{agreed}",
        *(f"  {message}" for message in reference.messages),
        "",
        *table(rows[0].head(), [row.cells() for row in rows]),
        "",
        *certified,
        *behind(rows),
    ]
    data = {"reference": reference.label, "agreement": reference.agreement, "rows": [row._asdict() for row in rows]}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, solver in solvers.items():
            solver.save(out / name.replace(", ", "-"))
        curves = [] if bound else _classical(first, x[:256], reference)
        curves += [_learned(n, s, x[:256], reference) for n, s in solvers.items()]
        gaps = {name: (first.f(y, x) - reference.cost).detach() for name, y in predictions.items()}
        lines += ["", f"plots and solvers: {draw_gaps(curves, {n: g.tolist() for n, g in gaps.items()}, out)}"]
    return Report(lines, data)


def behind(rows: Sequence[Row]) -> list[str]:
    """A line for every semi-amortized model that is worse than the network alone, by more than their intervals."""
    alone = {row.name: row for row in rows}
    lines = []
    for row in rows:
        kind, _, loss = row.name.partition(",")
        full = alone.get(f"full,{loss}" if loss else "full")
        if kind in ("semi", "recurrent", "latent") and full is not None and row.low > full.high:
            lines.append(
                f"{row.name} is worse than {full.name}, though its steps keep their best iterate: the network that they begin "
                f"from has learned less in as many updates. More updates, or {full.name}, are the better choice here"
            )
    return lines


def _certified(name: str, solver: Solver, x: Tensor) -> str:
    started = time.perf_counter()
    by = solver.certificate().kind
    tolerance = CERTIFIED._replace(relative=0.0) if by in ("residual", "KKT residual") else CERTIFIED
    solved = solver.solve_rows(x, tolerance)
    seconds = time.perf_counter() - started
    counts: dict[str, int] = {}
    for status in solved.status:
        counts[status.split(":")[0]] = counts.get(status.split(":")[0], 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{name}, solve({tolerance}) by {solved.kind}: {said}; {1e6 * seconds / len(x):.3g} µs an item"


class Curve(NamedTuple):
    """Mean gap by iterations and by seconds, of one solver on one batch."""

    name: str
    gap: list[float]
    seconds: list[float]


@torch.no_grad()
def _classical(solver: Solver, x: Tensor, reference: Reference, iterations: int = 60) -> list[Curve]:
    curves = []
    f, domain = solver.f, solver.problem.domain
    for rival in (PROJECTED, LBFGS):
        v, lowest = x.new_zeros(1, len(x), domain.inputs), x.new_full((len(x),), torch.inf)
        costs, seconds, started = [], [], time.perf_counter()
        for y in itertools.islice(rival.iterates(f, domain, x, v), iterations):
            seconds.append(time.perf_counter() - started)
            lowest = torch.fmin(lowest, extended(f, domain, y[0], x))
            costs.append((lowest - reference.cost[: len(x)]).mean().item())
        curves.append(Curve(rival.name, costs, seconds))
    return curves


@torch.no_grad()
def _learned(name: str, solver: Solver, x: Tensor, reference: Reference) -> Curve:
    solver.predict_rows(x)
    started = time.perf_counter()
    path = solver.model.iterates(solver.f.seen(x), solver.f.oracle(x))
    taken = time.perf_counter() - started
    costs = [extended(solver.f, solver.problem.domain, y, x) for y in path]
    gaps = [(cost - reference.cost[: len(x)]).mean().item() for cost in costs]
    return Curve(name, gaps, [taken * (k + 1) / len(path) for k in range(len(path))])


def compare(
    problem: Given | tuple[Problem, Problem],
    models: Sequence[str] = ("full",),
    losses: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    **fields: Any,
) -> Report:
    """Compare models or losses with the same network, contexts and budget: mean gap on held-out contexts, over seeds.

    The objective is frozen: the problem's own parameters are not trained, so that all minimise the same f.

    Args:
        problem: as for `amortize`; or a pair, the second of which draws the held-out contexts.
        models: of MODELS.
        losses: of LOSSES; None takes objective, and regress for a problem with a `solution`; otherwise a teacher would have to
            solve every batch.
        seeds: of the trainings, each another.
        fields: as for `amortize`.

    Raises:
        UserError: a name is unknown, a value is not allowed, or a seed is given twice; before any work starts.
    """
    given = problem if isinstance(problem, tuple) else (problem_of(problem),) * 2
    if Constraints.of(given[1]) is not None:
        name = type(given[1]).__name__
        raise UserError(f"problem={name}: it has constraints, of which a mean gap says nothing; use `rlamort amortize`")
    if losses is None:
        losses = ("objective", "regress") if type(given[0]).solution is not Problem.solution else ("objective",)
    require_trainings(models, losses, seeds, fields)
    chosen, fields = pairs(models, losses), nested(fields)
    training, testing = (copy.deepcopy(one).requires_grad_(False) for one in given)
    f = Cost(testing)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x = presented(testing, HELD_OUT, device_of(testing), unseen)
        print(f"solving: {HELD_OUT:,} contexts held out, for the reference", flush=True)
        reference = best_found(f, testing.domain, x, solution=solution_of(testing))
    rows = []
    data: dict[str, Any] = {}
    for model, loss in chosen:
        gaps, seconds = [], []
        for seed in seeds:
            print(f"training: {model}, {loss}, seed {seed}", flush=True)
            solver = amortize(training, seed=seed, **asked_of(model, loss, fields))
            gaps.append((extended(f, testing.domain, solver.predict_rows(x), x) - reference.cost).mean().item())
            seconds.append(solver.training_seconds)
        mean, low, high = interval(gaps)
        bounds = f"[{low:.2e}, {high:.2e}]" if len(gaps) > 1 else "-"
        rows.append([model, loss, f"{mean:.3e}", bounds, f"{sum(seconds) / len(seconds):.1f}"])
        data[f"{model}, {loss}"] = {"gaps": gaps, "seconds": seconds}
    head = ["model", "loss", "mean gap", f"95 % over seeds {list(seeds)}", "seconds to train"]
    lines = [f"{type(testing).__name__}: {len(x):,} contexts held out, reference: {reference.label}", "", *table(head, rows)]
    return Report(lines, data)
