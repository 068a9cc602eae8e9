"""The amortization gap of a trained policy: by its own critic, and in rollouts. `rlamort gap RUN`.

x state (B, d) · y action (B, n) in [-1, 1]^n · f = -Q · gap = f(policy) - f(best), in units of Q: discounted return · S states
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from rlamort.agent import Agent
from rlamort.domain import unit_box
from rlamort.env import Policy, Spec
from rlamort.env.bandit import Bandit
from rlamort.env.gym import GymEnv
from rlamort.env.make import open_gym
from rlamort.env.record import name_of
from rlamort.env.simulate import EnvSimulator, RolloutSimulator, Saved, save
from rlamort.envs.maxq import MaxQProblem, Visited, visit
from rlamort.errors import UserError
from rlamort.host.randomness import Randomness
from rlamort.measure.anytime import gradient_steps, players, return_against_time
from rlamort.measure.report import Report, bounds, by_episode, table
from rlamort.measure.time_to_match import PATIENCE, time_to_match, tutorial
from rlamort.objective import Cost, Objective
from rlamort.run.learner import Learner
from rlamort.run.restore import load
from rlamort.score import Interval
from rlamort.solve.classical import Reference, best_found, extended
from rlamort.update import LineSearch

SEED = 2_000_000  # of the measured episodes, distinct from those of evaluations and training
TRAINING = 3_000_000  # of the episodes whose states are for training
REFINEMENTS = 5
STARTS, ITERATIONS = 8, 20  # of the search at every step of an episode
SEARCHED = f"{STARTS} starts x {ITERATIONS} gradient steps"
NOTABLE = 1e-3  # relative to the zero action's gap: smaller gaps are rounding


def max_q(run: str, env: Any = None, episodes: int = 8, held_out: int = 2) -> tuple[MaxQProblem, MaxQProblem]:
    """The max-Q problem of a run over states for training, and over those of held-out episodes.

    Args:
        run: a run directory, or `sb3:model.zip`.
        env: the environment; None takes the training environment.
        episodes: number of episodes.
        held_out: how many of these are held out.

    Raises:
        UserError: there is no such run, it has no critic of actions, or its environment is not known.
    """
    learner = load(run, env)
    agent = learner.agent
    agent.action_cost()  # there must be one, before anything is played
    print(f"playing: {episodes} episodes of {run}, for the states in them", flush=True)
    with _Place(learner) as place, Randomness(0, learner.device)():
        visited = visit(place.policy, place.open(episodes), TRAINING)
    training, testing = visited.split(held_out)
    return MaxQProblem(agent, training.x), MaxQProblem(agent, testing.x)


class _Place:
    """Opens environments for a learner's policy, and closes them at the end."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.env = learner, learner.environments.find("env")
        if self.env is None:
            raise UserError("env: this agent was loaded without one; pass one")
        if isinstance(self.env, VectorEnv):
            raise UserError("env: as many environments as there are states are needed; pass a single one, not a vector")
        self.opened: list[GymEnv] = []

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *error: Any) -> None:
        for env in self.opened:
            env.close()

    def open(self, count: int) -> GymEnv:
        env = self.learner.environments.another(count)
        if isinstance(env, Bandit):  # states are saved and put back by what stands around Gymnasium's environments
            env = open_gym(env.inner.problem, count=count, device=env.device)
        assert isinstance(env, GymEnv)
        self.opened.append(env)
        return env

    @torch.no_grad()
    def policy(self, x: Tensor) -> Tensor:
        """The action without exploration."""
        return self.learner.agent.act(x, explore=False)


