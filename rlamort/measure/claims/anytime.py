"""Return against decision time: refinement by itself should not lose what the policy has, whatever the critic promises.

Everything is measured as by `rlamort gap`, on agents of four seeds. us microseconds per decision, at batch 1
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from rlamort.env.gym import GymEnv
from rlamort.envs.maxq import visit
from rlamort.host.randomness import Randomness
from rlamort.measure.anytime import AUTOMATIC, POLICY, gradient_steps, players, return_against_time
from rlamort.measure.gap import SEED
from rlamort.measure.verdict import Measured, at_least
from rlamort.run.learner import learner_class
from rlamort.score import interval

ENV, STEPS = "Pendulum-v1", 5_000
SEEDS, EPISODES, STATES = (0, 1, 2, 3), 20, 256
DRAWN = (POLICY, *(gradient_steps(k) for k in (1, 2, 5, 10, 20)))


def pendulum_sac() -> Measured:
    """SAC's policies on Pendulum-v1, refined in their critics."""
    return refined("sac")


def pendulum_td3() -> Measured:
    """TD3's policies on Pendulum-v1, refined in their critics."""
    return refined("td3")


def refined(method: str) -> Measured:
    """Train an agent with each seed, and play with its actions refined for different times."""
    data = {str(seed): trained(method, seed) for seed in SEEDS}
    return judged(data, f"{ENV}, {method.upper()} after {STEPS:,} steps")


def trained(method: str, seed: int) -> dict[str, Any]:
    """The data of `return_against_time` for a new agent."""
    print(f"training: {method}, seed {seed}, {STEPS:,} steps", flush=True)
    learner = learner_class(method)(ENV, seed=seed, hidden=(64, 64), batch_size=64, warmup_steps=1_000)
    learner.learn(STEPS)
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


def judged(data: dict[str, Any], name: str) -> Measured:
    """The claim about agents of several seeds, from the data of each."""
    gains = {seed: _gain(one, AUTOMATIC) for seed, one in data.items()}
    doubtful = min(gains, key=lambda seed: gains[seed].high)
    means = ", ".join(f"{one.mean:+.3g}" for one in gains.values())
    claim = (
        f"{name}: return with refine=auto less the policy's, paired over {EPISODES} episodes: upper end of the 95 % interval "
        f"in the worst of {len(data)} seeds; means {means}"
    )
    stem = "anytime_" + name.lower().split(" after")[0].replace(", ", "_").replace("-", "_")
    worse = {
        action: [seed for seed, one in data.items() if _gain(one, action).high < 0] for action in data[doubtful]["returns"]
    }
    figures = {stem: figure(name, data)}
    return Measured([at_least(claim, gains[doubtful].high, 0)], {"seeds": data, "worse in the world": worse}, figures)


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
