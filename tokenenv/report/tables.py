"""Tables of the page: the leaderboard, the settings with their commands, failures, versions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenenv.bench.grid import ALL
from tokenenv.bench.shown import to_goal
from tokenenv.report.commands import cell_command, is_asked, whole_command
from tokenenv.report.ranking import ranked
from tokenenv.report.reading import Found, Line
from tokenenv.report.words import figure, html

SETTINGS = ("env", "reward", "gold_function", "algo", "num_envs", "total_tokens")
VERSIONS = ("tokenenv", "code", "python", "gymnasium", "numpy", "torch", "transformers", "machine")
HEADS = {"kl": "KL, nats a text", "length": "length, tokens"}
BY_SEED = ("agent.seed",)
"""Settings that differ from seed to seed and tell nothing of a row."""


def leaderboards(found: Found) -> str:
    """Return a table of the summary for each environment, the best row first."""
    tasks = dict.fromkeys(line["task"] for line in found.summary)
    ordered = sorted(tasks, key=lambda task: task != ALL)
    return "\n".join(_leaderboard(found, task) for task in ordered)


def _leaderboard(found: Found, task: str) -> str:
    column = found.measured.get(task, "share" if task == ALL else "gold")
    lines = ranked([line for line in found.summary if line["task"] == task], column)
    columns: dict[str, Callable[[Line], str]] = {"runs": _runs, column: _figure(column)}
    goal = next((line for line in lines if line.get("goal")), None)
    if goal is not None:
        columns[f"tokens to {goal['goal']} {goal['goal_bound']:g}"] = _to_goal
    baseline = found.grid.get("baseline") or (found.rows[0] if found.rows else "")
    better = {
        line["row"]: line
        for line in found.comparisons
        if line["task"] == task and line["other"] == baseline
    }
    if better:
        columns[f"better than {baseline}"] = lambda line: _better(better.get(line["row"]))
    for name in ("gold", "share", "regret", "kl", "length"):
        values = {line.get(name) for line in lines} - {None}
        # A length that the environment fixes tells nothing.
        if len(values) > (name == "length"):
            columns[HEADS.get(name, name)] = _figure(name)
    body = [[line["row"], *(cell(line) for cell in columns.values())] for line in lines]
    made = table(["row", *columns], body, f"leaderboard of {task}", "numbers")
    return f"<h3>{html(task)}</h3>{made}"


def _figure(name: str) -> Callable[[Line], str]:
    return lambda line: figure(line, name)


def _runs(line: Line) -> str:
    finished, cells = line.get("finished") or 0, line.get("cells") or 0
    return f"{finished}" if finished == cells else f"⚠ {finished} of {cells}"


def _to_goal(line: Line) -> str:
    known = line.get("budget") is not None and "tokens_to_goal" in line
    return to_goal(line) if known else ""


def _better(line: Line | None) -> str:
    values = [line.get(f"probability{end}") for end in ("", "_low", "_high")] if line else [None]
    if None in values:
        return ""
    value, low, high = values
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


def failures(found: Found) -> str:
    """Return the cells that failed, with their errors; nothing where none did."""
    if not found.failed:
        return ""
    body = [[line["task"], line["row"], line["seed"], line.get("error")] for line in found.failed]
    names = ["environment", "row", "seed", "error"]
    return (
        f"<p>{len(body)} cells failed. They count in no figure.</p>{table(names, body, 'failures')}"
    )


def settings(found: Found) -> str:
    """Return what sets the rows apart, and what all of them have in common."""
    rows = _by_row(found)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    names = [name for name in names if name in SETTINGS or name.startswith(("options.", "agent."))]
    apart: list[str] = []
    common: list[str] = []
    for name in names:
        values = {str(row.get(name)) for row in rows.values()}
        if name not in BY_SEED:
            (apart if len(values) > 1 else common).append(name)
    body = [[*place, *(row.get(name) for name in apart)] for place, row in rows.items()]
    first = next(iter(rows.values()), {})
    same = [[name, first.get(name)] for name in common if first.get(name) is not None]
    return (
        table(["environment", "row", *apart], body, "settings that differ")
        + f"<details><summary>{len(same)} settings that all runs have in common</summary>"
        + table(["setting", "value"], same, "settings in common")
        + "</details>"
    )


def _by_row(found: Found) -> dict[tuple[str, str], Line]:
    """Return a line of each environment and row; a finished one has every default."""
    lines: dict[tuple[str, str], Line] = {}
    for line in sorted(found.lines, key=lambda line: line["status"] != "finished"):
        lines.setdefault((line["task"], line["row"]), line)
    return {place: lines[place] for place in sorted(lines, key=_order(found))}


def _order(found: Found) -> Callable[[tuple[str, str]], tuple[int, int]]:
    return lambda place: (found.tasks.index(place[0]), found.rows.index(place[1]))


def commands(found: Found) -> str:
    """Return the command of the whole bench, and those of its cells, each with a button; nothing
    where none is known."""
    parts = []
    if not found.damage:
        parts += [_WHOLE, _command("the whole bench", whole_command(found))]
    places: dict[tuple[str, str], list[str]] = {}
    for line, record in found.cells():
        asked = (record or {}).get("asked")
        if asked is not None and is_asked(asked):
            told = _command(f"seed {line['seed']}", cell_command(line["cell"], asked))
            places.setdefault((line["task"], line["row"]), []).append(told)
    if places:
        parts.append(_CELLS)
    for (task, row), some in places.items():
        summary = f"{html(task)} / {html(row)}"
        parts.append(f"<details><summary>{summary}</summary>{''.join(some)}</details>")
    return "\n".join(parts)


_WHOLE = "<p>This runs the whole grid again:</p>"
_CELLS = (
    "<p>Each of these writes a grid of one cell and runs it: its file of results has the same "
    "name, and the same numbers on the same kind of machine with the versions below.</p>"
)


def _command(what: str, command: str) -> str:
    button = f'<button type="button" aria-label="copy the command of {html(what)}">copy</button>'
    return (
        f'<div class="command"><p>{html(what)} {button}</p>'
        f"<pre><code>{html(command)}</code></pre></div>"
    )


def versions(found: Found) -> str:
    """Return what the numbers were made with; where cells differ, all that there are."""
    names = [name for name in VERSIONS if any(line.get(name) for line in found.lines)]
    said = {
        name: ", ".join(dict.fromkeys(str(line[name]) for line in found.lines if line.get(name)))
        for name in names
    }
    return table(["what", "version"], list(map(list, said.items())), "versions")


def warned(found: Found) -> str:
    """Return the warnings of the cells, each once, with the number of cells that had it."""
    counts: dict[str, int] = {}
    for record in found.records.values():
        for one in _texts(record):
            counts[one] = counts.get(one, 0) + 1
    if not counts:
        return ""
    body = [[count, text] for text, count in counts.items()]
    listed = table(["cells", "warning"], body, "warnings")
    return f"<details><summary>warnings ({len(body)})</summary>{listed}</details>"


def _texts(record: Mapping[str, Any]) -> list[str]:
    found = record.get("warnings")
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def table(names: Sequence[str], body: Iterable[Sequence[Any]], about: str, kind: str = "") -> str:
    """Return an HTML table in a box of its own, which scrolls where the page is narrow. The first
    column names the lines."""
    head = "".join(f'<th scope="col">{html(name)}</th>' for name in names)
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in body)
    return (
        f'<div class="box {kind}" role="region" tabindex="0" aria-label="{html(about)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cells(row: Sequence[Any]) -> str:
    first, *others = ("" if value is None else html(value) for value in row)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{value}</td>" for value in others)
