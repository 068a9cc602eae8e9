"""Learning curves from the records of runs."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlamort.config import short_name
from rlamort.errors import UserError
from rlamort.score import interval
from rlamort.track import read_records


def curve(run: Path) -> dict[int, float]:
    """env_step -> mean evaluation return."""
    return {int(r["env_step"]): float(r["eval/return"]) for r in read_records(run) if "eval/return" in r}  # type: ignore[arg-type]


def config_of(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run directory.

    Raises:
        UserError: it is none.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: it is not a run directory; one that `rlamort train` made, with a config.yaml, is needed")
    return dict(yaml.safe_load(file.read_text()))


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draw evaluation return against environment steps: a line per method and environment, the mean over its runs.

    Where a method has several runs (seeds), the band is a 95 % Student interval for that mean; where it has one, there is
    none, since the spread of a single run's episodes says nothing of another seed.

    Raises:
        UserError: a folder is not a run, or no run has an evaluation yet.
    """
    groups: dict[tuple[str, str], list[dict[int, float]]] = defaultdict(list)
    for run in runs:
        config = config_of(run)
        groups[config["env"], short_name(config["method"])].append(curve(run))
    if not any(one for curves in groups.values() for one in curves):
        raise UserError(f"{', '.join(map(str, runs))}: no evaluation has been recorded yet")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    envs = sorted({env for env, _ in groups})
    figure = Figure(figsize=(6.4 * len(envs), 4.2), layout="constrained")
    for axes, env in zip(figure.subplots(1, len(envs), squeeze=False)[0], envs, strict=True):
        for (_, method), curves in sorted((key, value) for key, value in groups.items() if key[0] == env):
            band(axes, curves, method)
        axes.set(title=env, xlabel="environment steps", ylabel="evaluation return")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def band(axes: Any, curves: Sequence[dict[int, float]], name: str) -> None:
    """A line for the mean of several runs where all have a value, env_step -> return, with its 95 % Student interval."""
    steps = sorted(set.intersection(*(set(one) for one in curves)))
    means = [interval([one[step] for one in curves]) for step in steps]
    label = name if len(curves) == 1 else f"{name}: mean of {len(curves)} runs, 95 %"
    (line,) = axes.plot(steps, [m.mean for m in means], marker="o", markersize=3, label=label)
    if len(curves) > 1:
        low, high = np.array([m.low for m in means]), np.array([m.high for m in means])
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_gaps(curves: Sequence[Any], gaps: dict[str, list[float]], out: Path) -> Path:
    """Mean gap against iterations and against seconds, and how gaps are spread over contexts, into `out`/gaps.png.

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
    bins = np.geomspace(low, max(max(values) for values in gaps.values()) + 2 * low, 40)
    for name, values in gaps.items():
        spread.hist(np.maximum(values, low), bins=bins, alpha=0.5, label=name)
    spread.set(xlabel="gap of a context", ylabel="contexts", xscale="log")
    for axes in (iterations, seconds, spread):
        axes.grid(alpha=0.3)
        axes.legend()
    file = out / "gaps.png"
    figure.savefig(file, dpi=110)
    return file
