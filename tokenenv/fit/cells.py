"""A row of data, and what its columns may hold, read with care: numbers, lists, and spans."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from numbers import Real
from reprlib import repr as short
from typing import Any

import numpy as np
from torch import Tensor

from tokenenv.errors import InvalidArgument

Span = tuple[int, int, float]
"""The first character, the end, and the label of the characters between."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data."""

    where: str
    """Its place, such as "pairs.jsonl:12"."""
    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether the column is there and not null."""
        return self.values.get(name) is not None

    def first(self, *names: str) -> str | None:
        """Return the first of the columns that is there."""
        return next((name for name in names if self.has(name)), None)

    def label(self, name: str) -> str:
        """Return the place of a column, for errors."""
        return f"{self.where}: {name!r}"

    def lacks(self, wanted: str) -> InvalidArgument:
        """Return the error of a row without the columns that are `wanted`."""
        there = ", ".join(f"{name!s:.80}" for name, one in self.values.items() if one is not None)
        return InvalidArgument(f"{self.where} has the columns {there or '(none)'}; {wanted}.")


def number(value: Any, label: str, bounds: tuple[float, float] | None = None) -> float:
    """Return a finite number, within `bounds`; True is 1 and False is 0."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    low, high = bounds or (-math.inf, math.inf)
    try:
        found = float(value) if isinstance(value, Real | Decimal) else math.nan
    except (OverflowError, ValueError):
        found = math.nan
    # float32 has no more than this.
    if abs(found) <= float(np.finfo(np.float32).max) and low <= found <= high:
        return found
    allowed = f"a number from {low:g} to {high:g}" if bounds else "a finite number"
    raise InvalidArgument(f"{label} is {short(value)}; it must be {allowed}.")


def listed(value: Any, label: str) -> list[Any]:
    """Return the entries of a list or an array."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim:
        return list(value.tolist())
    if isinstance(value, list | tuple):
        return list(value)
    raise InvalidArgument(f"{label} is {short(value)}; it must be a list.")


def numbers(value: Any, label: str, bounds: tuple[float, float] | None = None) -> np.ndarray:
    """Return the finite numbers of a list, float64; NaN where an entry is null: nothing is known
    there."""
    found = [
        math.nan if one is None else number(one, f"{label}[{i}]", bounds)
        for i, one in enumerate(listed(value, label))
    ]
    return np.array(found, np.float64)


def flags(value: Any, label: str) -> np.ndarray:
    """Return the entries of a list of 0 and 1, or of booleans, as bool."""
    found = [number(one, f"{label}[{i}]") for i, one in enumerate(listed(value, label))]
    wrong = next((one for one in found if one not in (0.0, 1.0)), None)
    if wrong is not None:
        raise InvalidArgument(f"{label} holds {wrong:g}; allowed: 0 and 1.")
    return np.array(found, bool)


def spans_of(value: Any, length: int, label: str) -> list[Span]:
    """Return the spans of a list of {"start": ..., "end": ..., "label": ...}, within a text of
    `length` characters. `end` is the first character behind the span."""
    found = [_span(one, length, f"{label}[{i}]") for i, one in enumerate(listed(value, label))]
    found.sort()
    for (_, end, _), (start, _, _) in pairwise(found):
        if start < end:
            raise InvalidArgument(f"{label} holds spans that overlap, at character {start}.")
    return found


def _span(value: Any, length: int, label: str) -> Span:
    if not isinstance(value, Mapping) or not {"start", "end", "label"} <= set(value):
        raise InvalidArgument(
            f'{label} is {short(value)}; it must be {{"start": ..., "end": ..., "label": ...}}.'
        )
    start, end = (number(value[key], f"{label}.{key}") for key in ("start", "end"))
    if not (start == int(start) and end == int(end) and 0 <= start < end <= length):
        raise InvalidArgument(
            f"{label} goes from {start:g} to {end:g}; it must be within the response, which has "
            f"the characters 0 to {length}."
        )
    return int(start), int(end), number(value["label"], f"{label}.label", (0.0, 1.0))
