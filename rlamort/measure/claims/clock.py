"""How the claims time a call."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(call: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    """Median seconds of a call, of `repeats` of which the first `warm` do not count."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])
