"""Figures of credit: what tokens were given, beside the exact advantage where that is known."""

from collections.abc import Mapping
from typing import Any

from tokenenv.report.curves import At, curves, over_seeds
from tokenenv.report.figure import Figure, Line, Panel, Series
from tokenenv.report.reading import Found, number
from tokenenv.report.words import all_of, highest

POSITION = "position of the token in its text"
FIRST = "of the first update, whose texts the reference wrote"
Rows = dict[str, list[At]]


def credit_figures(found: Found) -> list[Figure]:
    """Return how credit agrees with the exact one, position by position and over training, and
    where in the text it is."""
    return [_agreement(found), _places(found), _over_training(found)]


def _agreement(found: Found) -> Figure:
    panels, table, words = [], [], []
    for task in found.tasks:
        rows = _by_position(found, task, "correlation")
        overall = _overall(found, task)
        if rows:
            series = [Series(row, points) for row, points in rows.items()]
            panels.append(Panel(task, series, POSITION, "correlation", gaps=True, zero=True))
            table += _table(task, rows, "correlation")
        if rows and overall:
            best = highest(overall)
            words.append(f"In {task}, {best} agrees best over all tokens: {overall[best]:.2f}.")
    return Figure(
        "credit-by-position",
        "Credit against the exact advantage, by position",
        all_of(words),
        f"The correlation, over texts, of the advantage that was learnt from with the exact one, "
        f"{FIRST}: 1 is right, 0 is noise. Positions where either does not vary have no mark. "
        "Lines and bands are as above.",
        panels,
        table,
    )


def _places(found: Found) -> Figure:
    panels, table, words = [], [], []
    for task in found.tasks:
        rows = _by_position(found, task, "learnt_size")
        exact = _by_position(found, task, "exact_size")
        if not rows or not exact:
            continue
        truth = next(iter(exact.values()))
        series = [Series(row, points) for row, points in rows.items()]
        series.append(Series(None, truth))
        panels.append(Panel(task, series, POSITION, "size, relative to the mean"))
        table += _table(task, {**rows, "(exact)": truth}, "size")
        most = max(truth, key=lambda at: at.value)
        words.append(f"In {task}, position {most.x:g} matters most.")
    return Figure(
        "credit-places",
        "Where in the text credit is",
        all_of(words),
        "The mean size of the advantages at a position, relative to that of all positions, "
        f"{FIRST}. The dark dashed line is the exact advantage: credit that lies elsewhere is "
        "noise to be averaged out.",
        panels,
        table,
    )


def _over_training(found: Found) -> Figure:
    panels, table, words = [], [], []
    for task in found.tasks:
        rows = curves(found, task, "train_credit")
        if rows:
            series = [Series(row, points) for row, points in rows.items()]
            along = "tokens that the policy has written"
            panels.append(Panel(task, series, along, "correlation", zero=True))
            table += _table(task, rows, "train_credit", "tokens")
            ends = {row: points[-1].value for row, points in rows.items()}
            words.append(f"In {task}, {highest(ends)} agrees best at the end.")
    return Figure(
        "credit-over-training",
        "Credit against the exact advantage, over training",
        all_of(words),
        "The correlation, over the tokens that were learnt from since the evaluation before, of "
        "their advantages with those of the optimum. Lines and bands are as above.",
        panels,
        table,
    )


def _credits(found: Found, task: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return the `credit` of each row's cells in an environment."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for line, record in found.cells():
        credit = (record or {}).get("credit")
        if line["task"] == task and isinstance(credit, dict):
            rows.setdefault(line["row"], []).append(credit)
    return rows


def _by_position(found: Found, task: str, name: str) -> Rows:
    """Return, for each row, a number of each position over seeds."""
    made: Rows = {}
    for row, credits in _credits(found, task).items():
        lists = [credit[name] for credit in credits if isinstance(credit.get(name), list)]
        points = []
        for place in range(max(map(len, lists), default=0)):
            values = [number(one[place]) for one in lists if len(one) > place]
            known = [value for value in values if value is not None]
            points += [over_seeds(place + 1, known)] if known else []
        if points:
            made[row] = points
    return made


def _overall(found: Found, task: str) -> dict[str, float]:
    made = {}
    for row, credits in _credits(found, task).items():
        values = [number(credit.get("overall")) for credit in credits]
        known = [value for value in values if value is not None]
        if known:
            made[row] = over_seeds(0, known).value
    return made


def _table(task: str, rows: Rows, column: str, along: str = "position") -> list[Line]:
    return [
        {
            "task": task,
            "row": row,
            along: at.x,
            column: at.value,
            f"{column}_low": at.low,
            f"{column}_high": at.high,
            "runs": at.runs,
        }
        for row, points in rows.items()
        for at in points
    ]
