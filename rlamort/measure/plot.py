"""Learning curves from the records of runs."""

import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlamort.config import FREE, Run, config_of, fields_of, short_name
from rlamort.errors import UserError
from rlamort.host.publish import published_file
from rlamort.run.track import Evaluation, read_records
from rlamort.score import interval

LETTERS = 45  # in a line of a legend
MAPPINGS = ("env_kwargs", "reset_options")  # which are one setting each: an absent key is another value than any
AXES = {"return": "evaluation return", "mean cost": "mean cost (lower is better)"}


class Curve(NamedTuple):
    """A run's records, by environment step."""

    evaluations: dict[int, Evaluation]
    training: dict[int, float]  # returns with exploration

    @classmethod
    def of(cls, run: Path) -> "Curve":
        """From a run directory."""
        records = [(int(record["env_step"]), record) for record in read_records(run)]  # type: ignore[arg-type]
        found = {step: evaluation for step, record in records if (evaluation := Evaluation.of(record)) is not None}
        return cls(found, {step: float(record["train/return"]) for step, record in records if "train/return" in record})  # type: ignore[arg-type]

    def means(self) -> dict[int, float]:
        return {step: evaluation.mean for step, evaluation in self.evaluations.items()}


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draw evaluations against environment steps: a panel per environment, a line per method and settings.

    Runs that differ only in seeds, and in settings that do not affect learning, are one line: their mean with a 95 % Student
    interval. A single run has the 95 % interval over its evaluation's episodes instead, which does not cover other
    seeds, and its training returns as a thin line. Problems have their mean cost instead of a return.

    Args:
        runs: run directories; one without an evaluation, or whose evaluations all failed, is left out, with a warning.
        out: the image, of any format that matplotlib writes.

    Raises:
        UserError: a folder is not a run directory, no run has an evaluation yet, or the format is not supported.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in kinds:
        raise UserError(f"{out}: no image is written under that name; allowed endings: {', '.join(sorted(kinds))}")
    panels: dict[tuple[str, str], dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    configs = {run: config_of(run) for run in {run.resolve(): run for run in runs}.values()}
    for run, name in _names(configs).items():
        curve = Curve.of(run)
        if curve.evaluations:
            panels[str(configs[run]["env"]), next(iter(curve.evaluations.values())).name][name].append(curve)
        elif len(configs) > 1:
            warnings.warn(f"{run}: it is left out, since it has no evaluation with a return yet", stacklevel=2)
    if not panels:
        raise UserError(f"{', '.join(map(str, runs))}: no evaluation with a return has been recorded yet")
    figure.set_size_inches(6.4 * len(panels), 4.2)
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((env, what), lines) in zip(places, sorted(panels.items()), strict=True):
        for name, curves in sorted(lines.items()):
            _alone(axes, curves[0], name) if len(curves) == 1 else band(axes, [curve.means() for curve in curves], name)
        axes.set(title=env, xlabel="environment steps" if what == "return" else "steps", ylabel=AXES[what])
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        legend = axes.legend(fontsize="small")
        legend.set_in_layout(False)  # long names would leave no room for curves
        for text in legend.get_texts():
            text.set_text(textwrap.fill(text.get_text(), LETTERS))
    with published_file(out) as fresh:
        figure.savefig(fresh, dpi=120)
    return out


def told(what: str, runs: Sequence[Path], out: Path) -> str:
    """A line about the curves of finished runs: where they are drawn; or why not, as where every evaluation failed."""
    try:
        return f"{what}: {plot(runs, out)}"
    except UserError as error:
        return f"{what}: none is drawn: {error}"


def _leaves(tree: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested mappings by its dotted name, as text."""
    for key, value in tree.items():
        if key in MAPPINGS:
            yield key, str(value or {})
        elif isinstance(value, dict) and value:
            yield from _leaves(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", str(value)


def _names(configs: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """A run's legend: its method, and the settings in which runs of that method on that environment differ."""
    shared = {"seed", "row", *(field.name for field in fields_of(Run).values() if field.mark is FREE)}
    settings = {
        run: {key: value for key, value in _leaves(config) if key.split(".")[0] not in shared}
        for run, config in configs.items()
    }
    names = {}
    for run, own in settings.items():
        alike = [one for one in settings.values() if (one["env"], one["method"]) == (own["env"], own["method"])]
        differing = [f"{key}={own[key]}" for key in own if any(one.get(key, own[key]) != own[key] for one in alike)]
        names[run] = " ".join([short_name(own["method"]), *differing])
    return names


def _alone(axes: Any, curve: Curve, name: str) -> None:
    """A single run: its evaluations, the interval of each over its episodes, and returns in training."""
    steps, found = list(curve.evaluations), list(curve.evaluations.values())
    (line,) = axes.plot(steps, [one.mean for one in found], marker="o", markersize=3, label=name)
    if any(np.isfinite(one.low) for one in found):
        label = f"{name}: 95 % over an evaluation's {'episodes' if found[0].name == 'return' else 'contexts'}"
        _shade(axes, steps, [one.low for one in found], [one.high for one in found], line.get_color(), label)
    if curve.training:
        label, thin = f"{name}: training return", {"color": line.get_color(), "linewidth": 0.7, "alpha": 0.6}
        axes.plot(list(curve.training), list(curve.training.values()), label=label, **thin)


def _shade(axes: Any, steps: Sequence[int], low: Sequence[float], high: Sequence[float], color: str, label: str | None) -> None:
    """Fill between bounds; a vertical line for a single step."""
    if len(steps) == 1:
        axes.vlines(steps, low, high, color=color, alpha=0.4, linewidth=3, label=label)
    else:
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label=label)


def band(axes: Any, curves: Sequence[dict[int, float]], name: str) -> None:
    """A line for the mean of several runs, env_step -> value, with its 95 % Student interval.

    Runs with different steps are interpolated linearly onto all steps within their common range; the legend says so, and each
    run is drawn as a thin line, too. Without a common range there is no mean.
    """
    low, high = max(min(one) for one in curves), min(max(one) for one in curves)
    steps = sorted({step for one in curves for step in one if low <= step <= high})
    values = np.array([np.interp(steps, sorted(one), [one[step] for step in sorted(one)]) for one in curves])  # (runs, steps)
    means = [interval(column.tolist()) for column in values.T]
    apart = any(sorted(one) != steps for one in curves)
    label = name if len(curves) == 1 else f"{name}: mean of {len(curves)} runs, 95 %" + (", interpolated" if apart else "")
    if not steps:
        label = f"{name}: {len(curves)} runs, evaluated at steps without a common range"
    (line,) = axes.plot(steps, [m.mean for m in means], marker="o", markersize=3, label=label)
    if len(curves) > 1:
        _shade(axes, steps, [m.low for m in means], [m.high for m in means], line.get_color(), None)
    for one in curves if apart else []:
        points = [one[step] for step in sorted(one)]
        axes.plot(sorted(one), points, color=line.get_color(), marker=".", markersize=3, linewidth=0.7, alpha=0.6)


def draw_gaps(curves: Sequence[Any], gaps: dict[str, list[float]], out: Path) -> Path:
    """Mean gap against iterations and seconds, and the distribution of gaps over contexts, into `out`/gaps.png.

    Args:
        curves: with a `name`, and a list of `gap` after as many `seconds`.
        gaps: of each model, one per context.
        out: a folder.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    iterations, seconds, spread = figure.subplots(1, 3)
    for curve in curves:
        shown = np.maximum(curve.gap, 1e-9)
        marker = "o" if curve.name in gaps else ""
        iterations.plot(np.arange(len(shown)) + (curve.name not in gaps), shown, marker=marker, label=curve.name)
        seconds.plot(curve.seconds, shown, marker=marker, label=curve.name)
    iterations.set(xlabel="iterations", ylabel="mean gap to the reference", yscale="log")
    seconds.set(xlabel="seconds for the batch", yscale="log", xscale="log")
    low = min(max(1e-9, min(values)) for values in gaps.values())
    high = max(low, *(max(values) for values in gaps.values()))  # all may be better than the reference
    bins = np.geomspace(low, high + 2 * low, 40)
    for name, values in gaps.items():
        spread.hist(np.maximum(values, low), bins=bins, alpha=0.5, label=name)
    spread.set(xlabel="gap of a context", ylabel="contexts", xscale="log")
    for axes in (iterations, seconds, spread):
        axes.grid(alpha=0.3)
        axes.legend()
    file = out / "gaps.png"
    with published_file(file) as fresh:
        figure.savefig(fresh, dpi=110)
    return file
