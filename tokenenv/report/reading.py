"""The folder of a bench as the report reads it: as data, whoever made it.

The tables are enough. What only the files of the cells hold, texts and credit and commands, is left
out where there are none.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenenv.bench.measure import COLUMNS
from tokenenv.bench.play import TRAINED
from tokenenv.bench.store import GRID
from tokenenv.bench.summary import AT_THE_END, Runs, runs_of
from tokenenv.errors import InvalidArgument
from tokenenv.safety.values import from_yaml

Line = dict[str, Any]
COUNTS = (
    *("point", "seed", "tokens", "updates", "train_texts", "cells", "finished", "reached"),
    *("tokens_to_goal", "reward_tokens_to_goal", "budget", "runs", "other_runs"),
    *("policy_weights", "trained_weights", "total_tokens", "num_envs"),
)
"""Columns of whole numbers."""
NUMBERS = {
    *COUNTS,
    *(name for name in COLUMNS if name != "method"),
    *TRAINED,
    *(f"{name}{end}" for name in AT_THE_END for end in ("", "_low", "_high")),
    *(f"{name}{end}" for name in ("probability", "difference") for end in ("", "_low", "_high")),
    "reward_tokens",
    "seconds",
    "cpu_seconds",
    "goal_bound",
    "train_credit",
}
"""Columns of numbers; all others are words."""


@dataclass(frozen=True)
class Found:
    """What a bench has found."""

    folder: Path
    grid: Mapping[str, Any]
    """What grid.yaml says: name, about, baseline and the rest."""
    lines: list[Line]
    """The tidy table."""
    summary: list[Line]
    comparisons: list[Line]
    records: dict[str, Mapping[str, Any]]
    """What is in the files of the finished cells, by their keys."""
    damage: str = ""
    """What is wrong with grid.yaml, and what that costs, for the page; empty where it was read."""

    @cached_property
    def runs(self) -> Runs:
        """The lines of finished cells by environment, row and seed."""
        return runs_of(self.lines)

    @cached_property
    def tasks(self) -> list[str]:
        """The labels of the environments, in their order."""
        return list(dict.fromkeys(line["task"] for line in self.lines))

    @cached_property
    def rows(self) -> list[str]:
        """The labels of the rows, in their order."""
        return list(dict.fromkeys(line["row"] for line in self.lines))

    @cached_property
    def failed(self) -> list[Line]:
        """The lines of the cells that failed."""
        return [line for line in self.lines if line["status"] == "failed"]

    @cached_property
    def measured(self) -> dict[str, str]:
        """The column by which the rows of each environment are compared."""
        found = {line["task"]: line["column"] for line in self.comparisons}
        goals = {line["task"]: line["goal"] for line in self.summary if line.get("goal")}
        chosen = {task: found.get(task) or goals.get(task) or "gold" for task in self.tasks}
        return {task: name if name in AT_THE_END else "gold" for task, name in chosen.items()}

    def cells(self) -> Iterator[tuple[Line, Mapping[str, Any] | None]]:
        """Yield a line of each cell, its last one, with its record; None where that is not
        there."""
        last = {(line["task"], line["row"], line["seed"]): line for line in self.lines}
        for line in last.values():
            yield line, self.records.get(line["cell"])


def read(folder: Path) -> Found:
    """Return what the folder of a bench holds.

    Raises:
        InvalidArgument: it holds no table, or one that cannot be read.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise InvalidArgument(
            f"results={str(folder)!r} has no results.csv; `tokenenv bench` makes such folders."
        )
    lines = _table(path)
    if not lines or not {"status", "seed", "cell"} <= set(lines[0]):
        raise InvalidArgument(f"{path} holds no cell that has ended.")
    grid, damage = _grid(folder / GRID)
    return Found(
        folder,
        grid,
        lines,
        _table(folder / "summary.csv"),
        _table(folder / "comparisons.csv", ("task", "row", "other", "column")),
        {key: record for key in {line["cell"] for line in lines} if (record := _cell(folder, key))},
        damage,
    )


def _grid(path: Path) -> tuple[dict[str, Any], str]:
    """Return what grid.yaml says, or nothing and a sentence about it: the figures need only the
    tables."""
    reason = "holds no mapping of names to values"
    try:
        values = from_yaml(_text(path), "")
        if isinstance(values, dict):
            return values, ""
    except FileNotFoundError:
        reason = "is missing"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except InvalidArgument as error:
        reason = str(error).strip().removesuffix(".")
    return {}, (
        f"{path.name} {reason}. So the name of the grid and what it asks are not known here, its "
        "first row is taken for the baseline, and no command runs the whole grid again. The "
        "command that ran the bench writes it anew."
    )


def _table(path: Path, needed: Sequence[str] = ("task", "row")) -> list[Line]:
    """Return the lines of a CSV file that say what is needed; none where there is no file."""
    if not path.is_file():
        return []
    try:
        lines = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:
        raise InvalidArgument(
            f"{path} cannot be read as CSV: {error}; the command that ran the bench writes it anew."
        ) from error
    found = (
        {name: _value(name, text or "") for name, text in line.items() if name is not None}
        for line in lines
    )
    return [line for line in found if all(line.get(name) for name in needed)]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _value(name: str, text: str) -> Any:
    """Return what a field holds: a number, a word, or None where it is empty or no number."""
    if name not in NUMBERS:
        return text or None
    return number(text, whole=name in COUNTS)


def number(value: Any, whole: bool = False) -> Any:
    """Return a finite number, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(found):
        return None
    return int(found) if whole else found


def _cell(folder: Path, key: Any) -> Mapping[str, Any] | None:
    """Return the record of a cell; None where there is none that can be read."""
    if not isinstance(key, str) or not key.isalnum():
        return None
    try:
        found = json.loads(_text(folder / "cells" / f"{key}.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
