"""Sparse coding: encoders and learned solvers against coordinate descent, ISTA and FISTA, on held-out signals.

x signal (B, M) · y code (B, N) · A dictionary (M, N) · f lasso (B,) · K layers
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from rlamort.agents.amortize import Amortize
from rlamort.envs.sparse import Lasso, SparseRecovery, nmse
from rlamort.measure.claims.clock import median_seconds
from rlamort.measure.verdict import Measured, Verdict, at_least, at_most
from rlamort.model import Full, Unroll
from rlamort.nets import Zeros
from rlamort.objective import nothing
from rlamort.run.learner import learner_class
from rlamort.update import Update
from rlamort.update.sparse import Fista, GradientRestart, Ista, Lista, ListaCp, NoRestart, Safeguarded, StepIsta

REPEATS = 31  # of a timed call
UNSEEN, SEED = 1_000, 1_000_000
BATCHES = (1, 1_000)
SWEEPS = (1, 2, 5, 10, 1_000)  # of coordinate descent, the last of which is scikit-learn's default
# of the lasso by which ISTA and FISTA recover codes; the best at each iteration counts
ALPHAS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2)
RATES = (1.0, 1.9)  # ISTA's steps in units of 1 / L
LIMIT = 500  # iterations of ISTA and FISTA
LAYERS = 16
Metric = Callable[[Tensor], float]  # of codes (B, N); lower is better


class Row(NamedTuple):
    """A training of a method with overrides."""

    name: str
    method: str
    overrides: dict[str, Any]

    def train(self, env: str) -> Amortize:
        """The trained agent on the problem `env`, after the row's number of updates."""
        learner = learner_class(self.method)(env, seed=0, **self.overrides)
        learner.learn(learner.config.run.steps)
        agent = learner.agent
        learner.close()
        assert isinstance(agent, Amortize)
        return agent


def psd() -> Measured:
    """The encoder, and three steps of ISTA after it: objective, and time against scikit-learn's coordinate descent.

    The claims are about whitened patches. Coordinates of patches that are not are correlated, which slows ISTA; their results
    are reported beside.
    """
    agent = Row("psd", "psd", {}).train("rlamort/Lasso-v0")
    by_regression = {
        "loss": {"kind": "regress", "teacher": "fista"}, "model.steps": 0, "steps": 2_000, "decay_updates": 2_000,
    }  # fmt: skip
    regressed = Row("regressed", "psd", by_regression).train("rlamort/Lasso-v0")
    encoder = _encoder(agent)
    data = {
        "whitened": encoder,
        "whitened, trained by regression on FISTA's codes": _encoder(regressed)["excess after each step"],
    }
    for alpha in (0.4, 1.0):
        plain = Row("plain", "psd", {"env_kwargs": {"alpha": alpha, "whitening": 0.0}}).train("rlamort/Lasso-v0")
        data[f"not whitened, alpha = {alpha}"] = _encoder(plain)
    stopped = encoder["coordinate descent stopped when as good as psd, over ours"]
    verdicts = [
        at_most("psd: mean objective above the lasso's minimum, over it", encoder["excess after each step"][0], 0.2),
        at_most(f"psd and 3 steps of ISTA, of {RATES[-1]} / L: likewise", encoder["excess after each step"][-1], 0.05),
        at_least(
            f"psd: time of scikit-learn's coordinate descent over ours, per sample in batches of {BATCHES[-1]}, one thread "
            f"({stopped:.3g}x if it stops when it is as good as psd)",
            encoder["coordinate descent over ours"],
            500,
            "x",
        ),
    ]
    assert isinstance(agent.problem, Lasso)
    return Measured(verdicts, data, {"psd_dictionary": atoms(agent.problem.ista.dictionary)})


@torch.no_grad()
def _encoder(agent: Amortize) -> dict[str, Any]:
    """Quality and time of an encoder, on held-out patches."""
    problem, model = agent.problem, agent.model
    assert isinstance(problem, Lasso)
    assert isinstance(model, Unroll)
    assert isinstance(model.init, Full)
    encoder = model.init.net
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x = problem.held_out(UNSEEN)
    exact = problem.solution(x)
    best = problem.cost(exact, x).mean().item()
    excess = [problem.cost(y, x).mean().item() / best - 1 for y in model.iterates(x)]  # the encoder's, then ISTA's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        ours = {size: median_seconds(lambda n=size: encoder(x[:n]), REPEATS) / size for size in BATCHES}  # type: ignore[misc]
        refined = median_seconds(lambda: model(x), REPEATS) / UNSEEN
        descents = {sweeps: _descent(problem, x, sweeps, best) for sweeps in SWEEPS}
    torch.set_num_threads(threads)
    as_good = min(found["seconds"] for found in descents.values() if found["excess"] <= excess[0])
    return {
        "excess after each step": excess,
        "seconds per sample": {f"batch of {size}": value for size, value in ours.items()} | {"with 3 steps of ISTA": refined},
        "coordinate descent": {f"at most {sweeps} sweeps": found for sweeps, found in descents.items()},
        "coordinate descent over ours": descents[SWEEPS[-1]]["seconds"] / ours[BATCHES[-1]],
        "coordinate descent stopped when as good as psd, over ours": as_good / ours[BATCHES[-1]],
        "non-zero coordinates of y*": (exact != 0).double().sum(-1).mean().item(),
    }


