"""How the claims time a call."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(call: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    """Median seconds of a call, of `repeats` of which the first `warm` do not count."""
    return statistics.median(_seconds(call, repeats)[warm:])


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Those of the fastest of `repeats` calls: what they take by themselves, whatever else the machine did meanwhile."""
    return min(_seconds(call, repeats))


def _seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
