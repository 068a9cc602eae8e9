"""The figure of a ledger: a column a task, environment steps above and seconds below, every line labelled at its end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from rlamort.errors import UserError
from rlamort.host.publish import published_file
from rlamort.measure.study import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlamort.measure.ledger import Ledger, Run

MOST = 8  # lines that a reader can tell apart
APART = 0.062  # least distance of labels, as a share of the panel's height
POINTS = 60  # at which lines over seconds are drawn


class Line(NamedTuple):
    """An arm's runs on a task."""

    label: str
    color: Any
    at: np.ndarray  # (P,) steps, or seconds
    values: np.ndarray  # (S, P)


def draw_ledger(ledger: Ledger, results: Results, out: Path) -> None:
    """Draw the arms that the ledger shows, if there are any stored runs.

    Lines are means over seeds, and bands reach from the worst to the best of them: intervals by so few would be too narrow, or
    hide all else. They are straight between evaluations; over seconds they end where the first of their runs does. A dashed
    line is the task's target, a dotted one its goal.

    Raises:
        UserError: it shows more lines than can be told apart.
    """
    if len(ledger.shown) > MOST:
        raise UserError(f"{ledger.row}: shown has {len(ledger.shown)} arms; at most {MOST} can be told apart")
    stored = ledger.stored(results)
    drawn = {
        (timed, env): _lines(ledger, [run for run in stored if (run.timed, run.env) == (timed, env)], results)
        for timed in (False, True)
        for env in ledger.tasks
    }
    envs = [env for env in ledger.tasks if drawn[False, env] or drawn[True, env]]
    kinds = [timed for timed in (False, True) if any(drawn[timed, env] for env in envs)]
    if not envs:
        return
    figure = Figure(figsize=(4.4 * len(envs), 3.5 * len(kinds)), layout="constrained")
    places = figure.subplots(len(kinds), len(envs), squeeze=False, sharey="col")
    labelled = []
    for row, timed in zip(places, kinds, strict=True):
        for axes, env in zip(row, envs, strict=True):
            if not drawn[timed, env]:
                axes.set_axis_off()
                continue
            lines, task = drawn[timed, env], ledger.tasks[env]
            counts = sorted({len(line.values) for line in lines})
            seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
            _panel(axes, lines, {task.get("target"): (0, (4, 3)), task["goal"]: (0, (1, 2))})
            labelled.append((axes, lines))
            axes.set_title(f"{env}, {seeds}" if timed == kinds[0] else seeds, fontsize=10)
            axes.set_xlabel("seconds of training, idle machine" if timed else "thousand environment steps")
        row[0].set_ylabel("return of an evaluation")
    for axes, lines in labelled:  # when the limits are known, which the panels of a task share
        _label(axes, lines)
    about = "means over seeds; bands from the worst seed to the best; dashed: target, dotted: goal"
    figure.suptitle(textwrap.fill(about, 60 * len(envs)), fontsize=9, color="0.3")
    with published_file(out) as fresh:
        figure.savefig(fresh, dpi=110)


def _lines(ledger: Ledger, stored: Sequence[Run], results: Results) -> list[Line]:
    """A line for each arm that the ledger shows, from runs of one task; over seconds if they were timed."""
    found = []
    for number, (name, label) in enumerate(ledger.shown.items()):
        arm = ledger.called(name, results)
        if arm != name and arm in ledger.shown:
            continue
        label = label if arm == name else f"{label}: {arm}"
        own = [run for run in stored if run.arm == arm and run.steps == ledger.steps]
        if not own:
            continue
        runs = [ledger.evaluations(run, results) for run in own]
        at, returns = _column(runs[0], "env_step") / 1_000, [_column(run, "eval/return") for run in runs]
        if own[0].timed:
            seconds = [_column(run, "time/seconds") for run in runs]
            at = np.linspace(max(one[0] for one in seconds), min(one[-1] for one in seconds), POINTS)
            returns = [np.interp(at, taken, values) for taken, values in zip(seconds, returns, strict=True)]
        found.append(Line(label, mpl.colormaps["tab10"](number if number < 7 else 9), at, np.array(returns)))
    return found


def _column(evaluations: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([float(one[name]) for one in evaluations])


def _panel(axes: Axes, lines: Sequence[Line], levels: dict[float | None, Any]) -> None:
    """Lines with bands, and levels {return: dashes}."""
    for line in lines:
        axes.plot(line.at, line.values.mean(0), color=line.color, linewidth=1.6)
        if len(line.values) > 1:
            axes.fill_between(line.at, line.values.min(0), line.values.max(0), color=line.color, alpha=0.13, linewidth=0)
    for level, dashes in levels.items():
        if level is not None:
            axes.axhline(level, color="0.4", linewidth=0.8, linestyle=dashes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)


def _label(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name at the right edge, as near to its end as the names leave each other room, and join the two."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ends = sorted((line.values[:, -1].mean() - low) / (high - low) for line in lines)
    ordered = sorted(lines, key=lambda line: line.values[:, -1].mean())
    right = max((line.at[-1] for line in lines), default=0.0)
    left = axes.get_xlim()[0]
    axes.set_xlim(left, right + 0.02 * (right - left))
    for line, end, place in zip(ordered, ends, spaced(ends), strict=True):
        tip = (line.at[-1], low + end * (high - low))
        join = {"arrowstyle": "-", "color": line.color, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1, "shrinkB": 2}
        text = {"color": line.color, "fontsize": 8, "va": "center", "annotation_clip": False, "arrowprops": join}
        axes.annotate(line.label, tip, (1.06, place), xycoords="data", textcoords="axes fraction", **text)
        axes.plot(*tip, "o", color=line.color, markersize=3, clip_on=False)


def spaced(places: Sequence[float], apart: float = APART) -> list[float]:
    """Ascending places moved as little as keeps them `apart`, and within [0, 1]: least squares, by pooling neighbours."""
    groups: list[list[float]] = []  # [sum of places without their offsets, count]
    for number, place in enumerate(places):
        groups.append([place - number * apart, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    free = [total / count for total, count in groups for _ in range(int(count))]
    most = 1 - (len(places) - 1) * apart
    return [min(max(one, 0.0), most) + number * apart for number, one in enumerate(free)]
