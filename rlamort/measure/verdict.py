"""What came of a claim."""

from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """A claim beside what was measured."""

    claim: str
    measured: str
    threshold: str
    passed: bool

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.claim}\n      measured {self.measured}; threshold {self.threshold}"


class Measured(NamedTuple):
    """What a row's measurement gives: verdicts, the data behind them, and figures as (name, matplotlib figure)."""

    verdicts: list[Verdict]
    data: dict[str, Any]
    figures: dict[str, Any]  # file stem -> matplotlib Figure


def at_most(claim: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Passes where value <= limit; a NaN fails."""
    return Verdict(claim, f"{value:.4g}{unit}", f"<= {limit:g}{unit}", bool(value <= limit))


def at_least(claim: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Passes where value >= limit; a NaN fails."""
    return Verdict(claim, f"{value:.4g}{unit}", f">= {limit:g}{unit}", bool(value >= limit))
