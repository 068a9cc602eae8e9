"""Statistics of methods over tasks and seeds, after Agarwal et al., 2021, for a few seeds.

The interquartile mean and the stratified bootstrap are in rlamort/score.py. S, T seeds of two methods, the same ones if paired.
They are written out here: rliable, the paper's library, pins an old release of arch, and brings pandas, statsmodels and
seaborn, for four short formulas.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import fdtri, stdtrit

from rlamort.score import Interval, interval

Groups = Sequence[np.ndarray]  # one array of values of each task


def improvement(ours: Groups, theirs: Groups) -> float:
    """The probability that a run of ours, (S,) a task, is above one of theirs, (T,), ties half; averaged over tasks.

    On one task it is the Mann-Whitney statistic over S T (Agarwal et al., 2021, section 4.2).
    """
    return float(np.mean([_above(a, b) for a, b in zip(ours, theirs, strict=True)]))


def improvement_interval(ours: Groups, theirs: Groups, draws: int = 2_000, seed: int = 0) -> Interval:
    """`improvement` with its 95 % percentile interval over draws of runs of either, within each task."""
    generator = np.random.default_rng(seed)
    drawn = [[generator.choice(group, (draws, len(group))) for group in groups] for groups in (ours, theirs)]
    low, high = np.percentile(np.mean([_above(a, b) for a, b in zip(*drawn, strict=True)], axis=0), [2.5, 97.5])
    return Interval(improvement(ours, theirs), float(low), float(high))


def _above(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...) shares of pairs of (..., S) and (..., T) in which the first is greater, ties half."""
    ours, theirs = a[..., :, None], b[..., None, :]
    return np.asarray(((ours > theirs) + 0.5 * (ours == theirs)).mean((-2, -1)))


def paired(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """The mean over seeds of ours (S,) minus theirs (S,), with the 95 % Student interval of the differences."""
    return interval(list(ours - theirs))


def welch(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """The mean of ours (S,) less that of theirs (T,), with Welch's 95 % interval, where a seed means nothing to both."""
    difference = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2:
        return Interval(difference, math.nan, math.nan)
    a, b = (float(np.var(one, ddof=1)) / len(one) for one in (ours, theirs))
    if a + b == 0:
        return Interval(difference, difference, difference)
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(a + b)
    return Interval(difference, difference - half, difference + half)


def spread(groups: Groups) -> float:
    """The root of the mean over tasks of the variance over seeds; NaN with a single seed."""
    if min(map(len, groups)) < 2:
        return math.nan
    return float(np.sqrt(np.mean([np.var(group, ddof=1) for group in groups])))


def tighter(ours: Groups, theirs: Groups) -> Interval:
    """How many times the spread of ours their spread is, with a 95 % interval by the F distribution.

    Its degrees of freedom are Satterthwaite's, since the variances of tasks differ.
    """
    (a, n), (b, m) = (_pooled(one) for one in (ours, theirs))
    if min(a, b, n, m) <= 0:
        return Interval(math.nan, math.nan, math.nan)
    low, high = (b / a / fdtri(m, n, share) for share in (0.975, 0.025))
    return Interval(math.sqrt(b / a), math.sqrt(low), math.sqrt(high))


def _pooled(groups: Groups) -> tuple[float, float]:
    """The mean over tasks of the variance over seeds, and its degrees of freedom; 0 with a single seed."""
    if min(map(len, groups)) < 2:
        return 0.0, 0.0
    variances = np.array([np.var(group, ddof=1) for group in groups])
    free = np.array([len(group) - 1 for group in groups])
    total = float((variances**2 / free).sum())
    return float(variances.mean()), float(variances.sum() ** 2 / total) if total else 0.0


def first(evaluations: Sequence[dict[str, Any]], target: float, measure: str) -> float:
    """`measure`, env_step or time/seconds, at the first evaluation that returns at least `target`; inf without one."""
    return next((float(one[measure]) for one in evaluations if one["eval/return"] >= target), math.inf)


def within(evaluations: Sequence[dict[str, Any]], most: float, measure: str) -> dict[str, Any]:
    """The last evaluation with at most so much of `measure`, env_step or time/seconds; the first if there is none."""
    return next((one for one in reversed(evaluations) if one[measure] <= most), evaluations[0])


def sooner(pairs: Sequence[Sequence[float]], ends: Sequence[float]) -> tuple[float, bool]:
    """How many times sooner one arrives than another: a median, NaN of none, and whether it is a lower bound.

    Args:
        pairs: when one arrives, and when the other does, inf for never. Who does not is 0 times sooner.
        ends: of the other's runs, with which one counts that does not arrive: it would have taken longer.
    """
    ratios = [min(theirs, end) / ours for (ours, theirs), end in zip(pairs, ends, strict=True)]
    bound = any(math.isfinite(ours) and math.isinf(theirs) for ours, theirs in pairs)
    return float(np.median(ratios)) if ratios else math.nan, bound


def shown(value: Interval, digits: str = ".2f") -> str:
    """A statistic with its interval, where it has one."""
    bounds = "" if math.isnan(value.low) else f" [{value.low:{digits}}, {value.high:{digits}}]"
    return f"{value.mean:{digits}}{bounds}"
