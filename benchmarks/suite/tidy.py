"""Results of a question as a tidy table: a line for each setting and seed, and a printed table of
means over seeds with bootstrap intervals.

Scripts of this folder put its path in front of `sys.path` and import this file.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenenv.bench.statistics import Interval, Strata, bootstrap

console = Console(width=200)
Row = dict[str, Any]
SEED = "seed"


def mean_of(strata: Strata) -> np.ndarray:
    """Return the mean of all values together, along the last axis."""
    return np.concatenate(strata, axis=-1).mean(-1)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean over seeds with its 95% bootstrap interval."""
    return bootstrap(mean_of, [np.asarray(values, dtype=np.float64)])


def text_of(values: Iterable[float], digits: int = 2) -> str:
    """Return the mean over seeds with its interval, as "0.48 [0.45, 0.51]"; "-" where nothing is
    known. A mean below what the digits show is written as a power of ten."""
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return "-"
    mean, low, high = interval(known)
    if 0 < abs(mean) < 0.5 * 10**-digits:
        return f"{mean:.0e}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all lines, in the place of those of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def add(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line. The first one brings the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[Row]:
    """Return the lines of a file, numbers as numbers; nothing where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: number(value) for name, value in line.items()} for line in csv.DictReader(file)
        ]


def number(value: str) -> Any:
    """Return the number that a text holds, or the text."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def fill(
    path: Path, settings: Sequence[Row], work: Callable[[Row], Mapping[str, Any]]
) -> list[Row]:
    """Return a line for each of the settings: what the file has, and what `work` gives for the
    others, which is added to it at once. So a run that was stopped goes on where it was."""
    names = list(settings[0])
    done = {tuple(row[name] for name in names) for row in read(path)}
    left = [one for one in settings if tuple(one.values()) not in done]
    for count, one in enumerate(left, len(settings) - len(left) + 1):
        console.print(f"{count}/{len(settings)}", *one.values(), highlight=False)
        add(path, one | work(one))
    return read(path)


def print_table(
    rows: Sequence[Row], by: Sequence[str], figures: Mapping[str, int], title: str
) -> None:
    """Print the mean and the interval over seeds of each figure.

    Args:
        rows: the lines.
        by: the columns of a setting, in the order of the lines.
        figures: the columns of figures, with the digits to show.
        title: of the table; the number of seeds is added.
    """
    seeds = len({row[SEED] for row in rows})
    table = Table(*by, *figures, title=f"{title} ({seeds} seeds; mean and 95% bootstrap interval)")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    for key, group in groups.items():
        shown = [text_of((row[name] for row in group), digits) for name, digits in figures.items()]
        table.add_row(*map(str, key), *shown)
    console.print(table)
