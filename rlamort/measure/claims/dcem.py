"""DCEM: an energy that is learned through the solver, and plans in a latent space that is (Amos and Yarats, 2020).

x start (B, d) · y plan (B, H) · z latent plan (B, m) · f minus the return (B,) · a rollout: H steps of the dynamics
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rlamort.agents.amortize import Amortize
from rlamort.config import read_row
from rlamort.domain import unit_box
from rlamort.envs.cartpole import CartPolePlan
from rlamort.envs.energy import EnergyRegression
from rlamort.measure.verdict import Measured, at_least, at_most
from rlamort.model import Fitted, Full, Interpolation, Latent, Model, SupportPoints, Unroll
from rlamort.nets import Zeros
from rlamort.problem import presented
from rlamort.run.learner import learner_class
from rlamort.update import Cem, Coloured, Icem, Mppi, SoftTop, Truncated, Update

UNSEEN, TUNING, SEED = 1_000, 1_000, 1_000_000
STEPS = 10  # iterations of the solver in training
SEEDS = (0, 1, 2)
SOFT = [{"sigma": sigma, "temperature": 1.0} for sigma in (3.0, 7.0)]
RATES = [{"rate": rate} for rate in (0.03, 0.1, 0.3)]
STARTS, TUNED = 500, 60  # held-out starts; other ones, on which rivals are tuned
ROLLOUTS = {"1,000": ((10, 100),), "10,000": ((10, 1_000), (25, 400), (50, 200))}  # iterations and samples
FIRST: dict[str, Any] = {
    "model.inner.steps": 0,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "steps": 6_000,
    "decay_updates": 6_000,
}
SIGMAS, COLOURS, POINTS, TEMPERATURES = (0.3, 0.5, 1.0), (0.0, 1.0, 2.0), (5, 8, 12), (0.1, 1.0)


def energy() -> Measured:
    """An energy that is learned through DCEM stays right when DCEM takes twice as many iterations."""
    found = [_errors("Cem", one) for one in _tuned("Cem", SOFT)]
    worst = max(errors[2 * STEPS] / errors[STEPS] for errors in found)
    claim = f"DCEM: squared error after {2 * STEPS} iterations over that after {STEPS}, with which it is trained, worst seed"
    return Measured([at_most(claim, worst, 2, "x")], {"squared error by iterations, of each seed": found}, {})


def gradient() -> Measured:
    """An energy that is learned through unrolled gradient descent belongs to that number of steps alone."""
    found = [_errors("Gradient", one) for one in _tuned("Gradient", RATES)]
    least = min(errors[2 * STEPS] / errors[STEPS] for errors in found)
    claim = f"unrolled gradient descent: squared error after {2 * STEPS} steps over that after {STEPS}, least of seeds"
    return Measured([at_least(claim, least, 100, "x")], {"squared error by iterations, of each seed": found}, {})


def _tuned(kind: str, grid: Sequence[dict[str, float]]) -> list[Amortize]:
    """Agents of all seeds with what is best of a grid, by the error of the first seed on other inputs."""
    agents = [_regression(kind, one, SEEDS[0]) for one in grid]
    errors = [_errors(kind, one, SEED + 1)[STEPS] for one in agents]
    best = int(np.argmin(errors))
    print(f"tuned: {kind}, {dict(zip(map(str, grid), errors, strict=True))}", flush=True)
    return [agents[best], *(_regression(kind, grid[best], seed) for seed in SEEDS[1:])]


def _regression(kind: str, settings: dict[str, float], seed: int) -> Amortize:
    model = {"kind": "Unroll", "init": "middle", "steps": STEPS, "update": {"kind": kind, **CHOICE[kind], **settings}}
    return trained("dcem_energy", seed, model=model)


CHOICE: dict[str, dict[str, int]] = {"Cem": {"samples": 50, "elites": 10}, "Gradient": {}}


def _errors(kind: str, agent: Amortize, seed: int = SEED) -> dict[int, float]:
    """The mean squared error on unseen inputs, by the number of iterations."""
    assert isinstance(agent.problem, EnergyRegression)
    assert isinstance(agent.model, Unroll)
    found = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for steps in (5, 8, 9, 10, 11, 12, 15, 20):
            torch.manual_seed(seed)
            x = presented(agent.problem, UNSEEN)
            model = Unroll(agent.model.init, agent.model.update, steps, agent.problem.domain)
            found[steps] = agent.f(model(agent.f.seen(x), agent.f.oracle(x)), x).mean().item()
    return found


def trained(row: str, seed: int, begun: Model | None = None, **fields: Any) -> Amortize:
    """The agent of a row after its number of updates, from the weights of another model or its own first ones."""
    print(f"training: {row}, seed {seed}, {fields}", flush=True)
    learner = learner_class(row)(read_row(row)["env"], seed=seed, **fields)
    agent = learner.agent
    assert isinstance(agent, Amortize)
    if begun is not None:
        agent.model.load_state_dict(begun.state_dict())
    learner.learn(learner.config.run.steps)
    learner.close()
    return agent


def latent_2() -> Measured:
    """Two latent numbers are enough of a plan to beat ten times the rollouts in the space of all plans."""
    measured, agent = _latent(2)
    return measured._replace(figures={"dcem_latent": figure(agent)})


def latent_8() -> Measured:
    """The same with eight latent numbers."""
    return _latent(8)[0]


def latent_16() -> Measured:
    """The same with sixteen latent numbers."""
    return _latent(16)[0]


def _latent(dim: int) -> tuple[Measured, Amortize]:
    agent = _planner(dim)
    table = {f"{dim} latent numbers, {which}": tuned(searches(agent, sizes[0])) for which, sizes in ROLLOUTS.items()} | rivals()
    verdicts = []
    for name in ("CEM", "iCEM"):
        gap = table[f"{dim} latent numbers, 1,000"].cost - table[f"{name}, 10,000"].cost
        claim = f"cart-pole, {dim} latent numbers: mean cost of 1,000 rollouts less that of {name}, tuned, with 10,000"
        verdicts.append(at_most(claim, gap, 0))
    return Measured(verdicts, {name: one._asdict() for name, one in table.items()}, {}), agent


def _planner(dim: int) -> Amortize:
    """The row, begun from a decoder that was trained without a search, at z = 0, where an update costs a fraction."""
    size: dict[str, Any] = {"model.dim": dim}
    return trained("dcem", 0, trained("dcem", 0, **size, **FIRST).model, **size)


def starts(count: int, seed: int) -> Tensor:
    """Starts (count, d) that training does not draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CartPolePlan().contexts(count)