def _descent(problem: Lasso, x: Tensor, sweeps: int, best: float) -> dict[str, float]:
    """Seconds per sample of the faster precision, and its objective; the Gram matrix is computed beforehand."""
    found = []
    for dtype in (np.float32, np.float64):
        signals: Any = x.numpy().astype(dtype)
        dictionary: Any = problem.ista.dictionary.mT.numpy().astype(dtype)
        settings = {"gram": dictionary @ dictionary.T, "alpha": problem.ista.alpha, "max_iter": sweeps, "check_input": False}

        def solve(inputs: tuple[Any, ...] = (signals, dictionary), settings: dict[str, Any] = settings) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # few sweeps are what is asked for
                return sparse_encode(*inputs, algorithm="lasso_cd", **settings)

        y = torch.from_numpy(solve()).to(x)
        seconds = median_seconds(solve, 6) / len(x)
        found.append({"seconds": seconds, "excess": problem.cost(y, x).mean().item() / best - 1})
    return min(found, key=lambda one: one["seconds"])


def lista() -> Measured:
    """Learned solvers on recovery and on the lasso: iterations of ISTA and FISTA to the result of 16 layers."""
    recovery = [Row(name, name, {"loss": "truth", "learning_rate": 1e-2}) for name in ("lista", "lista_cp", "alista")]
    objective = [
        Row("slista", "slista", {}),
        Row("lista", "lista", {}),
        Row("lista, momentum", "lista", {"model.update": {"kind": "momentum", "update": "lista"}}),
    ]
    found, figures, data = [], {}, {}
    for problem, family in ((SparseRecovery(), recovery), (Lasso(), objective)):
        name = type(problem).__name__
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            verdicts, data[name], figures[f"lista_{name.lower()}"] = _family(problem, family)
        found += verdicts
    return Measured(found, data, figures)


def _family(problem: Lasso | SparseRecovery, family: Sequence[Row]) -> tuple[list[Verdict], dict[str, Any], Figure]:
    """One problem: its baselines, and each learned solver with its claim."""
    if isinstance(problem, SparseRecovery):
        x, truth = problem.contexts(UNSEEN).values()
        what, unit = "NMSE in dB", "recovery"

        def metric(y: Tensor) -> float:
            return float(nmse(y, truth))
    else:
        x = problem.held_out(UNSEEN)
        best = float(problem.cost(problem.solution(x), x).mean())
        what, unit = "f over its minimum - 1", "objective"

        def metric(y: Tensor) -> float:
            return float(problem.cost(y, x).mean()) / best - 1

    alphas = ALPHAS if isinstance(problem, SparseRecovery) else (problem.ista.alpha,)
    baselined = baselines(problem, x, alphas, metric)
    guards, ends, reached = [], {}, {}
    for row in family:
        agent = row.train(f"rlamort/{type(problem).__name__}-v0")
        with torch.no_grad():
            curve = [metric(y) for y in agent.model.iterates(x, agent.f.oracle(x))]
        ends[row.name], reached[row.name] = curve, {name: first(baselined[name], curve[-1]) for name in baselined}
        if isinstance(problem, Lasso):
            guards.append(_guarded(row.name, agent, x))
    data = {"metric": what, "iterations": _thinned(baselined), "by layer": ends, "iterations to reach it": reached}
    verdicts = []
    for row in family:
        claim = f"{row.name}, {unit}: {LAYERS} layers end at {ends[row.name][-1]:.4g}, {what}; iterations until"
        verdicts += [
            at_least(
                f"{claim} ISTA, of 1 / L, is there ({reached[row.name]['ISTA, best rate']} at the better of {RATES} / L)",
                reached[row.name]["ISTA"],
                100,
            ),
            at_least(f"{claim} FISTA is there, the better of with restarts and without", reached[row.name]["FISTA"], 30),
        ]
    return [*verdicts, *guards, _beginning(problem, x)], data, figure(baselined | ends, what)


