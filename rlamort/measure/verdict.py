"""Verdicts on claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """The most that any method of a kind can reach, computed in the run that measured the claim."""

    most: float
    asked: float  # the claim's threshold, which `most` shows to be out of reach
    unit: str
    reason: str  # the kind of method, and how the bound is computed

    def __str__(self) -> str:
        return f"at most {self.most:.4g}{self.unit}, and {self.asked:g}{self.unit} was asked: {self.reason}"


@dataclass(frozen=True)
class Verdict:
    """A claim with its measurement: judged by a threshold, or reported, since a bound shows that no method can pass.

    Args:
        claim: the claim.
        measured: the measured value.
        threshold: its threshold; empty if it is reported.
        passed: whether it meets its threshold; true if it is reported.
        bound: why it is reported; None if it has a threshold.
        missing: the measurements that it lacks, without which it is incomplete; empty if it has all.

    Raises:
        ValueError: it has neither threshold nor bound, or both, or its bound does not show that the claim is out of reach;
            or it passes and is incomplete.
    """

    claim: str
    measured: str
    threshold: str
    passed: bool
    bound: Bound | None = None
    missing: str = ""

    def __post_init__(self) -> None:
        if self.missing and self.passed:
            raise ValueError(f"{self.claim}: it lacks measurements ({self.missing}), and so does not pass")
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
        """Pass, FAIL, reported or incomplete."""
        if self.bound is not None:
            return "reported"
        if self.missing:
            return "incomplete"
        return "pass" if self.passed else "FAIL"

    @property
    def limit(self) -> str:
        """Its threshold, or the reason for none."""
        return self.threshold if self.bound is None else f"none: {self.bound}"

    def __str__(self) -> str:
        return f"{self.outcome}  {self.claim}\n      measured {self.measured}; threshold {self.limit}"

    def values(self) -> list[Any]:
        """As JSON values; a reported one ends in the fields of its bound, an incomplete one in what it lacks."""
        if self.missing:
            return [self.claim, self.measured, self.threshold, self.missing]
        if self.bound is None:
            return [self.claim, self.measured, self.threshold, self.passed]
        return [self.claim, self.measured, "reported", self.bound._asdict()]

    @classmethod
    def read(cls, values: Sequence[Any]) -> "Verdict":
        """From what `values` returns. Raises ValueError as the constructor does."""
        claim, measured, threshold, last = values
        if isinstance(last, bool):
            return cls(claim, measured, threshold, last)
        if isinstance(last, str):
            return cls(claim, measured, threshold, False, missing=last)
        return cls(claim, measured, "", True, Bound(**last))


class Measured(NamedTuple):
    """The result of a measurement: verdicts, their data, and figures."""

    verdicts: list[Verdict]
    data: dict[str, Any]
    figures: dict[str, Any]  # file stem -> matplotlib Figure


def at_most(claim: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Passes if value <= limit; a NaN fails."""
    return Verdict(claim, f"{value:.4g}{unit}", f"<= {limit:g}{unit}", bool(value <= limit))


def at_least(claim: str, value: float, limit: float, unit: str = "", most: float = math.inf, reason: str = "") -> Verdict:
    """Passes if value >= limit; a NaN fails. Below the limit it is reported if no method of its kind can reach that.

    Args:
        claim: the claim.
        value: the measured value.
        limit: its threshold.
        unit: of both.
        most: an upper bound for every method of its kind, computed in the same run. If it is not below the limit, or `value`
            exceeds it, the claim keeps its threshold.
        reason: the kind of method, and how `most` is computed.
    """
    measured = f"{value:.4g}{unit}"
    if value <= most < limit:
        return Verdict(claim, measured, "", True, Bound(float(most), limit, unit, reason))
    threshold = f">= {limit:g}{unit}"
    if value < limit <= most < math.inf:
        threshold += f", within what is possible: at most {most:.4g}{unit}"
    return Verdict(claim, measured, threshold, bool(value >= limit))
