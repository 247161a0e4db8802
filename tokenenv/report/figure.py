"""What a figure is, before it is drawn: panels of series, with a line of a table for each mark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenenv.report.curves import At

Line = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """The marks of one row."""

    row: str | None
    """The row's label, which gives it colour, marker and dashes; None is a dark line of its own."""
    points: Sequence[At]
    lying: bool = False
    """Whether the value is along x and the place along y, as in a list of rows."""
    arrived: bool = True
    """Whether the runs got there; a mark that did not is an empty arrow to the right."""


@dataclass(frozen=True)
class Panel:
    """A pair of axes."""

    title: str
    series: Sequence[Series]
    x: str
    y: str
    """What is along the axes, with units."""
    log: str = ""
    """The axes with a logarithmic scale, "x", "y" or "xy"."""
    names: Sequence[str] = ()
    """What the places 0, 1, ... along y are called, where they are no numbers."""
    bands: bool = True
    """Whether lines have bands; a line that turns back along x has none."""
    gaps: bool = False
    """Whether x is counted by ones, and a number that is missing breaks the line."""
    zero: bool = False
    """Whether 0 along y has a line."""


@dataclass(frozen=True)
class Figure:
    """A figure with its words and its table."""

    name: str
    """Of its files and of its anchor."""
    title: str
    says: str
    """What it shows here, in a sentence."""
    how: str
    """How it is read."""
    panels: Sequence[Panel]
    table: Sequence[Line] = field(repr=False)
    """A line for each mark."""