def _thinned(curves: dict[str, list[float]]) -> dict[str, dict[int, float]]:
    """Every fifth iteration up to 100, and every fiftieth after it."""
    return {name: {k: v for k, v in enumerate(c) if k % (5 if k <= 100 else 50) == 0} for name, c in curves.items()}


def baselines(problem: Lasso | SparseRecovery, x: Tensor, alphas: Sequence[float], metric: Metric) -> dict[str, list[float]]:
    """By iteration, the best over the grid of each solver: ISTA at 1 / L, ISTA at the best rate, and FISTA."""
    a = problem.ista.dictionary
    grids: dict[str, list[Update]] = {
        "ISTA": [Ista(a, alpha) for alpha in alphas],
        "ISTA, best rate": [Ista(a, alpha, rate) for alpha in alphas for rate in RATES],
        "FISTA": [Fista(Ista(a, alpha), restart) for alpha in alphas for restart in (NoRestart(), GradientRestart())],
    }
    return {
        name: np.min([_curve(problem, update, x, metric) for update in grid], axis=0).tolist() for name, grid in grids.items()
    }


@torch.no_grad()
def _curve(problem: Lasso | SparseRecovery, update: Update, x: Tensor, metric: Metric) -> list[float]:
    """LIMIT + 1 values from zero; iterates are not stored, since they would take gigabytes."""
    y, oracle = x.new_zeros(len(x), problem.domain.dim), nothing(x)
    h, found = update.start(y, x, oracle), [metric(y)]
    for _ in range(LIMIT):
        y, h = update(y, h, x, oracle)
        found.append(metric(y))
    return found


def first(curve: Sequence[float], target: float) -> int:
    """The first iteration at which `curve` reaches `target`; its length if it never does."""
    return next((k for k, value in enumerate(curve) if value <= target), len(curve))


def _guarded(name: str, agent: Amortize, x: Tensor) -> Verdict:
    """Whether any item is worse than ISTA at any layer, with safeguards."""
    problem, model = agent.problem, agent.model
    assert isinstance(problem, Lasso)
    assert isinstance(model, Unroll)
    with torch.no_grad():
        ours, theirs = (
            torch.stack([problem.cost(y, x) for y in _path(problem, update, LAYERS, x)])
            for update in (Safeguarded(model.update, problem.ista), problem.ista)
        )
    above = int((ours > theirs).sum())
    return at_most(f"{name}, safeguarded: pairs of item and layer above ISTA, of {ours.numel()}", above, 0)


def _beginning(problem: Lasso | SparseRecovery, x: Tensor) -> Verdict:
    """Differences to ISTA at initialisation."""
    ista = problem.ista
    with torch.no_grad():
        plain = _path(problem, ista, LAYERS, x)
        apart = [
            (_path(problem, kind(ista, LAYERS), LAYERS, x) - plain).abs().amax().item() for kind in (Lista, ListaCp, StepIsta)
        ]
    largest = max(apart) / plain.abs().amax().item()
    name = type(problem).__name__
    return at_most(
        f"{name}: lista, lista_cp, slista before training beside ISTA, largest difference over largest code", largest, 1e-4
    )


def _path(problem: Lasso | SparseRecovery, update: Update, steps: int, x: Tensor) -> Tensor:
    """(steps + 1, B, N) from zero."""
    return Unroll(Full(Zeros(problem.domain.dim), problem.domain), update, steps, problem.domain).iterates(x)


def figure(curves: dict[str, list[float]], what: str) -> Figure:
    """Quality by layer or iteration."""
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = fig.subplots()
    for name, curve in curves.items():
        learned = len(curve) == LAYERS + 1
        axes.plot(range(len(curve)), curve, "-" if learned else "--", linewidth=2 if learned else 1, label=name)
    axes.set(xlabel="layers or iterations", ylabel=what, xlim=(0, 200))
    if "dB" not in what:
        axes.set(yscale="log", ylim=(1e-5, 1))
    axes.legend()
    return fig


def atoms(dictionary: Tensor) -> Figure:
    """Every atom as a patch."""
    side, columns = round(len(dictionary) ** 0.5), 16
    fig = Figure(figsize=(8, 8 * -(-dictionary.shape[1] // columns) / columns), layout="constrained")
    for axes, atom in zip(fig.subplots(-(-dictionary.shape[1] // columns), columns).flat, dictionary.mT, strict=False):
        axes.imshow(atom.view(side, side).numpy(), cmap="gray")
        axes.set(xticks=[], yticks=[])
    return fig
