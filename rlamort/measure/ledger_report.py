"""Tables of a ledger: arms over all tasks, by task, and by seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlamort.measure.falsifiers import together
from rlamort.measure.statistics import first, improvement_interval, paired, shown
from rlamort.measure.study import Results
from rlamort.score import interval, iqm, stratified_bootstrap

if TYPE_CHECKING:
    from rlamort.measure.ledger import Ledger, Run


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
        adds = f"`{' '.join(own)}`" if own else ""
        lines.append(f"| {arm} | {base} | {adds} |")
    lines += [
        "",
        f"All with `{' '.join(ledger.overrides)}`",
        f"unless the arm says other. {_machines(ledger, stored, results)}",
    ]
    plain = [run for run in stored if not run.timed and run.steps == ledger.steps]
    lines += _together(ledger, plain, results)
    for env in ledger.tasks:
        lines += _on(ledger, env, [run for run in plain if run.env == env], results)
    return lines + _seconds(ledger, [run for run in stored if run.timed], results)


def _machines(ledger: Ledger, stored: Sequence[Run], results: Results) -> str:
    kept = [results[ledger.key(run)] for run in stored]
    processors = ", ".join(sorted({one["processor"] for one in kept}))
    hours = sum(one["seconds"] for one in kept) / 3600
    return f"{len(kept)} runs, {hours:.1f} hours of training, on {processors}."


def _together(ledger: Ledger, stored: Sequence[Run], results: Results) -> list[str]:
    """Scores over the ranking's tasks, of arms that share seeds with the reference on each, and more than one on some."""
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
        if max(map(len, seeds.values())) < 2:
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
        "(Agarwal et al., 2021). Seeds are counted by task.",
        "",
        f"| arm | seeds | score | above {ledger.reference} | area |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _on(ledger: Ledger, env: str, stored: Sequence[Run], results: Results) -> list[str]:
    """One task's returns, and differences from the reference at equal seeds."""
    if not stored:
        return []
    target = ledger.tasks[env].get("target")
    base = {run.seed: ledger.last(run, results) for run in stored if run.arm == ledger.reference}
    lines = [
        "",
        f"### {env}",
        "",
        f"Returns after {ledger.steps:,} steps: means over seeds, and over differences at equal seeds, with",
    ]
    lines += ["95 % Student intervals; median steps to a return.", ""]
    lines += [
        f"| arm | seeds | return | worst | minus {ledger.reference} | area |" + (f" steps to {target:g} |" if target else "")
    ]
    lines += ["|---" * (7 if target else 6) + "|"]
    for arm in ledger.ledger:
        runs = [run for run in stored if run.arm == arm]
        if not runs:
            continue
        last = {run.seed: ledger.last(run, results) for run in runs}
        both = sorted(set(last) & set(base)) if arm != ledger.reference else []
        less = shown(paired(np.array([last[s] for s in both]), np.array([base[s] for s in both])), "+.0f") if both else ""
        area = np.mean([ledger.area(run, results) for run in runs])
        value, worst = shown(interval(list(last.values())), ".0f"), f"{min(last.values()):.0f}"
        cells = [arm, str(len(runs)), value, worst, less, f"{area:.0f}"]
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
        f"Of training on an idle machine with `{' '.join(ledger.timed_overrides)}`, without evaluations, compilation included,"
    ]
    lines += [
        f"until an evaluation returns the target: medians over seeds, and over ratios to {ledger.reference} in one session."
    ]
    heads = [f"to {ledger.tasks[env]['target']:g} on {env} | x" for env in envs]
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
    """Of one arm on one task, median seconds to the target, and median ratio to the reference's in the same session."""
    if not runs:
        return ["", ""]
    target = float(ledger.tasks[runs[0].env]["target"])

    def seconds(one: dict[str, Any]) -> float:
        return first(one["evaluations"], target, "time/seconds")

    kept = [results[ledger.key(run)] for run in runs]
    base = [results.get(ledger.key(run._replace(arm=ledger.reference))) for run in runs]
    pairs = [(seconds(one), seconds(other)) for one, other in zip(kept, base, strict=True) if other and together(one, other)]
    ratios = [ours / theirs for ours, theirs in pairs if math.isfinite(ours) and math.isfinite(theirs)]
    return [_count(float(np.median([seconds(one) for one in kept]))), f"{np.median(ratios):.2f}" if ratios else ""]


def _seeds(ledger: Ledger, arm: str, stored: Sequence[Run]) -> dict[str, set[int]]:
    return {env: {run.seed for run in stored if (run.arm, run.env) == (arm, env)} for env in ledger.tasks}


def _scores(ledger: Ledger, arm: str, env: str, seeds: Sequence[int], results: Results) -> np.ndarray:
    return np.array([ledger.score(ledger.of(arm, env, seed), results) for seed in seeds])


def _count(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"
