"""Reports of measurements: lines for a terminal, data for a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlamort.score import Interval


class Report(NamedTuple):
    """Lines to read, and the data behind them."""

    lines: list[str]
    data: dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    cells = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]


def bounds(value: Interval) -> str:
    """A mean with its interval, where it has one."""
    return f"{value.mean:.4g}" if np.isnan(value.low) else f"{value.mean:.4g} [{value.low:.4g}, {value.high:.4g}]"


def by_episode(values: np.ndarray, episode: np.ndarray, draws: int = 2_000) -> Interval:
    """Mean of `values` (S,), with a 95 % percentile interval of a bootstrap over episodes; NaN bounds for a single one."""
    mean, groups = float(values.mean()), [values[episode == e] for e in np.unique(episode)]
    if len(groups) < 2:
        return Interval(mean, float("nan"), float("nan"))
    totals, sizes = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    resamples = np.random.default_rng(0).integers(len(groups), size=(draws, len(groups)))
    low, high = np.percentile(totals[resamples].sum(1) / sizes[resamples].sum(1), [2.5, 97.5])
    return Interval(mean, float(low), float(high))
