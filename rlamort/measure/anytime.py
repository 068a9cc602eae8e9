"""Return against decision time, when actions are refined in the critic before they are played. Part of `rlamort gap RUN`.

x state (B, d) · y action (B, n) · f = -Q · S states
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlamort.agent import Agent
from rlamort.env import Env
from rlamort.measure.report import Report, bounds, by_episode, table
from rlamort.measure.time_to_match import timed
from rlamort.score import Interval, finished, interval, score
from rlamort.update import AUTO, Anytime, Cem, Worth, best

POLICY, AUTOMATIC = "policy", "policy + gradient steps, auto"
GRADIENT, CEM = (1, 2, 5, 10, 20), (1, 2, 5, 10)  # steps, and iterations
SAMPLES, ELITES, SIGMA = 32, 4, 0.3
cem = best(functools.partial(Cem, samples=SAMPLES, elites=ELITES, sigma=SIGMA))


def gradient_steps(count: int) -> str:
    """The name of that many steps."""
    return f"policy + {count} gradient step{'s'[: count - 1]}"


def players(agent: Agent) -> dict[str, Agent]:
    """The agent, and the same with refined actions, by name."""
    refined = {gradient_steps(k): agent.refined(k) for k in GRADIENT}
    refined[AUTOMATIC] = agent.refined(AUTO)
    refined |= {f"policy + {k} x CEM of {SAMPLES}": agent.refined(Anytime(k, update=cem)) for k in CEM}
    return {POLICY: agent, **refined}


class Played(NamedTuple):
    """What refinement promises, costs and gives. Intervals are of differences to the policy."""

    name: str
    microseconds: float  # per decision at batch 1, at its fastest
    promised: Interval  # of Q, over states
    gained: Interval  # of the return, over episodes with the same seeds that failed for neither

    @property
    def worse(self) -> bool:
        """Whether a better action in the critic is a worse one in the world."""
        return self.promised.low > 0 and self.gained.high < 0

    @property
    def better(self) -> bool:
        """Whether it is a better one there, too."""
        return self.promised.low > 0 and self.gained.low > 0


@torch.no_grad()
def return_against_time(
    playing: Mapping[str, Agent], env: Env, x: Tensor, episode: np.ndarray, episodes: int, seed: int
) -> Report:
    """Whole episodes with the same seeds for every player, and the time and the critic's opinion of its actions.

    Args:
        playing: agents by name, of which `POLICY` is the one that the others are compared with.
        env: of `episodes` environments.
        x: states (S, d) in which actions are judged by the critic, and timed one by one.
        episode: of each state (S,).
        episodes: how many.
        seed: of the first.
    """
    policy = playing[POLICY]
    f, contexts = policy.action_cost(), policy.normaliser(x)
    costs = {name: f(agent.act(x, explore=False), contexts).double().numpy(force=True) for name, agent in playing.items()}
    # at the fastest, since a busy machine interrupts what takes longer than a moment
    calls = {name: functools.partial(agent.act, x[:1], explore=False) for name, agent in playing.items()}
    seconds = {name: timed(call, x.device, 0.3, np.min) for name, call in calls.items()}
    returns = {name: score(agent, env, seed).returns for name, agent in playing.items()}
    own = np.array(returns[POLICY])
    found = [
        Played(
            name, 1e6 * seconds[name], by_episode(costs[POLICY] - costs[name], episode),
            interval(finished((np.array(returns[name]) - own).tolist())),
        )
        for name in playing
    ]  # fmt: skip
    rows = [
        [one.name, f"{one.microseconds:.0f}", bounds(interval(finished(returns[one.name]))),
         *(["", ""] if one.name == POLICY else [bounds(one.promised), bounds(one.gained)])]
        for one in found
    ]  # fmt: skip
    head = ["", "us per decision", f"return of {episodes} episodes [95 %]", "Q above the policy's", "return above the policy's"]
    failed = {name: len(played) - len(finished(played)) for name, played in returns.items()}
    lines = [
        *table(head, rows),
        *(f"{name}: {count} of {episodes} episodes failed, and are left out" for name, count in failed.items() if count),
        *verdict([one for one in found if one.name != POLICY], episodes),
    ]
    data: dict[str, Any] = {
        "returns": returns,
        "players": [{**one._asdict(), "promised": one.promised._asdict(), "gained": one.gained._asdict()} for one in found],
        "tolerance": Worth().tolerance, "cem": {"samples": SAMPLES, "elites": ELITES, "sigma": SIGMA},
    }  # fmt: skip
    return Report(lines, data)


def verdict(found: list[Played], episodes: int) -> list[str]:
    """Whether what is better in the critic is better in the world, in plain sentences."""
    if episodes < 2:
        return ["whether a better action in the critic is a better one in the world needs more than one episode: acting=5"]
    lines = [
        f"{one.name}: a better action in the critic is a worse one in the world: Q is higher by {bounds(one.promised)}, "
        f"and the return lower, {bounds(one.gained)}"
        for one in found
        if one.worse
    ]
    better = [one.name for one in found if one.better]
    if better:
        lines.append(f"better in the critic and in the world: {', '.join(better)}")
    rest = sum(one.promised.low > 0 and not one.worse and not one.better for one in found)
    if rest:
        lines.append(f"better in the critic, and no different in the world by {episodes} episodes: {rest} of {len(found)}")
    return lines
