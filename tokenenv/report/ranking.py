"""Figures of who leads: where each row ends, and how many tokens it took to the goal."""

from collections.abc import Sequence

from tokenenv.bench.grid import ALL
from tokenenv.report.curves import At
from tokenenv.report.figure import Figure, Line, Panel, Series
from tokenenv.report.reading import Found
from tokenenv.report.words import all_of, figure, listed

NAMES = {
    "gold": "gold score",
    "share": "share of the way to the optimum",
    "score": "sequence score",
    "objective": "J = gold - beta KL",
    "regret": "regret J* - J",
}
"""What the columns are called along an axis."""


def leaderboard(found: Found) -> Figure:
    """Return where each row ends, with its interval, environment by environment."""
    tasks = dict.fromkeys(line["task"] for line in found.summary)
    panels, table = [], []
    for task in tasks:
        column = found.measured.get(task, "share" if task == ALL else "gold")
        lines = [line for line in found.summary if line["task"] == task]
        known = [line for line in ranked(lines, column) if line.get(column) is not None]
        table += [_chosen(line, column) for line in ranked(lines, column)]
        series = [
            Series(line["row"], [At(place, *_interval(line, column))], lying=True)
            for place, line in enumerate(reversed(known))
        ]
        if known:
            names = [line["row"] for line in reversed(known)]
            panels.append(Panel(task, series, NAMES.get(column, column), "", names=names))
    return Figure(
        "leaderboard",
        "Where each row ends",
        all_of(_best(found, task) for task in found.tasks),
        "A mark is the interquartile mean over seeds at the end of the runs, and the bar its 95% "
        "bootstrap interval. Rows whose bars overlap are not told apart by so few seeds.",
        panels,
        table,
    )


def ranked(lines: Sequence[Line], column: str) -> list[Line]:
    """Return the lines of a summary, the best first and those without a value last."""
    return sorted(lines, key=lambda line: _order(line.get(column)))


def _order(value: float | None) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else -value


def _best(found: Found, task: str) -> str:
    column = found.measured[task]
    lines = [line for line in found.summary if line["task"] == task]
    known = [line for line in ranked(lines, column) if line.get(column) is not None]
    if not known:
        return f"No run has finished in {task}."
    first = known[0]
    near = [line for line in known[1:] if _overlap(line, first, column)]
    said = f"In {task}, {first['row']} ends highest: {column} {figure(first, column)}"
    return f"{said}; {len(near)} other rows overlap with it." if near else f"{said}."


def _overlap(line: Line, first: Line, column: str) -> bool:
    """Return whether the interval of a line reaches that of the first one."""
    low, high = first.get(f"{column}_low"), line.get(f"{column}_high")
    return low is not None and high is not None and high >= low


def _interval(line: Line, column: str) -> tuple[float, float | None, float | None, int]:
    low, high = line.get(f"{column}_low"), line.get(f"{column}_high")
    return line[column], low, high, line.get("finished") or 0


def _chosen(line: Line, column: str) -> Line:
    ends = {name: line.get(f"{column}{end}") for name, end in zip(ENDS, ENDINGS, strict=True)}
    counts = {name: line.get(name) for name in ("cells", "finished")}
    return {"task": line["task"], "row": line["row"], "column": column, **ends, **counts}


ENDS, ENDINGS = ("value", "low", "high"), ("", "_low", "_high")


def tokens_to_goal(found: Found) -> Figure:
    """Return how many tokens each row took to the goal. Rows that did not get there stand at the
    budget."""
    panels, table = [], []
    for task in found.tasks:
        lines = [line for line in found.summary if line["task"] == task]
        lines = [line for line in lines if line.get("goal") and line.get("budget")]
        lines = sorted(lines, key=lambda line: _order_of_arrival(line), reverse=True)
        names = ("task", "row", "goal", "goal_bound", "tokens_to_goal", "reached", "finished")
        table += [{name: line.get(name) for name in (*names, "budget")} for line in lines[::-1]]
        series = [
            Series(
                line["row"],
                [At(place, line["tokens_to_goal"] or line["budget"], None, None, 0)],
                lying=True,
                arrived=line["tokens_to_goal"] is not None,
            )
            for place, line in enumerate(lines)
        ]
        if lines:
            goal = f"tokens to {lines[0]['goal']} {lines[0]['goal_bound']:g}"
            rows = [line["row"] for line in lines]
            panels.append(Panel(task, series, goal, "", log="x", names=rows))
    return Figure(
        "tokens-to-goal",
        "Tokens to the goal",
        all_of(_arrived(found, task) for task in found.tasks),
        "A mark is the median over seeds. An empty arrow stands at the end of the budget: half of "
        "the runs or more did not get there, and nothing says that they would.",
        panels,
        table,
    )


def _order_of_arrival(line: Line) -> tuple[bool, float]:
    taken = line.get("tokens_to_goal")
    return taken is None, taken or -(line.get("reached") or 0)


def _arrived(found: Found, task: str) -> str:
    lines = [line for line in found.summary if line["task"] == task and line.get("goal")]
    there = [line for line in lines if line.get("tokens_to_goal") is not None]
    if not lines:
        return ""
    counted = f"In {task}, {len(there)} of {len(lines)} rows got there"
    if not there:
        return f"{counted}."
    least = min(line["tokens_to_goal"] for line in there)
    first = listed([line["row"] for line in there if line["tokens_to_goal"] == least])
    return f"{counted}, the fastest after {least:,} tokens: {first}."
