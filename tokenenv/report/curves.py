"""Numbers over seeds: interquartile means with intervals, evaluation by evaluation."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenenv.bench.statistics import bootstrap, iqm_of
from tokenenv.report.reading import Found, Line


class At(NamedTuple):
    """A number at one evaluation."""

    x: float
    value: float
    low: float | None
    high: float | None
    """Its 95% bootstrap interval; None for one run alone."""
    runs: int
    """How many there are."""


def over_seeds(x: float, values: Sequence[float]) -> At:
    """Return the interquartile mean of some values with its interval."""
    found = bootstrap(iqm_of, [np.asarray(values, dtype=float)])
    low, high = (found.low, found.high) if len(values) > 1 else (None, None)
    return At(x, found.value, low, high, len(values))


def curve(seeds: Mapping[int, Sequence[Line]], column: str, along: str = "tokens") -> list[At]:
    """Return a column along another one, which is averaged; evaluations are matched by their
    number, and those where either is not known are left out."""
    at: dict[int, list[tuple[float, float]]] = {}
    for lines in seeds.values():
        for line in lines:
            if line.get(column) is not None and line.get(along) is not None:
                at.setdefault(line["point"], []).append((line[along], line[column]))
    found = []
    for _, pairs in sorted(at.items()):
        x, values = zip(*pairs, strict=True)
        found.append(over_seeds(float(np.mean(x)), values))
    return found


def curves(found: Found, task: str, column: str, along: str = "tokens") -> dict[str, list[At]]:
    """Return the curve of each row in an environment that has one."""
    made = {
        row: curve(found.runs[task, row], column, along)
        for row in found.rows
        if (task, row) in found.runs
    }
    return {row: points for row, points in made.items() if points}
