"""The figures of the report, from the tables."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tokenenv.report.credit import credit_figures
from tokenenv.report.curves import At, curves
from tokenenv.report.figure import Figure, Line, Panel, Series
from tokenenv.report.ranking import NAMES, leaderboard, tokens_to_goal
from tokenenv.report.reading import Found
from tokenenv.report.words import all_of, highest

TOKENS = "tokens that the policy has written"
MEAN = (
    "A line is the interquartile mean over seeds, and the band its 95% bootstrap interval; one run "
    "alone has no band."
)


def make_figures(found: Found) -> list[Figure]:
    """Return the figures of which something is known."""
    makers: list[Callable[[Found], Figure]] = [
        leaderboard,
        tokens_to_goal,
        learning_curves,
        regret,
        frontier,
        gap,
    ]
    made = [*(make(found) for make in makers), *credit_figures(found)]
    return [one for one in made if one.panels]


def learning_curves(found: Found) -> Figure:
    """Return gold against tokens."""
    return _along_tokens(
        found,
        "learning-curves",
        "Learning curves",
        "gold",
        f"Higher is better. {MEAN}",
        lambda task, lines: f"In {task}, {highest(_ends(lines))} has the highest gold at the end.",
    )


def regret(found: Found) -> Figure:
    """Return regret against tokens, where the optimum is known."""
    return _along_tokens(
        found,
        "regret",
        "Regret against tokens",
        "regret",
        "Regret is what the exact optimum has and the policy has not; lower is better, and an "
        f"equal step down is an equal factor. {MEAN}",
        lambda task, lines: (
            f"In {task}, {highest(_ends(lines), least=True)} has the least left to gain, "
            f"{min(_ends(lines).values()):.2g}."
        ),
        log="y",
    )


def gap(found: Found) -> Figure:
    """Return by how much the gap between the reward and the true metric has grown while
    learning."""
    found = replace(found, lines=with_growth(found))
    made = _along_tokens(
        found,
        "proxy-gap",
        "Proxy less gold, over training",
        GROWTH,
        "The gap is what the reward paid for a text less its gold. Designs pay on scales of their "
        "own, so what is drawn is its growth since the first evaluation: a line that rises says "
        f"that the reward is being exploited. The file has the gap itself. {MEAN}",
        lambda task, lines: _grown(task, _ends(lines)),
        axis="growth of proxy less gold, a text",
        zero=True,
    )
    table = {(line["task"], line["row"], line["tokens"]): line for line in made.table}
    for task in found.tasks:
        for column in ("train_gap", "train_proxy", "train_gold"):
            for row, points in curves(found, task, column).items():
                for at in points:
                    if (task, row, at.x) in table:
                        table[task, row, at.x][column] = at.value
    return made


GROWTH = "gap_growth"
ROUNDING = 1e-6
"""A gap below this share of what was paid, or of 1 where that is less, is what rounding leaves: a
text's rewards are float32, and may be large where their sum is small."""


def with_growth(found: Found) -> list[Line]:
    """Return the lines with the growth of each run's gap since its first evaluation that has one.
    Gaps and growths that are rounding are 0."""
    first: dict[tuple[str, str, int], float] = {}
    lines = []
    for line in found.lines:
        gap, place = line.get("train_gap"), (line["task"], line["row"], line["seed"])
        growth = None
        if gap is not None:
            growth = _unless_rounding(gap - first.setdefault(place, gap), line)
            gap = _unless_rounding(gap, line)
        lines.append(line | {"train_gap": gap, GROWTH: growth})
    return lines


def _unless_rounding(difference: float, line: Line) -> float:
    """Return a difference of what was paid and gold, or of two of these, or 0."""
    paid = [abs(line.get(name) or 0.0) for name in ("train_gap", "train_proxy", "train_gold")]
    return difference if abs(difference) > ROUNDING * max(1.0, *paid) else 0.0


def _ends(lines: Mapping[str, list[At]]) -> dict[str, float]:
    return {row: points[-1].value for row, points in lines.items()}


def _grown(task: str, grown: Mapping[str, float]) -> str:
    """Say of which row the gap has grown most."""
    most = highest(grown)
    if grown[most] < 0.005:
        return f"In {task}, no gap has grown."
    return f"In {task}, the gap has grown most for {most}, by {grown[most]:.2g}."


def _along_tokens(
    found: Found,
    name: str,
    title: str,
    column: str,
    how: str,
    says: Callable[[str, Mapping[str, list[At]]], str],
    axis: str | None = None,
    **panel: Any,
) -> Figure:
    """Return a figure of a column against tokens, with a panel for each environment."""
    panels, table, words = [], [], []
    for task in found.tasks:
        lines = curves(found, task, column)
        if lines:
            series = [Series(row, points) for row, points in lines.items()]
            panels.append(Panel(task, series, TOKENS, axis or NAMES[column], **panel))
            words.append(says(task, lines))
            table += [
                _mark(task, row, at, column) for row, points in lines.items() for at in points
            ]
    return Figure(name, title, all_of(words), how, panels, table)


def _mark(task: str, row: str, at: At, column: str) -> Line:
    ends = {column: at.value, f"{column}_low": at.low, f"{column}_high": at.high}
    return {"task": task, "row": row, "tokens": at.x, **ends, "runs": at.runs}


def frontier(found: Found) -> Figure:
    """Return gold against the KL that it costs."""
    panels, table, words = [], [], []
    for task in found.tasks:
        lines = curves(found, task, "gold", along="kl")
        if lines:
            series = [Series(row, points) for row, points in lines.items()]
            along = "KL to the reference, nats a text"
            panels.append(Panel(task, series, along, NAMES["gold"], bands=False))
            ends = {row: points[-1].x for row, points in lines.items()}
            far = highest(ends)
            words.append(
                f"In {task}, {far} ends farthest from the reference, {ends[far]:.2g} nats."
            )
        for row, points in lines.items():
            for at in points:
                found_at = {"kl": at.x, "gold": at.value, "gold_low": at.low, "gold_high": at.high}
                table.append({"task": task, "row": row, **found_at, "runs": at.runs})
    return Figure(
        "frontier",
        "Gold against KL",
        all_of(words),
        "A line is the way of a row over training, from the reference at the left. At the same KL, "
        "the higher line has the better texts for what they cost. Marks are interquartile means "
        "over seeds, and the large one is the end; the intervals are in the file.",
        panels,
        table,
    )