def searches(agent: Amortize, size: tuple[int, int]) -> dict[str, Model]:
    """Settings -> a search of a size, iterations and samples, through the agent's decoder."""
    model = agent.model
    assert isinstance(model, Latent)
    assert isinstance(model.inner, Unroll)
    steps, samples = size
    domain, updates = model.inner.domain, dict[str, Update]()
    for sigma in (0.5, 1.0, 2.0):
        for temperature in (1.0, 0.3):
            soft = Cem(domain, samples, samples // 10, sigma, selection=SoftTop(temperature))
            updates[f"DCEM, temperature {temperature}, sigma {sigma}"] = soft
        # of its samples one is the mean, and the first point is asked, too
        updates[f"iCEM, sigma {sigma}"] = Icem(Cem(domain, samples - 2, samples // 10, sigma, 0.1), 3)
    return {
        name: Latent(model.decode, Unroll(model.inner.init, update, steps, domain), model.domain)
        for name, update in updates.items()
    }


class Tuned(NamedTuple):
    """What is best of a grid on other starts: its settings, and its mean cost on the held-out ones."""

    settings: str
    cost: float


def tuned(grid: dict[str, Model]) -> Tuned:
    """Settings -> a solver, of which the best is taken."""
    other = starts(TUNED, SEED + 1)
    costs = {settings: played(model, other) for settings, model in grid.items()}
    best = min(costs, key=costs.__getitem__)
    print(f"tuned: {best}", flush=True)
    return Tuned(best, played(grid[best], starts(STARTS, SEED)))


@torch.no_grad()
def played(model: Model, x: Tensor) -> float:
    """The mean cost of a model's plans from starts (B, d)."""
    problem = CartPolePlan()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return problem.cost(model(x, problem.trajectory.oracle(x)), x).mean().item()


@functools.cache
def rivals() -> dict[str, Tuned]:
    """Solvers that learn nothing, with as many rollouts and with ten times as many."""
    return {
        f"{name}, {which}": tuned(grid)
        for which, sizes in ROLLOUTS.items()
        for name, grid in _grids(CartPolePlan(), sizes).items()
    }


def _grids(problem: CartPolePlan, sizes: Sequence[tuple[int, int]]) -> dict[str, dict[str, Model]]:
    """name -> settings -> a solver."""
    grids: dict[str, dict[str, Model]] = {name: {} for name in ("CEM", "iCEM", "KMPPI", "CEM over support points")}
    horizon, middle = problem.domain.dim, Full(Zeros(problem.domain.dim), problem.domain)
    for steps, samples in sizes:
        elites = max(samples // 20, 5)
        for sigma in SIGMAS:
            about = f"{steps} x {samples}, sigma {sigma}"
            for smoothing in (0.0, 0.2):
                plain = Cem(problem.domain, samples, elites, sigma, smoothing, bounds=Truncated(problem.domain))
                grids["CEM"][f"{about}, smoothing {smoothing}"] = Unroll(middle, plain, steps, problem.domain)
            for colour in COLOURS:
                # one sample of each iteration is the mean
                noisy = Cem(problem.domain, samples - 1, elites, sigma, 0.1, noise=Coloured(horizon, colour))
                grids["iCEM"][f"{about}, colour {colour}"] = Unroll(middle, Icem(noisy, 3), steps, problem.domain)
            for points in POINTS:
                curve, domain = Interpolation(horizon, points), unit_box(points)
                updates: dict[str, Update] = {
                    f"KMPPI, temperature {heat}": Mppi(domain, samples, sigma, heat) for heat in TEMPERATURES
                } | {"CEM over support points": Cem(domain, samples, elites, sigma, bounds=Truncated(domain))}
                for name, update in updates.items():
                    inner = Unroll(Fitted(middle, curve, domain), update, steps, domain)
                    kind, _, more = name.partition(",")
                    grids[kind][f"{about}, {points} points{more}"] = SupportPoints(curve, inner, problem.domain)
    return grids


@torch.no_grad()
def figure(agent: Amortize, count: int = 3) -> Figure:
    """The tutorial's figure 11: f over the latent plans of some starts, the iterates of DCEM there, and their forces."""
    problem, x, model = agent.problem, starts(STARTS, SEED)[:count], agent.model
    assert isinstance(problem, CartPolePlan)
    assert isinstance(model, Latent)
    assert isinstance(model.inner, Unroll)
    domain = model.inner.domain
    search = Unroll(model.inner.init, Cem(domain, 100, 10, selection=SoftTop(0.3)), 10, domain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        path = search.iterates(x, problem.trajectory.oracle(x).through(model.point, x.shape[-1]))  # (K + 1, count, 2)
    reach = 1.2 * max(2.0, path.abs().max().item())
    line = torch.linspace(-reach, reach, 81)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    fig = Figure(figsize=(4 * count, 6.5), layout="constrained")
    above, below = fig.subplots(2, count)
    shades = np.linspace(0.15, 0.9, len(path))
    for i in range(count):
        at = x[i].expand(len(grid), -1)
        cost = problem.cost(model.point(grid, at), at).view(len(line), -1)
        drawn = above[i].contourf(line, line, cost, levels=24)
        fig.colorbar(drawn, ax=above[i])
        above[i].plot(path[:, i, 0], path[:, i, 1], "w.-", linewidth=1)
        above[i].plot(*path[-1, i], "r*", markersize=12)
        angle = torch.atan2(x[i, 3], x[i, 2]).item()
        above[i].set(xlabel="$z_1$", ylabel="$z_2$", title=f"f of a start at {np.degrees(angle):.0f} degrees")
        for shade, z in zip(shades, path[:, i], strict=True):
            force = 100 * model.point(z[None], x[i : i + 1])[0]
            below[i].step(range(len(force)), force, where="post", color=str(1 - shade))
        below[i].step(range(len(force)), force, where="post", color="red")
        below[i].set(xlabel="step", ylabel="force in N", ylim=(-105, 105))
    return fig
