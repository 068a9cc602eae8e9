"""Reports of measurements: lines for a terminal, data for a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Report(NamedTuple):
    """Lines to read, and the data behind them."""

    lines: list[str]
    data: dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    cells = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
