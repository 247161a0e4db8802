"""The summary as tables for a terminal."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rich.table import Table
from rich.text import Text

from tokenenv.bench.grid import Grid
from tokenenv.bench.table import Line
from tokenenv.safety.shown import visible


def tables(grid: Grid, summary: Sequence[Line], comparisons: Sequence[Line]) -> Iterator[Table]:
    """Yield a table for each environment, and one for all of them together."""
    for task in dict.fromkeys(line["task"] for line in summary):
        lines = [line for line in summary if line["task"] == task]
        baseline = _baseline(grid, lines)
        better = {
            line["row"]: line
            for line in comparisons
            if line["task"] == task and line["other"] == baseline
        }
        yield _table(task, lines, baseline, better)


def _baseline(grid: Grid, lines: Sequence[Line]) -> str:
    rows = [line["row"] for line in lines]
    return grid.baseline if grid.baseline is not None and grid.baseline in rows else rows[0]


def _table(task: str, lines: Sequence[Line], baseline: str, better: dict[str, Line]) -> Table:
    """Return the table of one environment. Figures are interquartile means over seeds, with 95%
    intervals."""
    columns: dict[str, Callable[[Line], str]] = {"runs": _runs}
    columns |= {
        name: partial(figure, name=name)
        for name in ("gold", "share", "kl")
        if any(line.get(name) is not None for line in lines)
    }
    goals = {(line["goal"], line["goal_bound"]) for line in lines if line.get("goal")}
    for goal, bound in goals:
        columns[f"tokens to {goal} {bound:g}"] = to_goal
    if better:
        columns[f"better than {baseline}"] = lambda line: _better(better.get(line["row"]))
    made = Table("", *map(visible, columns), title=Text(visible(task)), title_justify="left")
    for line in lines:
        made.add_row(visible(line["row"]), *(cell(line) for cell in columns.values()))
    return made


def figure(line: Line, name: str) -> str:
    """Say a figure with its interval."""
    value, low, high = (line.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    digits = 1 if name in ("kl", "length") else 2
    interval = "" if low is None else f" ({low:z.{digits}f} to {high:z.{digits}f})"
    return f"{value:z.{digits}f}{interval}"


def to_goal(line: Line) -> str:
    """Say how many tokens the goal took. Runs that did not get there are counted, not dropped."""
    if line.get("reached") is None:
        return ""
    reached = f"({line['reached']} of {line['finished']})"
    if line["tokens_to_goal"] is None:
        return f"not reached in {line['budget']:,} {reached}"
    return f"{line['tokens_to_goal']:,} {reached}"


def _runs(line: Line) -> str:
    return (
        f"{line['finished']}"
        if line["finished"] == line["cells"]
        else (f"{line['finished']} of {line['cells']}")
    )


def _better(line: Line | None) -> str:
    if line is None:
        return ""
    low, high = line["probability_low"], line["probability_high"]
    return f"{line['probability']:.0%} ({low:.0%} to {high:.0%})"
