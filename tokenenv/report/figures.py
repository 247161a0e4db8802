"""The figures of the report, from the tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenenv.bench.summary import ALL
from tokenenv.report.credit import credit_figures
from tokenenv.report.curves import At, curves
from tokenenv.report.figure import Figure, Line, Panel, Series
from tokenenv.report.reading import Found
from tokenenv.report.words import all_of, figure, highest, listed

TOKENS = "tokens that the policy has written"
MEAN = (
    "A line is the interquartile mean over seeds, and the band its 95% bootstrap interval; one run "
    "alone has no band."
)
NAMES = {
    "gold": "gold score",
    "share": "share of the way to the optimum",
    "score": "sequence score",
    "objective": "J = gold - beta KL",
    "regret": "regret J* - J",
}
"""What the columns are called along an axis."""


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
    """Return what the reward paid less the true metric, while learning."""
    more = ("train_proxy", "train_gold")
    made = _along_tokens(
        found,
        "proxy-gap",
        "Proxy less gold over training",
        "train_gap",
        "A line that rises says that the policy is paid more than its texts are worth: the reward "
        f"is being exploited. Its level alone says little, because designs pay on scales of their "
        f"own. {MEAN}",
        _grown,
        axis="what the reward paid less gold, a text",
        zero=True,
    )
    table = {(line["task"], line["row"], line["tokens"]): line for line in made.table}
    for task in found.tasks:
        for column in more:
            for row, points in curves(found, task, column).items():
                for at in points:
                    if (task, row, at.x) in table:
                        table[task, row, at.x][column] = at.value
    return made


def _ends(lines: Mapping[str, list[At]]) -> dict[str, float]:
    return {row: points[-1].value for row, points in lines.items()}


def _grown(task: str, lines: Mapping[str, list[At]]) -> str:
    """Say of which row the gap has grown most, from the first evaluation that has one."""
    grown = {row: points[-1].value - points[0].value for row, points in lines.items()}
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
