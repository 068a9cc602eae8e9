"""Planners: against closed forms, from hard starts, with other numbers of threads, and beside a bare simulator.

N environments side by side · H actions in a plan · an evaluation: one step of the dynamics, forwards or backwards, of one plan
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import minimize
from torch import Tensor

from rlamort import parts
from rlamort.agent import Player
from rlamort.agents.plan import MPC
from rlamort.config import locate
from rlamort.domain import Box, unit_box
from rlamort.dynamics import Known, Trajectory
from rlamort.env.make import open_env
from rlamort.env.simulate import Simulator
from rlamort.envs.twolink import LENGTH, MASS, SECONDS
from rlamort.measure.claims.clock import least_seconds
from rlamort.measure.verdict import Measured, Verdict, at_least, at_most
from rlamort.model import Expert, Unroll
from rlamort.update import Cem, Coloured, Icem, Ilqr, Update

STARTS = 20
HORIZON = 20
ARMS, ALONE = 1_000, 25  # arms in one batch, and those of them that are planned for one at a time
UPRIGHT, LAST = 0.95, 20  # solved: the pole's cosine is above it in each of the last steps
CARTPOLE = "rlamort.envs.cartpole:CartPole"
ARM = "rlamort.envs.twolink:TwoLink"
TORQUE, DAMPING = 2.0, 0.1  # its defaults
PLANNERS = {"cem": parts.Cem(sigma=0.5), "icem": parts.Icem(), "mppi": parts.Mppi(), "ilqr": parts.Ilqr()}
BUSY = 0.1  # of a core, taken by other processes: with less the machine counts as idle


def linear() -> Measured:
    """iLQR is the Riccati recursion on linear systems with quadratic costs."""
    gaps = {}
    for name, arguments in {"point mass": (), **{f"drawn, seed {seed}": _system(seed) for seed in range(3)}}.items():
        env = locate("rlamort.envs.lqr.Lqr")(*arguments)
        x = 2 * torch.rand(STARTS, len(env.A), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
        high = torch.as_tensor(env.action_space.high, dtype=torch.float64)
        f = Trajectory(Known(env.dynamics, Box(-high, high).double(), name), 30)
        best = env.plan(x, 30) / high[0]
        gaps[name] = (solved(Ilqr(unit_box(best.shape[-1]).double()), f, x, best.shape[-1], 4) - best).abs().max().item()
    claim = "iLQR on LQR, 30 steps: largest difference of an action to the Riccati recursion, of the bound"
    return Measured([at_most(claim, max(gaps.values()), 1e-6)], gaps, {})


def _system(seed: int) -> tuple[np.ndarray, ...]:
    """A, B, Q, R."""
    drawn = np.random.default_rng(seed)
    Q, R = (part @ part.T for part in (drawn.normal(size=(4, 4)), drawn.normal(size=(2, 2))))
    return drawn.normal(0, 0.4, (4, 4)), drawn.normal(0, 1, (4, 2)), Q, R + 0.1 * np.eye(2)


def pendulum() -> Measured:
    """Every planner swings up Pendulum-v1 from each of 20 starts."""
    return swung("Pendulum-v1", 0, 199, 20)


def cartpole() -> Measured:
    """Every planner swings up the cart-pole from each of 20 starts."""
    return swung(CARTPOLE, 2, 99, 30)


def swung(name: str, cosine: int, steps: int, horizon: int) -> Measured:
    """One episode of each planner, less its last step, from each start; `cosine` is the pole's coordinate in x."""
    verdicts, data = [], {}
    for planner, update in PLANNERS.items():
        print(f"playing: {name}, {planner}", flush=True)
        env = open_env(name, count=STARTS)
        env.reset(0)
        player = Player(MPC(env.spec, model=_model(update), horizon=horizon), STARTS)
        total, seen = torch.zeros(STARTS), list[Tensor]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _ in range(steps):
                step = env.step(player(env.x, explore=False))
                total, seen = total + step.reward, [*seen, step.x_next[:, cosine].clone()]
        least = torch.stack(seen[-LAST:]).amin(0)
        claim = f"{name}, {planner}: starts of {STARTS} that end with {LAST} steps of a cosine above {UPRIGHT}"
        verdicts.append(at_least(claim, int((least > UPRIGHT).sum()), STARTS))
        data[planner] = {"least cosine": least.tolist(), "return": total.tolist()}
    return Measured(verdicts, data, {})