@torch.no_grad()
def refine(f: Objective, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """`steps` of a `LineSearch` on [-1, 1]^n from y (B, n), so f never increases."""
    oracle, update = f.oracle(x), LineSearch(unit_box(y.shape[1]))
    h = update.start(y, x, oracle)
    for _ in range(steps):
        y, h = update(y, h, x, oracle)
    return y


def search(f: Objective, x: Tensor, y: Tensor, starts: int = STARTS, steps: int = ITERATIONS) -> Tensor:
    """The best (B, n) of `refine` from y (B, n), the zero action, and fixed points."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(starts - 2, y.shape[1], generator=generator, dtype=torch.float64).to(y) * 2 - 1
    first = torch.stack([y, torch.zeros_like(y), *(point.expand_as(y) for point in points)])  # (starts, B, n)
    many = x.repeat(starts, 1)
    found = refine(f, many, first.flatten(0, 1), steps)
    cost = f(found, many).detach().view(starts, -1)
    return found.view(starts, *y.shape)[cost.argmin(0), torch.arange(len(y), device=y.device)]


class Gap(NamedTuple):
    """f(y) - f(best) over states, in units of Q."""

    mean: Interval  # bounds by a bootstrap over whole episodes, since states in one are correlated
    p99: float
    largest: float
    share: float  # relative to the gap of the zero action

    @classmethod
    def of(cls, gap: np.ndarray, zero: float, episode: np.ndarray) -> "Gap":
        """From each state's gap (S,), the zero action's mean gap, and the episode of each state (S,)."""
        share = float(gap.mean()) / zero if zero > 0 else float("nan")
        return cls(by_episode(gap, episode), float(np.quantile(gap, 0.99)), float(gap.max()), share)


def gap(
    run: str,
    env: Any = None,
    *,
    episodes: int = 8,
    states: int = 256,
    resimulated: int = 256,
    horizon: int = 200,
    acting: int = 5,
    patience: int = PATIENCE,
) -> Report:
    """The difference between a trained policy and the best action in each state, by its critic and in rollouts.

    Args:
        run: a run directory, or `sb3:model.zip`.
        env: the environment; None takes the training environment.
        episodes: episodes without exploration, with their own seeds, from which states are taken.
        states: number of states that are measured by the critic.
        resimulated: number of those that rollouts start from.
        horizon: length of a rollout in steps.
        acting: episodes with the policy, with its actions refined for different times, and with a search; 0 for none.
        patience: most iterations of a timed solver.

    Raises:
        UserError: there is no such run, it has no critic of actions, or its environment is not known.
    """
    least = {"episodes": (episodes, 1), "states": (states, 1), "resimulated": (resimulated, 0), "horizon": (horizon, 1)}
    for name, (value, low) in (least | {"acting": (acting, 0), "patience": (patience, 8)}).items():
        if not isinstance(value, int) or value < low:
            raise UserError(f"{name}: {value} is given; a whole number of at least {low} is needed")
    learner = load(run, env)
    agent = learner.agent
    agent.action_cost()  # there must be one, before anything is played
    with _Place(learner) as place, Randomness(0, learner.device)():
        print(f"playing: {episodes} episodes, for the states in them", flush=True)
        met = visit(place.policy, place.open(episodes), SEED)
        chosen = met.at(_spread(met.episode, states))
        problem = MaxQProblem(agent, chosen.x)
        print(f"solving and timing: {len(chosen.x)} states, by the critic", flush=True)
        critic = in_critic(problem, place.policy, chosen, patience)
        data: dict[str, Any] = {"run": str(run), "env": name_of(place.env), "critic": critic.data}
        lines = [
            f"{run} in {name_of(place.env)}: {len(chosen.x)} states of {episodes} episodes, without exploration",
            "", "In its own critic", *critic.lines,
        ]  # fmt: skip
        if resimulated:
            part = _spread(chosen.episode, resimulated)
            print(f"re-simulating: {len(part)} states, {horizon} steps each", flush=True)
            played = in_environment(place, critic, chosen, part, horizon, float(learner.config.values["discount"]))
            data["environment"] = played.data
            lines += ["", "Re-simulated in the environment", *played.lines]
        if acting:
            print(f"playing: {acting} episodes with each kind of action", flush=True)
            acted = in_play(problem, place, chosen, acting)
            data["acting"] = acted.data
            lines += ["", "Acting with each", *acted.lines]
    return Report(lines, data)


def _spread(episode: np.ndarray, count: int) -> np.ndarray:
    """Indices of about `count` states, equally many of each episode, at random, sorted."""
    generator, groups = np.random.default_rng(0), [np.flatnonzero(episode == e) for e in np.unique(episode)]
    each = max(1, count // len(groups))
    return np.concatenate([np.sort(generator.choice(group, min(each, len(group)), replace=False)) for group in groups])


class InCritic(NamedTuple):
    """Actions and their costs by the critic."""

    lines: list[str]
    data: dict[str, Any]
    actions: dict[str, Tensor]  # (S, n): of the policy, refined, best
    costs: dict[str, np.ndarray]  # (S,), of the same


@torch.no_grad()
def in_critic(problem: MaxQProblem, policy: Policy, met: Visited, patience: int = PATIENCE) -> InCritic:
    """The gap of `policy` by the critic of `problem` on visited states, and the time of solvers to match it."""
    f, domain, x = Cost(problem), problem.domain, met.x
    y = policy(x).detach()
    blind = best_found(f, domain, x)  # it does not start from the policy's actions, so it may be worse
    actions = {
        "policy": y,
        "refined": refine(f, x, y, REFINEMENTS),
        "search": search(f, x, y),
        "zero": torch.zeros_like(y),
        "best": blind.y,
    }
    for action in list(actions.values()):
        better = extended(f, domain, action, x) < f(actions["best"], x)
        actions["best"] = torch.where(better.unsqueeze(-1), action, actions["best"])
    costs = {name: f(action, x).detach().double().numpy(force=True) for name, action in actions.items()}
    zero = float((costs["zero"] - costs["best"]).mean())
    gaps = {name: Gap.of(cost - costs["best"], zero, met.episode) for name, cost in costs.items()}
    unclipped = costs["policy"] - blind.cost.double().numpy(force=True)
    ahead = float((unclipped < -NOTABLE * zero).mean())
    removed = 1 - gaps["refined"].mean.mean / gaps["policy"].mean.mean if gaps["policy"].mean.mean > 0 else float("nan")
    clock, taught = time_to_match(f, domain, x, policy, costs, patience), tutorial(f, x, policy, costs)
    names = {
        "policy": "policy", "refined": gradient_steps(REFINEMENTS),
        "search": SEARCHED, "zero": "zero action",
    }  # fmt: skip
    rows = [
        [title, _number(costs[key].mean()), bounds(gaps[key].mean), _number(gaps[key].p99), f"{100 * gaps[key].share:.2f} %"]
        for key, title in names.items()
    ]
    rows.insert(0, [_label(blind), _number(costs["best"].mean()), "0", "0", "0 %"])
    lines = [
        *table(["", "f = -Q, mean", "gap, mean [95 %]", "gap, p99", "of the zero action's"], rows),
        f"unclipped, to a reference that does not know the policy: mean {_number(unclipped.mean())}; "
        f"the policy is the better one, by {100 * NOTABLE:g} % of the zero action's gap, in {100 * ahead:.1f} % of states",
        f"agreement: {100 * blind.agreement:.0f} % of the reference's starts end within 0.1 % of their state's best",
        f"{REFINEMENTS} gradient steps remove {100 * removed:.0f} % of the policy's gap",
        *blind.messages,
        *clock.lines,
        *taught.lines,
    ]
    data = {
        "gaps": {name: value._asdict() for name, value in gaps.items()}, "zero": zero, "removed": removed,
        "unclipped": {"mean": float(unclipped.mean()), "policy_ahead": ahead},
        "agreement": blind.agreement, "states": len(x), **clock.data, "tutorial": taught.data,
    }  # fmt: skip
    return InCritic(lines, data, actions, costs)


def in_environment(place: _Place, critic: InCritic, met: Visited, part: np.ndarray, horizon: int, discount: float) -> Report:
    """The same actions in the environment: rollouts from restored states, which begin with an action and follow the policy.

    Args:
        place: opens environments.
        critic: the actions, and their costs by the critic.
        met: the states in which they were found.
        part: indices of those that are re-simulated.
        horizon: steps, counting the first.
        discount: gamma.
    """
    episode, times = met.episode[part], met.time[part]
    which = torch.from_numpy(part).to(met.x.device)
    played = {name: critic.actions[name][which] for name in ("policy", "refined", "best")}
    try:
        saved = save(place.policy, place.open(int(met.episode.max()) + 1), SEED, episode, times)
        returns, how = _played(place, saved, played, horizon, discount)
    except UserError as error:
        return Report([str(error)], {"absent": str(error)})
    kept = np.isfinite(np.stack([*returns.values()])).all(0)  # the same states for all actions
    failed = f"{np.count_nonzero(~kept)} of {len(kept)} states are left out: the environment failed in a rollout from there"
    if not kept.any():
        return Report([failed], {"absent": failed})
    part, episode, returns = part[kept], episode[kept], {name: total[kept] for name, total in returns.items()}
    lines, data = [], {"by": how, "states": len(part), "horizon": horizon, "discount": discount}
    rows = []
    for name, title in (("refined", f"policy + {REFINEMENTS} gradient steps"), ("best", "critic's best action")):
        gained = returns[name] - returns["policy"]
        promised = (critic.costs["policy"] - critic.costs[name])[part]
        promise, gain = by_episode(promised, episode), by_episode(gained, episode)
        better = float((gained > 0).mean())
        rows.append([title, bounds(promise), bounds(gain), f"{100 * better:.0f} %"])
        data[name] = {"promised": promise._asdict(), "gained": gain._asdict(), "better": better}
    lines = [
        f"{len(part)} restored states ({how}): one action, then the policy; {horizon} steps, or what is left of the "
        f"episode, discounted by {discount:g}",
        *table(
            ["more than the policy's action", "the critic promises [95 %]", "the environment gives [95 %]", "better in"], rows
        ),
        f"the policy's own: {bounds(by_episode(returns['policy'], episode))}",
        *([] if kept.all() else [failed]),
    ]
    return Report(lines, data)


def _played(
    place: _Place, saved: Saved, actions: dict[str, Tensor], horizon: int, discount: float
) -> tuple[dict[str, np.ndarray], str]:
    """Returns of each set of actions, and the simulator: `mujoco.rollout` where it is equivalent."""
    try:
        rolled = RolloutSimulator(place.open(1), saved)
    except UserError:
        stepped = EnvSimulator(place.open(len(saved.rows)), saved)
        return {name: stepped.returns(y, place.policy, horizon, discount) for name, y in actions.items()}, "stepped"
    with rolled:
        return {name: rolled.returns(y, place.policy, horizon, discount) for name, y in actions.items()}, "mujoco.rollout"


class _Acting(Agent):
    """A policy as an agent, for `score`."""

    def __init__(self, spec: Spec, policy: Policy) -> None:
        super().__init__(spec, normalise=False)
        self.policy = policy

    def act(self, x: Tensor, explore: bool) -> Tensor:
        return self.policy(x)


def in_play(problem: MaxQProblem, place: _Place, met: Visited, episodes: int) -> Report:
    """Return against decision time: the policy's actions, refined ones, and those of a search at every step."""
    f, env = Cost(problem), place.open(episodes)
    searching = _Acting(env.spec, lambda x: search(f, x, place.policy(x)))
    return return_against_time({**players(place.learner.agent), SEARCHED: searching}, env, met.x, met.episode, episodes, SEED)


def _label(reference: Reference) -> str:
    return f"reference ({reference.label})"


def _number(value: float) -> str:
    return f"{value:.4g}"
