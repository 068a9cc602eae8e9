"""Timing of calls in claims."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(call: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    """Median seconds of a call over `repeats`, after `warm` discarded ones."""
    return statistics.median(_seconds(call, repeats)[warm:])


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, which is least affected by other load."""
    return min(_seconds(call, repeats))


def _seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
