"""The figure of a ledger: a column a task, environment steps above and seconds below, every line labelled at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from rlamort.errors import UserError
from rlamort.host.publish import published_file
from rlamort.measure.study import Results
from rlamort.score import mean, stratified_bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlamort.measure.ledger import Ledger

MOST = 8  # lines that a reader can tell apart
APART = 0.062  # least distance of labels, as a share of the panel's height
POINTS = 60  # at which lines over seconds are drawn


class Line(NamedTuple):
    """The mean of an arm's runs on a task, and its interval over seeds."""

    label: str
    color: Any
    at: np.ndarray  # (P,) steps, or seconds
    values: np.ndarray  # (S, P)


def draw_ledger(ledger: Ledger, results: Results, out: Path) -> None:
    """Draw the arms that the ledger shows, if there are any stored runs.

    Bands are 95 % bootstrap intervals of the mean over seeds. Over seconds a run keeps an evaluation's return until the next,
    and a line ends where the first of its runs does.

    Raises:
        UserError: it shows more lines than can be told apart.
    """
    if len(ledger.shown) > MOST:
        raise UserError(f"{ledger.row}: shown has {len(ledger.shown)} arms; at most {MOST} can be told apart")
    drawn = {(timed, env): _lines(ledger, env, timed, results) for timed in (False, True) for env in ledger.tasks}
    envs = [env for env in ledger.tasks if drawn[False, env] or drawn[True, env]]
    kinds = [timed for timed in (False, True) if any(drawn[timed, env] for env in envs)]
    if not envs:
        return
    figure = Figure(figsize=(4.4 * len(envs), 3.5 * len(kinds)), layout="constrained")
    places = figure.subplots(len(kinds), len(envs), squeeze=False)
    for row, timed in zip(places, kinds, strict=True):
        for axes, env in zip(row, envs, strict=True):
            _panel(axes, drawn[timed, env], ledger.tasks[env].get("target"))
            axes.set_title(env if row is places[0] else "")
            axes.set_xlabel("seconds of training, idle machine" if timed else "thousand environment steps")
        row[0].set_ylabel("return of an evaluation")
    with published_file(out) as fresh:
        figure.savefig(fresh, dpi=110)


def _lines(ledger: Ledger, env: str, timed: bool, results: Results) -> list[Line]:
    found = []
    for number, (arm, label) in enumerate(ledger.shown.items()):
        planned = [run for run in ledger.runs(results) if (run.arm, run.env, run.timed) == (arm, env, timed)]
        runs = [ledger.evaluations(run, results) for run in planned if run.steps == ledger.steps and ledger.key(run) in results]
        if runs:
            returns = [np.array([one["eval/return"] for one in run]) for run in runs]
            if timed:
                seconds = [np.array([one["time/seconds"] for one in run]) for run in runs]
                at = np.linspace(max(one[0] for one in seconds), min(one[-1] for one in seconds), POINTS)
                values = np.array([r[np.searchsorted(s, at, side="right") - 1] for s, r in zip(seconds, returns, strict=True)])
            else:
                at, values = np.array([one["env_step"] for one in runs[0]]) / 1_000, np.array(returns)
            found.append(Line(label, mpl.colormaps["tab10"](number if number < 7 else 9), at, values))
    return found


def _panel(axes: Axes, lines: Sequence[Line], target: float | None) -> None:
    """Lines with bands, and their labels to the right, in the order of their ends."""
    for line in lines:
        axes.plot(line.at, line.values.mean(0), color=line.color, linewidth=1.6)
        if len(line.values) > 1:
            found = [stratified_bootstrap([column], mean, draws=500) for column in line.values.T]
            low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
            axes.fill_between(line.at, low, high, color=line.color, alpha=0.13, linewidth=0)
    if target is not None:
        axes.axhline(target, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    _label(axes, lines)


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
