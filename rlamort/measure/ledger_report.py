"""Tables of a ledger: arms over all tasks, by task, and by seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlamort.measure.falsifiers import together
from rlamort.measure.statistics import first, improvement_interval, paired, shown, sooner
from rlamort.measure.study import Results
from rlamort.score import interval, iqm, stratified_bootstrap

if TYPE_CHECKING:
    from rlamort.measure.ledger import Ledger, Run

TOLD = ("torch", "gymnasium", "mujoco", "stable-baselines3", "float32 products")  # versions, of which there may be several


def report(ledger: Ledger, results: Results) -> list[str]:
    """Lines of Markdown about the runs that there are; none before there is one."""
    stored = ledger.stored(results)
    if not stored:
        return []
    there = sorted({run.arm for run in stored}, key=list(ledger.ledger).index)
    lines = [
        f"![{ledger.row}]({ledger.row}.png)",
        "",
        "### Arms",
        "",
        "| arm | a row, or another arm | adds |",
        "|---|---|---|",
    ]
    for arm in there:
        base, *own = ledger.ledger[arm]
        adds = f"`{' '.join(own)}`" if own else f"[its settings](../../configs/method/{base}.yaml)" if "/" not in base else ""
        lines.append(f"| {arm} | {base} | {adds} |")
    lines += [
        "",
        f"All with `{' '.join(ledger.overrides)}`",
        f"unless the arm says other. {_machines(ledger, stored, results)}",
    ]
    plain = [run for run in stored if not run.timed]
    lines += _together(ledger, [run for run in plain if run.steps == ledger.steps], results)
    for env in ledger.tasks:
        for steps in sorted({run.steps for run in plain if run.env == env}):
            lines += _on(ledger, env, steps, [run for run in plain if (run.env, run.steps) == (env, steps)], results)
    return lines + _seconds(ledger, [run for run in stored if run.timed], results)


def _machines(ledger: Ledger, stored: Sequence[Run], results: Results) -> str:
    kept = [results[ledger.key(run)] for run in stored]
    processors = ", ".join(sorted({one["processor"] for one in kept}))
    hours = sum(one["seconds"] for one in kept) / 3600
    told = {name: {one["versions"].get(name, "") for one in kept} - {""} for name in TOLD}
    versions = "; ".join(f"{name} {', '.join(sorted(found))}" for name, found in told.items() if found)
    return f"{len(kept)} runs, {hours:.1f} hours of training, on {processors}; {versions}."


def _together(ledger: Ledger, stored: Sequence[Run], results: Results) -> list[str]:
    """Scores over the ranking's tasks, of arms that share more than one seed with the reference on each."""
    envs, rows = ledger.ranked["envs"], []
    base = _seeds(ledger, ledger.reference, stored)
    for arm in ledger.ledger:
        own = _seeds(ledger, arm, stored)
        seeds = {env: sorted(own.get(env, set()) & base.get(env, set())) for env in envs}
        if not all(seeds.values()):
            continue
        ours, theirs = ([_scores(ledger, one, env, seeds[env], results) for env in envs] for one in (arm, ledger.reference))
        runs = [[ledger.of(arm, env, seed) for seed in seeds[env]] for env in envs]
        areas = [np.array([ledger.area(run, results) / ledger.goal(run.env) for run in alike]) for alike in runs]
        if min(map(len, seeds.values())) < 2:
            continue  # a single seed has no interval
        score, area = (shown(stratified_bootstrap(groups, iqm)) for groups in (ours, areas))
        above = "" if arm == ledger.reference else shown(improvement_interval(ours, theirs))
        rows.append(f"| {arm} | {' '.join(str(len(seeds[env])) for env in envs)} | {score} | {above} | {area} |")
    if not rows:
        return []
    goals = ", ".join(f"{ledger.goal(env):g} on {env}" for env in envs)
    return [
        "",
        "### Over tasks",
        "",
        f"A score is a return over the task's goal: {goals}. Interquartile means over",
        f"seeds and tasks of scores after {ledger.steps:,} steps, and of mean scores over all evaluations (area);",
        f"probability that a run is above one of {ledger.reference}. Intervals are of a 95 % stratified bootstrap",
        "(Agarwal et al., 2021), which are too narrow for so few seeds: with three tasks of three seeds they would hold",
        "the true score in about 87 % of cases, of five in 90 %. Seeds are counted by task.",
        "",
        f"| arm | seeds | score | above {ledger.reference} | area |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _on(ledger: Ledger, env: str, steps: int, stored: Sequence[Run], results: Results) -> list[str]:
    """One task's returns, and differences at equal seeds: from the reference, and from the arm that an arm adds to."""
    target = ledger.tasks[env].get("target")
    lasts: dict[str, dict[int, float]] = {}
    for run in stored:
        lasts.setdefault(run.arm, {})[run.seed] = ledger.last(run, results)

    def less(arm: str, other: str) -> str:
        ours, theirs = lasts[arm], lasts.get(other, {})
        both = sorted(set(ours) & set(theirs)) if arm != other else []
        return shown(paired(*(np.array([one[seed] for seed in both]) for one in (ours, theirs))), "+.0f") if both else ""

    lines = [
        "",
        f"### {env}" + ("" if steps == ledger.steps else f", {steps:,} steps"),
        "",
        f"Returns after {steps:,} steps: means over seeds, and over differences at equal seeds, with",
    ]
    lines += ["95 % Student intervals; median steps to a return.", ""]
    lines += [
        f"| arm | seeds | return | worst | minus {ledger.reference} | minus the arm that it adds to | area |"
        + (f" steps to {target:g} |" if target else "")
    ]
    lines += ["|---" * (8 if target else 7) + "|"]
    for arm in ledger.ledger:
        runs = [run for run in stored if run.arm == arm]
        if not runs:
            continue
        last = lasts[arm]
        area = np.mean([ledger.area(run, results) for run in runs])
        value, worst = shown(interval(list(last.values())), ".0f"), f"{min(last.values()):.0f}"
        differences = [less(arm, ledger.reference), less(arm, ledger.ledger[arm][0])]
        cells = [arm, str(len(runs)), value, worst, *differences, f"{area:.0f}"]
        if target:
            cells.append(
                _count(float(np.median([first(ledger.evaluations(run, results), target, "env_step") for run in runs])))
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _seconds(ledger: Ledger, stored: Sequence[Run], results: Results) -> list[str]:
    """Timed runs: seconds to the targets, and over those of the reference in the same session."""
    if not stored:
        return []
    envs = [env for env in ledger.tasks if any(run.env == env for run in stored)]
    lines = ["", "### Seconds", ""]
    lines += [
        f"Of training on an idle machine with `{' '.join(ledger.timed_overrides)}`, without evaluations, compilation included,",
        "until an evaluation returns the target: medians over seeds. Beside them, how many times sooner that is than",
        f"{ledger.reference} in the same session of a machine; >= where {ledger.reference} does not return it in all its time.",
    ]
    heads = [f"to {ledger.tasks[env]['target']:g} on {env} | times sooner" for env in envs]
    lines += ["", f"| arm | seeds | steps/s | {' | '.join(heads)} |", "|---" * (3 + 2 * len(envs)) + "|"]
    for arm in dict.fromkeys(run.arm for run in sorted(stored, key=lambda run: list(ledger.ledger).index(run.arm))):
        runs = [run for run in stored if run.arm == arm]
        speed = np.median([run.steps / results[ledger.key(run)]["seconds"] for run in runs])
        cells = [arm, str(len({run.seed for run in runs})), f"{speed:.0f}"]
        for env in envs:
            cells += _timed(ledger, [run for run in runs if run.env == env], results)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _timed(ledger: Ledger, runs: Sequence[Run], results: Results) -> list[str]:
    """Of one arm on one task, median seconds to the target, and how many times sooner than the reference in a session."""
    if not runs:
        return ["", ""]
    target = float(ledger.tasks[runs[0].env]["target"])

    def seconds(one: dict[str, Any]) -> float:
        return first(one["evaluations"], target, "time/seconds")

    kept = [results[ledger.key(run)] for run in runs]
    base = [results.get(ledger.key(run._replace(arm=ledger.reference))) for run in runs]
    pairs = [(one, other) for one, other in zip(kept, base, strict=True) if other and together(one, other)]
    ends = [other["evaluations"][-1]["time/seconds"] for _, other in pairs]
    times, bound = sooner([(seconds(one), seconds(other)) for one, other in pairs], ends)
    ratio = f"{'>= ' if bound else ''}{times:.2f}x" if pairs else ""
    return [_count(float(np.median([seconds(one) for one in kept]))), ratio]


def _seeds(ledger: Ledger, arm: str, stored: Sequence[Run]) -> dict[str, set[int]]:
    return {env: {run.seed for run in stored if (run.arm, run.env) == (arm, env)} for env in ledger.tasks}


def _scores(ledger: Ledger, arm: str, env: str, seeds: Sequence[int], results: Results) -> np.ndarray:
    return np.array([ledger.score(ledger.of(arm, env, seed), results) for seed in seeds])


def _count(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"
