"""Return against decision time: refinement by itself should not lose what the policy has, whatever the critic promises.

Everything is measured as by `rlamort gap`, on agents of four seeds: on some that have learned the task, and on some that have
not, where there is little to lose. us microseconds per decision, at batch 1
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from rlamort.env.gym import GymEnv
from rlamort.env.make import open_env
from rlamort.envs.maxq import visit
from rlamort.host.randomness import Randomness
from rlamort.measure.anytime import AUTOMATIC, POLICY, gradient_steps, players, return_against_time
from rlamort.measure.gap import SEED
from rlamort.measure.imitation import Uniform
from rlamort.measure.verdict import Measured, at_least
from rlamort.run.learner import learner_class
from rlamort.score import interval, score

ENV = "Pendulum-v1"
LEARNED = 10_000, {"learning_rate": 1e-3}  # steps and keys: returns of about -110, where random actions have -1,127
EARLY = 5_000, dict[str, float]()
SEEDS, EPISODES, STATES = (0, 1, 2, 3), 20, 256
DRAWN = (POLICY, *(gradient_steps(k) for k in (1, 2, 5, 10, 20)))


def learned_sac() -> Measured:
    """SAC's policies on Pendulum-v1 that have learned the task, refined in their critics."""
    return refined("sac", *LEARNED)


def learned_td3() -> Measured:
    """TD3's policies on Pendulum-v1 that have learned the task, refined in their critics."""
    return refined("td3", *LEARNED)


def early_sac() -> Measured:
    """SAC's policies on Pendulum-v1 after 5,000 steps, refined in their critics."""
    return refined("sac", *EARLY)


def early_td3() -> Measured:
    """TD3's policies on Pendulum-v1 after 5,000 steps, refined in their critics."""
    return refined("td3", *EARLY)


def refined(method: str, steps: int, fields: Mapping[str, float]) -> Measured:
    """Train an agent with each seed, and play with its actions refined for different times."""
    data = {str(seed): trained(method, steps, fields, seed) for seed in SEEDS}
    return judged(data, random_returns(), f"{ENV}, {method.upper()} after {steps:,} steps")


def random_returns() -> list[float]:
    """Returns of uniformly random actions in the same episodes."""
    env = open_env(ENV, count=EPISODES)
    found = score(Uniform(env.spec, normalise=False), env, SEED).returns
    env.close()
    return found


def trained(method: str, steps: int, fields: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The data of `return_against_time` for a new agent."""
    print(f"training: {method}, seed {seed}, {steps:,} steps", flush=True)
    learner = learner_class(method)(ENV, seed=seed, hidden=(64, 64), batch_size=64, warmup_steps=1_000, **fields)
    learner.learn(steps)
    with Randomness(0, learner.device)():
        env = learner.environments.another(EPISODES)
        assert isinstance(env, GymEnv)
        with torch.no_grad():
            met = visit(lambda x: learner.agent.act(x, explore=False), env, SEED)
        chosen = met.at(np.linspace(0, len(met.x) - 1, STATES).round().astype(int))
        report = return_against_time(players(learner.agent), env, chosen.x, chosen.episode, EPISODES, SEED)
    env.close()
    learner.close()
    return report.data


def judged(data: dict[str, Any], random: Sequence[float], name: str) -> Measured:
    """The claim about agents of several seeds, from the data of each. Policies no better than random have nothing to lose."""
    gains = {seed: _gain(one, AUTOMATIC) for seed, one in data.items()}
    doubtful = min(gains, key=lambda seed: gains[seed].high)
    own = [float(np.mean(one["returns"][POLICY])) for one in data.values()]
    means, unrefined = ", ".join(f"{one.mean:+.3g}" for one in gains.values()), ", ".join(f"{one:.4g}" for one in own)
    claim = (
        f"{name}: return with refine=auto less the policy's, paired over {EPISODES} episodes: upper end of the 95 % interval "
        f"in the worst of {len(data)} seeds; means {means}; unrefined the policies return {unrefined}, random actions "
        f"{np.mean(random):.4g}"
    )
    verdict = at_least(claim, gains[doubtful].high, 0)
    if verdict.passed and min(own) <= np.mean(random):
        verdict = replace(verdict, passed=False, missing="policies that are better than random actions")
    stem = "anytime_" + re.sub(r"\W+", "_", name.lower().replace(",", "").removesuffix(" steps").replace(" after", ""))
    worse = {
        action: [seed for seed, one in data.items() if _gain(one, action).high < 0] for action in data[doubtful]["returns"]
    }
    found = {"seeds": data, "random": list(random), "worse in the world": worse}
    return Measured([verdict], found, {stem: figure(name, data)})


def _gain(data: dict[str, Any], action: str) -> Any:
    returns = data["returns"]
    return interval([value - own for value, own in zip(returns[action], returns[POLICY], strict=True)])


def figure(name: str, data: dict[str, Any]) -> Figure:
    """Return against microseconds per decision, a line for each seed: 0, 1, 2, 5, 10, 20 gradient steps."""
    drawn = Figure(figsize=(5, 3.5), layout="constrained")
    axes = drawn.subplots()
    for seed, one in data.items():
        times = {player["name"]: player["microseconds"] for player in one["players"]}
        ends = [interval(one["returns"][action]) for action in DRAWN]
        x = [times[action] for action in DRAWN]
        (line,) = axes.plot(x, [end.mean for end in ends], marker=".", label=f"seed {seed}")
        axes.fill_between(x, [end.low for end in ends], [end.high for end in ends], color=line.get_color(), alpha=0.1, lw=0)
        auto = interval(one["returns"][AUTOMATIC])
        axes.plot(times[AUTOMATIC], auto.mean, marker="*", color=line.get_color(), ls="")
    axes.set(xscale="log", xlabel="us per decision; a star is refine=auto", ylabel="return", title=name)
    axes.legend()
    return drawn
