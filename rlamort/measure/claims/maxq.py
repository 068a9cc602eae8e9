"""Policies as amortization models: the time of solvers to match a policy by its own frozen critic, and the returns of both.

x state (B, d) · y action (B, n) in [-1, 1]^n · f = -Q · gap = f(y) - f(best), as a share of the zero action's gap unless said

Everything is measured by `rlamort gap`, on states of episodes whose seeds no training and no evaluation has.
"""

import tempfile
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from rlamort.measure.anytime import POLICY, gradient_steps
from rlamort.measure.gap import REFINEMENTS, SEARCHED, gap
from rlamort.measure.time_to_match import FROM, PATIENCE, WANTED, settings
from rlamort.measure.verdict import Measured, Verdict, at_least
from rlamort.run.learner import learner_class
from rlamort.score import Interval, interval

PENDULUM = {"env": "Pendulum-v1", "steps": 10_000}
CHEETAH = {"env": "HalfCheetah-v5", "steps": 50_000}  # as in the learning study; all four take a quarter of an hour
STATES = 128  # held out, on which all is measured
NAMED = ("Adam", "L-BFGS", "CEM")  # the solvers that the claim names; projected gradient is reported beside them
NOBODY = {"setting": "none", "starts": 0, "iterations": 0, "seconds": float("nan"), "times": float("nan")}


def pendulum_sac() -> Measured:
    """SAC's critic and policy on Pendulum-v1."""
    return trained("sac", PENDULUM)


def pendulum_td3() -> Measured:
    """TD3's critic and policy on Pendulum-v1."""
    return trained("td3", PENDULUM, learning_rate=1e-3)


def cheetah_sac() -> Measured:
    """SAC's critic and policy on HalfCheetah-v5."""
    return trained("sac", CHEETAH)


def cheetah_td3() -> Measured:
    """TD3's critic and policy on HalfCheetah-v5."""
    return trained("td3", CHEETAH)


def trained(method: str, on: Mapping[str, Any], **fields: Any) -> Measured:
    """Train an agent with seed 0, and measure it."""
    learner = learner_class(method)(on["env"], seed=0, compile=True, **fields)
    learner.learn(on["steps"])
    with tempfile.TemporaryDirectory() as folder:
        learner.save(folder)
        learner.close()
        data = gap(folder, states=STATES, resimulated=STATES).data
    return judged(data, f"{on['env']}, {method.upper()} after {on['steps']:,} steps")


def judged(data: dict[str, Any], name: str) -> Measured:
    """Claims about an agent, from the results of `gap`."""
    critic, effect = data["critic"], follows(name, data)
    lost = critic["unclipped"]["mean"]  # to a reference that does not know the policy, so it may be negative
    verdicts = [
        at_least(
            f"{name}: the policy's gap in its critic, unclipped, on {critic['states']} held-out states: {lost:.3g}, or "
            f"{100 * lost / critic['zero']:.2g} % of the zero action's; share that {REFINEMENTS} gradient steps remove",
            critic["removed"],
            0.5,
        ),
        speed(name, critic),
    ]
    stem = "maxq_" + "_".join(name.lower().replace(",", "").replace("-", "_").split()[:2])
    return Measured(verdicts, data | {"whether the return follows": effect}, {stem: figure(name, critic)})


def speed(name: str, critic: Mapping[str, Any]) -> Verdict:
    """The speed at the batch of all states, as in the tutorial's figure; with a single state and equal quality beside it.

    The 1 % may ask more of the solvers than the policy itself gives, so what they need for its own cost is said as well. What
    they need for the 1 % does not depend on how good the policy is, so any policy counts, down to one product of the states
    with a matrix: their time over that of the product is the most that can be reached.
    """
    size = critic["states"]
    own, wanted = goals = ("the policy's cost", f"a gap of {100 * WANTED:g} %")
    times = {(goal, batch): fastest(critic["solvers"], goal, batch)["times"] for goal in goals for batch in (1, size)}
    best = fastest(critic["solvers"], wanted, size)
    tuned = sum(one.kind in NAMED for one in settings(PATIENCE))
    return at_least(
        f"{name}: time to {wanted} of the fastest of {', '.join(NAMED)} ({tuned} settings, from "
        f"{', '.join(map(str, FROM))} starts; here {best['setting']}, {best['starts']}), as a multiple of the policy's, batch "
        f"of {size}; at batch 1 {times[wanted, 1]:.0f}x; to the policy's own gap {times[own, size]:.0f}x, at batch 1 "
        f"{times[own, 1]:.0f}x; at unequal quality, the tutorial's protocol {critic['tutorial']['times_the_policy']:.0f}x",
        times[wanted, size],
        300,
        "x",
        best["seconds"] / critic["least_seconds"][size],
        f"a policy multiplies the states by one matrix at least, {1e6 * critic['least_seconds'][size]:.0f} us, and "
        f"{best['setting']} takes {best['iterations']} iterations, {1e6 * best['seconds']:.0f} us",
    )


def fastest(solvers: list[dict[str, Any]], goal: str, batch: int) -> dict[str, Any]:
    """The fastest of the solvers that the claim names; NaN, which fails, if none reaches the target."""
    able = [one for one in solvers if one["kind"] in NAMED and (one["goal"], one["batch"]) == (goal, batch)]
    return min(able, key=lambda one: one["times"], default=NOBODY)


def follows(name: str, data: Mapping[str, Any]) -> str:
    """Whether the return follows the critic, in a sentence."""
    returns = data["acting"]["returns"]
    policy, refined, searched = (returns[action] for action in (POLICY, gradient_steps(REFINEMENTS), SEARCHED))
    gains = {"refined": _gain(refined, policy), "the best found": _gain(searched, policy)}
    judged = [
        f"with {action} actions the return {_verb(gain)} ({gain.mean:+.4g} [{gain.low:.4g}, {gain.high:.4g}])"
        for action, gain in gains.items()
    ]
    return (
        f"{name}: acting {' and '.join(judged)}; the policy's own is {interval(policy).mean:.4g} over {len(policy)} episodes."
    )


def _gain(values: list[float], policy: list[float]) -> Interval:
    """Paired by episode, with equal seeds."""
    return interval([value - own for value, own in zip(values, policy, strict=True)])


def _verb(gain: Interval) -> str:
    if gain.low > 0:
        return "rises"
    return "falls" if gain.high < 0 else "does not change beyond its interval"


def figure(name: str, critic: Mapping[str, Any]) -> Figure:
    """The tutorial's figure, with tuned solvers that stay in the box: gap against seconds, for a batch of all states."""
    fig = Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    for kind, curve in critic["curves"].items():
        seconds = [curve["seconds_per_iteration"] * (k + 1) for k in range(len(curve["gap"]))]
        axes.plot(seconds, curve["gap"], "o-", markersize=3, label=f"{kind}: {curve['setting']}")
    axes.plot(
        critic["policy_seconds"][critic["states"]], critic["gaps"]["policy"]["share"], "k*", markersize=12, label="policy"
    )
    axes.axhline(WANTED, linestyle="--", color="k", linewidth=0.8, label=f"a gap of {100 * WANTED:g} %")
    axes.set(
        xscale="log", xlabel=f"seconds, batch of {critic['states']}", ylabel="gap, as a share of the zero action's", title=name
    )
    axes.set_yscale("symlog", linthresh=WANTED / 10)
    highest = max(critic["gaps"]["policy"]["share"], *(max(curve["gap"]) for curve in critic["curves"].values()))
    axes.set_ylim(0, 2 * highest)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return fig
