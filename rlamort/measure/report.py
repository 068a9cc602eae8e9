"""Reports of measurements: lines for a terminal, data for a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

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


def by_episode(values: np.ndarray, episode: np.ndarray) -> Interval:
    """Mean of `values` (S,), with a 95 % Student interval over episodes; NaN bounds for a single one.

    The mean is a ratio, of totals of E episodes and their lengths; its variance is that of its linearisation, with E - 1
    degrees of freedom.
    """
    mean, groups = float(values.mean()), [values[episode == e] for e in np.unique(episode)]
    if len(groups) < 2:
        return Interval(mean, float("nan"), float("nan"))
    away = np.array([(group - mean).sum() for group in groups])
    freedom = len(groups) - 1
    half = float(stdtrit(freedom, 0.975) * np.sqrt(len(groups) / freedom * np.square(away).sum()) / len(values))
    return Interval(mean, mean - half, mean + half)