def evaluations() -> Measured:
    """iLQR's plans for Pendulum-v1 cost less than those of CEM with ten times its evaluations.

    From zero it ends in the local minimum beside its start; from the best of 64 smooth samples, chosen on other starts, seldom.
    """
    return cheaper("Pendulum-v1")


def arm() -> Measured:
    """iLQR's plans for an arm of two links cost less than those of CEM with ten times its evaluations."""
    return cheaper(ARM)


def cheaper(name: str) -> Measured:
    """iLQR beside CEM with ten times its evaluations, from 20 starts; the starting points of iLQR are those of Pendulum-v1."""
    x, f, n = problems(name, 100, STARTS)
    iterations, d = 10, x.shape[-1]
    domain = unit_box(HORIZON * n).double()
    # of an iteration: the plan, ten step sizes, a forward pass, and backward passes for the states, a slope and curvatures
    samples, drawn, each = 100, 64, 1 + 10 + 1 + d + 1 + d + n
    budget = 10 * (drawn + iterations * each)
    best: dict[str, Update] = {f"sigma {sigma}": Cem(domain, samples, 10, sigma) for sigma in (0.5, 1.0, 2.0)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        costs = {sigma: f(solved(cem, f, x, domain.dim, budget // samples), x) for sigma, cem in best.items()}
    strong = min(costs.values(), key=lambda cost: cost.mean().item())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        smooth = Icem(Cem(domain, drawn, 8, 1.0, noise=Coloured(HORIZON, 4.0)), 1)
        begun = solved(smooth, f, x, domain.dim, 1)
    ours = {
        "zero": f(solved(Ilqr(domain), f, x, domain.dim, iterations), x),
        f"the best of {drawn} samples": f(solved(Ilqr(domain), f, x, domain.dim, iterations, begun), x),
    }
    data = {start: cost.tolist() for start, cost in (costs | ours).items()} | {"evaluations of CEM": budget}
    claim = f"{name}, plans of {HORIZON}: mean cost less that of CEM, tuned, with {budget} evaluations, of iLQR from "
    return Measured([at_most(claim + start, (cost - strong).mean().item(), 0) for start, cost in ours.items()], data, {})


def batched() -> Measured:
    """iLQR plans for 1,000 arms in one batch in a twentieth of the time that others take for one after another.

    SciPy is given f and its gradient by torch; IPOPT has the equations compiled by CasADi, with exact second derivatives.
    They run on some of the arms. iLQR takes as many iterations as it needs to be as good there, on average.
    """
    x, f, n = problems(ARM, 0, ARMS)
    verdicts, data = [], dict[str, Any]()
    domain = unit_box(HORIZON * n).double()
    zero = torch.zeros(ARMS, domain.dim, dtype=torch.float64)
    with torch.no_grad():
        path = Unroll(Expert(lambda x: zero), Ilqr(domain), 40, domain).iterates(x, f.oracle(x))[:, :ALONE]
        costs = f.oracle(x[:ALONE]).values(path).mean(-1)  # by iterations
    rivals: dict[str, Callable[[Tensor], tuple[float, float]]] = {
        "SciPy's L-BFGS-B": functools.partial(alone, "L-BFGS-B", f, domain.dim),
        "SciPy's SLSQP": functools.partial(alone, "SLSQP", f, domain.dim),
        "IPOPT": by_ipopt,
    }
    for method, plan in rivals.items():
        theirs, found = plan(x[:ALONE])
        enough = next((k for k, cost in enumerate(costs.tolist()) if cost <= found), None)
        data[method] = {"mean cost": found, "seconds of one": theirs, "iterations of iLQR": enough}
        ours = math.inf
        if enough is not None:
            ours = least_seconds(functools.partial(solved, Ilqr(domain), f, x, domain.dim, enough), 3)
        data[method]["seconds of the batch"] = ours
        claim = f"two-link arm, plans of {HORIZON} within bounds: time of {method} for {ARMS}, one at a time, over iLQR's"
        verdicts.append(at_least(claim, theirs * ARMS / ours, 20, "x"))
    return Measured(verdicts, data | {"mean cost of iLQR by iterations": costs.tolist()}, {})


def alone(method: str, f: Trajectory, dim: int, x: Tensor) -> tuple[float, float]:
    """Seconds that a method of scipy.optimize takes for a plan (dim,) from one of the starts (B, d), and its mean cost."""

    def cost(plan: np.ndarray, start: Tensor) -> tuple[float, np.ndarray]:
        value, slope = f.oracle(start).value_and_grad(torch.from_numpy(plan)[None])
        return value.item(), slope[0].detach().numpy()

    begun, found = time.perf_counter(), []
    for one in x:
        bounds, options = [(-1, 1)] * dim, {"maxiter": 500}
        found.append(minimize(cost, np.zeros(dim), one[None], method, jac=True, bounds=bounds, options=options).fun)
    return (time.perf_counter() - begun) / len(x), float(np.mean(found))


def by_ipopt(x: Tensor) -> tuple[float, float]:
    """The same by IPOPT, with the states as variables beside the torques (multiple shooting), from rest at the start."""
    import casadi  # an extra

    start = casadi.SX.sym("x", 6)
    q, w, actions, states, gaps, total = start[:2], start[2:4], [], [], [], 0
    for _ in range(HORIZON):
        actions.append(casadi.SX.sym("u", 2))
        states.append(casadi.SX.sym("s", 4))
        q, w, cost = _arm(casadi, q, w, TORQUE * actions[-1], start[4:])
        gaps.append(casadi.vertcat(q, w) - states[-1])
        q, w, total = states[-1][:2], states[-1][2:], total + cost
    program: dict[str, Any] = {"x": casadi.vertcat(*actions, *states), "p": start, "f": total, "g": casadi.vertcat(*gaps)}
    quiet: dict[str, Any] = {"print_time": False, "ipopt.print_level": 0, "ipopt.sb": "yes"}
    solver = casadi.nlpsol("solver", "ipopt", program, quiet)
    high, costs = np.concatenate([np.ones(2 * HORIZON), np.full(4 * HORIZON, np.inf)]), []
    begun = time.perf_counter()
    for one in x.numpy():
        guess = np.concatenate([np.zeros(2 * HORIZON), np.tile(one[:4], HORIZON)])
        costs.append(float(solver(x0=guess, p=one, lbx=-high, ubx=high, lbg=0, ubg=0)["f"]))
    return (time.perf_counter() - begun) / len(x), float(np.mean(costs))


def _arm(casadi: Any, q: Any, w: Any, u: Any, target: Any) -> tuple[Any, Any, Any]:
    """The equations of `rlamort.envs.twolink` in CasADi's symbols: angles, velocities, and the cost of a step."""
    (first, second), (upper, lower) = LENGTH, MASS
    hand = first * casadi.vertcat(casadi.cos(q[0]), casadi.sin(q[0]))
    hand += second * casadi.vertcat(casadi.cos(q[0] + q[1]), casadi.sin(q[0] + q[1]))
    cost = casadi.sumsqr(hand - target) + 0.01 * casadi.sumsqr(w) + 0.001 * casadi.sumsqr(u)
    reach, c = lower * first * second / 2, lower * second**2 / 3
    a = upper * first**2 / 3 + lower * first**2 + c + 2 * reach * casadi.cos(q[1])
    b, pull, free = c + reach * casadi.cos(q[1]), reach * casadi.sin(q[1]), u - DAMPING * w
    left, right = free[0] + pull * w[1] * (2 * w[0] + w[1]), free[1] - pull * w[0] ** 2
    w = w + SECONDS * casadi.vertcat(c * left - b * right, a * right - b * left) / (a * c - b * b)
    return q + SECONDS * w, w, cost


def problems(name: str, seed: int, count: int) -> tuple[Tensor, Trajectory, int]:
    """First states (count, d) of an environment in float64, minus the return of plans from them, and n, by its equations."""
    env = open_env(name, count=count)
    x = env.reset(seed).double()
    assert env.spec.equations is not None
    actions = Box(env.spec.low, env.spec.high).double()
    return x, Trajectory(Known(env.spec.equations, actions, "own"), HORIZON), actions.dim


def threads() -> Measured:
    """A planner through MuJoCo takes the same actions with one thread and with two, bit for bit."""
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            env, agent = simulated("HalfCheetah-v5", 3, 10)
            env.reset(0)
            player, actions = Player(agent, 3), []
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for _ in range(20):
                    actions.append(player(env.x, explore=False))
                    env.step(actions[-1])
            found.append(torch.stack(actions))
    finally:
        torch.set_num_threads(before)
    differing = int((found[0] != found[1]).any(-1).sum())
    claim = f"HalfCheetah-v5, actions of {len(found[0]) * 3} that differ between 1 and 2 threads"
    return Measured([at_most(claim, differing, 0)], {"actions": found[0].tolist()}, {})


def returns() -> Measured:
    """iCEM through MuJoCo returns 1,000 in 200 steps of HalfCheetah-v5."""
    seeds, started = (0, 1, 2), time.perf_counter()
    total = _total(*simulated("HalfCheetah-v5", len(seeds), 30), 200)
    seconds = (time.perf_counter() - started) / 200 / len(seeds)
    claim = f"HalfCheetah-v5, 200 steps of iCEM, {1e3 * seconds:.0f} ms a step of one: least return of seeds {seeds}"
    return Measured([at_least(claim, total.min().item(), 1_000)], {"returns": total.tolist(), "seconds a step": seconds}, {})


def evaluated() -> Measured:
    """iCEM returns more than plain CEM with as many evaluations of plans, in 100 steps of HalfCheetah-v5."""
    seeds, returns, plans = (0, 1, 2), dict[str, list[float]](), dict[str, float]()
    for name, update in {
        "cem": parts.Cem(42, 8, 0.5), "cem, coloured": parts.Cem(42, 8, 0.5, colour=0.25), "icem": parts.Icem(46, colour=0.25)
    }.items():  # fmt: skip
        print(f"playing: HalfCheetah-v5, {name}", flush=True)
        env, agent = simulated("HalfCheetah-v5", len(seeds), 30, _model(update))
        asked, follow = list[int](), agent.f.dynamics.follow

        def counted(x: Tensor, y: Sequence[Tensor], asked: list[int] = asked, follow: Any = follow) -> Any:
            asked.append(len(x))
            return follow(x, y)

        agent.f.dynamics.follow = counted  # type: ignore[method-assign, assignment]
        returns[name] = _total(env, agent, 100).tolist()
        plans[name] = sum(asked) / 100 / len(seeds)
    own, mean, verdicts = plans.pop("icem"), float(np.mean(returns["icem"])), []
    for name, count in plans.items():
        assert own <= count
        claim = f"HalfCheetah-v5, 100 steps: mean return of iCEM, {own:.0f} plans a step, less that of {name}, {count:.0f}"
        verdicts.append(at_least(claim, mean - float(np.mean(returns[name])), 0))
    return Measured(verdicts, {"returns": returns, "plans a step": {**plans, "icem": own}}, {})


def _total(env: Any, agent: MPC, steps: int) -> Tensor:
    """The return (N,) of the first steps from seeds 0, 1, ..."""
    env.reset(0)
    player, total = Player(agent, env.count), torch.zeros(env.count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(steps):
            total += env.step(player(env.x, explore=False)).reward
    return total


def throughput() -> Measured:
    """Planning through MuJoCo reaches 0.9 of the throughput of bare mujoco.rollout calls from the same states and controls.

    They take turns, and the median of the rounds' ratios counts.
    """
    samples, horizon, verdicts, data = 128, 30, [], {}
    for name in ("HalfCheetah-v5", "Hopper-v5", "Ant-v5"):
        print(f"timing: {name}", flush=True)
        env, agent = simulated(name, 1, horizon, parts.Unroll(parts.Previous(), parts.Cem(samples, 8, 0.5), 5))
        env.reset(0)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            (ours, theirs), others = _alternating(_planning_and_bare(agent, env.x), 15)
        claim = f"{name}, {samples} samples of {horizon} steps: throughput of planning, of bare mujoco.rollout calls"
        verdict = at_least(claim, float(np.median(np.divide(theirs, ours))), 0.9)
        if others > BUSY:
            missing = f"an idle machine: others took {others:.2f} cores meanwhile"
            verdict = Verdict(claim, verdict.measured, verdict.threshold, False, missing=missing)
        verdicts.append(verdict)
        data[name] = {"planning": ours, "bare": theirs, "cores of others": others}
    return Measured(verdicts, data, {})


def _planning_and_bare(agent: MPC, x: Tensor) -> list[Callable[[], Any]]:
    """Two functions: a decision of a planner, always the same, and the same rollouts without it."""
    from mujoco import MjData
    from mujoco.rollout import Rollout

    assert isinstance(agent.f.dynamics, Simulator)
    physics, h, calls = agent.f.dynamics.physics, agent.start(len(x)), list[tuple[np.ndarray, ...]]()
    roll, model = physics.roll, physics.task.env.model  # without sensors
    data = [MjData(model) for _ in range(torch.get_num_threads())]
    rollout = Rollout(nthread=len(data))

    def decide() -> None:
        torch.manual_seed(0)
        agent.play(x, h, False)

    def recorded(at: np.ndarray, warm: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        calls.append((at, warm, control))
        return roll(at, warm, control)

    def bare() -> None:
        for at, warm, control in calls:
            rollout.rollout(model, data, at, control, nstep=control.shape[1], initial_warmstart=warm)

    physics.roll = recorded  # type: ignore[method-assign]
    decide()
    physics.roll = roll  # type: ignore[method-assign]
    return [decide, bare]


def _alternating(calls: list[Callable[[], Any]], repeats: int) -> tuple[list[list[float]], float]:
    """Seconds of every round of each call, taken in turns after a first one, and the cores that others took meanwhile."""
    process = psutil.Process()
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    started, own, all_of_them = time.perf_counter(), _seconds(process.cpu_times()), _seconds(psutil.cpu_times())
    for _ in range(repeats):
        for call, times in zip(calls, taken, strict=True):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    busy = _seconds(psutil.cpu_times()) - all_of_them - (_seconds(process.cpu_times()) - own)
    return taken, max(0.0, busy / (time.perf_counter() - started))


def _seconds(times: Any) -> float:
    return float(times.user + times.system)


def simulated(name: str, count: int, horizon: int, model: parts.Model | None = None) -> tuple[Any, MPC]:
    """An environment side by side, and a planner through its MuJoCo model; by default iCEM."""
    env = open_env(name, count=count)
    model = model or _model(parts.Icem(samples=64, colour=0.25))
    return env, MPC(env.spec, model=model, dynamics=parts.Simulator(), horizon=horizon)


def _model(update: parts.Update) -> parts.Model:
    return parts.Unroll(parts.Previous(), update, 3, keep_best=True)


@torch.no_grad()
def solved(update: Update, f: Trajectory, x: Tensor, dim: int, iterations: int, begin: Tensor | None = None) -> Tensor:
    """x (B, d) -> the best plan (B, H n) after iterations from a plan (B, H n), by default from zero."""
    domain = unit_box(dim).double()
    start = Expert(lambda x: x.new_zeros(len(x), dim) if begin is None else begin)
    found: Tensor = Unroll(start, update, iterations, domain, keep_best=True)(x, f.oracle(x))
    return found
