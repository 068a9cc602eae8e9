"""What came of a claim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """The most that any method of a kind can reach, computed in the run that measured the claim."""

    most: float
    asked: float  # what the claim asks for, which `most` shows to be out of reach
    unit: str
    reason: str  # which kind, and what the number is made of

    def __str__(self) -> str:
        return f"at most {self.most:.4g}{self.unit}, and {self.asked:g}{self.unit} was asked: {self.reason}"


@dataclass(frozen=True)
class Verdict:
    """A claim beside what was measured: it is held to a threshold, or it is reported, since a bound shows that none can pass.

    Args:
        claim: what is claimed.
        measured: what was found.
        threshold: what it is held to; empty where it is reported.
        passed: whether it misses no threshold; a reported claim has none to miss.
        bound: why it is reported; None where it is held to its threshold.

    Raises:
        ValueError: it has neither threshold nor bound, or both, or its bound does not show that the claim is out of reach.
    """

    claim: str
    measured: str
    threshold: str
    passed: bool
    bound: Bound | None = None

    def __post_init__(self) -> None:
        if self.bound is None:
            if not self.threshold:
                raise ValueError(f"{self.claim}: it has no threshold, and no bound that would show why it cannot have one")
            return
        if self.threshold or not self.passed:
            raise ValueError(f"{self.claim}: what is reported has no threshold, and neither passes nor fails")
        if not (math.isfinite(self.bound.most) and self.bound.most < self.bound.asked and self.bound.reason):
            raise ValueError(f"{self.claim}: the bound does not show that what is asked for is out of reach ({self.bound})")

    @property
    def outcome(self) -> str:
        """Pass, FAIL or reported."""
        if self.bound is not None:
            return "reported"
        return "pass" if self.passed else "FAIL"

    @property
    def limit(self) -> str:
        """Its threshold, or why it has none."""
        return self.threshold if self.bound is None else f"none: {self.bound}"

    def __str__(self) -> str:
        return f"{self.outcome}  {self.claim}\n      measured {self.measured}; threshold {self.limit}"

    def kept(self) -> list[Any]:
        """As JSON has it: a reported one ends in the fields of its bound, by name."""
        if self.bound is None:
            return [self.claim, self.measured, self.threshold, self.passed]
        return [self.claim, self.measured, "reported", self.bound._asdict()]

    @classmethod
    def read(cls, kept: Sequence[Any]) -> "Verdict":
        """What `kept` gave. Raises ValueError as the constructor does, so that data cannot say what no run could."""
        claim, measured, threshold, last = kept
        if isinstance(last, bool):
            return cls(claim, measured, threshold, last)
        return cls(claim, measured, "", True, Bound(**last))


class Measured(NamedTuple):
    """What a row's measurement gives: verdicts, the data behind them, and figures as (name, matplotlib figure)."""

    verdicts: list[Verdict]
    data: dict[str, Any]
    figures: dict[str, Any]  # file stem -> matplotlib Figure


def at_most(claim: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Passes where value <= limit; a NaN fails."""
    return Verdict(claim, f"{value:.4g}{unit}", f"<= {limit:g}{unit}", bool(value <= limit))


def at_least(claim: str, value: float, limit: float, unit: str = "", most: float = math.inf, reason: str = "") -> Verdict:
    """Passes where value >= limit; a NaN fails. Below the limit it is reported where no method of its kind can reach that.

    Args:
        claim: what is claimed.
        value: what was measured.
        limit: its threshold.
        unit: of both.
        most: what no method of its kind can exceed, computed in the same run. Where it is not below the limit it does not show
            that, and where `value` exceeds it it is no bound: the claim keeps its threshold.
        reason: which kind that is, and what `most` is made of.
    """
    measured = f"{value:.4g}{unit}"
    if value <= most < limit:
        return Verdict(claim, measured, "", True, Bound(float(most), limit, unit, reason))
    threshold = f">= {limit:g}{unit}"
    if value < limit <= most < math.inf:
        threshold += f", within what is possible: at most {most:.4g}{unit}"
    return Verdict(claim, measured, threshold, bool(value >= limit))
