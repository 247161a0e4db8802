"""Medians of interleaved repetitions, so that whatever else the machine does falls on all
candidates alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    candidates: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each candidate by a clock. The candidates run in turn,
    `repetitions` times after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, run in candidates.items():
            started = clock()
            run()
            if repetition:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
