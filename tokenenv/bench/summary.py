"""What a grid has found in few lines: one for each environment and row, and one for each pair of
rows."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tokenenv.bench.grid import ALL, Grid
from tokenenv.bench.statistics import bootstrap, improvement, iqm_difference, iqm_of
from tokenenv.bench.table import Line, unified

AT_THE_END = ("gold", "share", "regret", "objective", "kl", "length", "train_gap")
"""Columns of which the summary has the interquartile mean over seeds, at the last evaluation."""
Runs = dict[tuple[str, str], dict[int, list[Line]]]
"""The lines of each environment and row, seed by seed."""


def summarise(grid: Grid, lines: Sequence[Line]) -> list[Line]:
    """Return a line for each environment and row: the figures at the end of the runs, over seeds,
    with intervals, and the tokens to the environment's goal.

    Rows that were run in several environments with a known optimum have a line more, for all of
    them, with the share alone.
    """
    runs = runs_of(lines)
    found = [_line(grid, task, row, runs.get((task, row), {})) for task, row in grid.places()]
    return unified(found + list(_over_tasks(grid, runs)))


def compare(grid: Grid, lines: Sequence[Line]) -> list[Line]:
    """Return a line for each environment and ordered pair of rows: the probability that a run of
    `row` ends better than one of `other`, and the difference of the interquartile means.

    What is compared is the column of the environment's goal; gold where that is not known.
    """
    runs, places = runs_of(lines), grid.places()
    found: list[Line] = []
    for task in dict.fromkeys(task for task, _ in places):
        rows = [row for place, row in places if place == task]
        column = measured(grid, task, runs)
        values = {row: ends(runs.get((task, row), {}), column) for row in rows}
        for row in rows:
            for other in rows:
                if row != other and len(values[row]) and len(values[other]):
                    found.append(_pair(task, row, other, column, values))
    return found


def runs_of(lines: Sequence[Line]) -> Runs:
    """Return the lines of finished cells by environment, row and seed."""
    runs: Runs = {}
    for line in lines:
        if line["status"] == "finished":
            runs.setdefault((line["task"], line["row"]), {}).setdefault(line["seed"], []).append(
                line
            )
    return runs


def measured(grid: Grid, task: str, runs: Runs) -> str:
    """Return the column by which the rows of an environment are compared."""
    column = grid.goal(task)[0]
    here = [seeds for (place, _), seeds in runs.items() if place == task]
    return column if any(len(ends(seeds, column)) for seeds in here) else "gold"


def ends(seeds: Mapping[int, list[Line]], column: str) -> np.ndarray:
    """Return what is known of a column at the end of each run."""
    last = [lines[-1].get(column) for lines in seeds.values()]
    return np.array([value for value in last if value is not None], dtype=np.float64)


def _line(grid: Grid, task: str, row: str, seeds: Mapping[int, list[Line]]) -> Line:
    line: Line = {"task": task, "row": row, "cells": len(grid.seeds), "finished": len(seeds)}
    for column in AT_THE_END:
        line |= _interval(column, [ends(seeds, column)])
    line |= _to_goal(grid, task, list(seeds.values()))
    for column in ("tokens", "reward_tokens", "cpu_seconds"):
        values = ends(seeds, column)
        line[column] = float(np.median(values)) if len(values) else None
    return line


def _interval(column: str, strata: Sequence[np.ndarray]) -> Line:
    """Return the interquartile mean of a column with its interval; None each without a value, and
    no interval of a single one."""
    names = (column, f"{column}_low", f"{column}_high")
    count = sum(map(len, strata))
    if not count:
        return dict.fromkeys(names)
    found = bootstrap(iqm_of, strata)
    return dict(zip(names, found if count > 1 else (found.value, None, None), strict=True))


def _to_goal(grid: Grid, task: str, runs: Sequence[list[Line]]) -> Line:
    """Return how many runs reached the goal, and the medians of the tokens that they took. A run
    that did not get there counts as one that takes forever, so a median may be empty."""
    column, bound = grid.goal(task)
    line: Line = {"goal": None, "goal_bound": None, "reached": None}
    line |= {"tokens_to_goal": None, "reward_tokens_to_goal": None, "budget": None}
    known = [lines for lines in runs if lines[-1].get(column) is not None]
    if runs:
        line["budget"] = max(lines[0]["total_tokens"] for lines in runs)
    if not known:
        return line
    first = [next((one for one in lines if _is_there(one, column, bound)), None) for lines in known]
    line |= {"goal": column, "goal_bound": bound, "reached": sum(one is not None for one in first)}
    for name in ("tokens", "reward_tokens"):
        taken = [math.inf if one is None else one.get(name) for one in first]
        known_taken = [value for value in taken if value is not None]
        if len(known_taken) == len(taken):
            median = statistics.median_high(known_taken)
            line[f"{name}_to_goal"] = None if math.isinf(median) else median
    return line


def _is_there(line: Line, column: str, bound: float) -> bool:
    value = line.get(column)
    return value is not None and value >= bound


def _over_tasks(grid: Grid, runs: Runs) -> Iterator[Line]:
    """Yield a line for each row that was run in all environments whose optimum is known, where
    there are several."""
    places = grid.places()
    known = {task for (task, _), seeds in runs.items() if len(ends(seeds, "share"))}
    for row in grid.row_labels():
        here = [task for task, label in places if label == row and task in known]
        strata = [ends(runs.get((task, row), {}), "share") for task in here]
        if len(known) > 1 and len(here) == len(known) and all(map(len, strata)):
            counts = {"cells": len(grid.seeds) * len(here), "finished": sum(map(len, strata))}
            yield {"task": ALL, "row": row, **counts, **_interval("share", strata)}


def _pair(task: str, row: str, other: str, column: str, values: Mapping[str, Any]) -> Line:
    one, two = [values[row]], [values[other]]
    chance, difference = bootstrap(improvement, one, two), bootstrap(iqm_difference, one, two)
    return {
        "task": task,
        "row": row,
        "other": other,
        "column": column,
        "probability": chance.value,
        "probability_low": chance.low,
        "probability_high": chance.high,
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "runs": len(values[row]),
        "other_runs": len(values[other]),
    }
