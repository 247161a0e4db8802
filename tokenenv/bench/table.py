"""The tidy table: one line for each cell and evaluation."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenenv.agents.run.files import replace_file
from tokenenv.bench.cells import Cell
from tokenenv.bench.store import Store

Line = dict[str, Any]


def tidy(cells: Sequence[Cell], store: Store) -> list[Line]:
    """Return a line for each evaluation of each finished cell, and one for each failed cell.

    All lines have the same columns. A number that is not known is None.
    """
    return unified([line for cell in cells for line in _lines(cell, store)])


def unified(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with the columns of all of them, in the order of the longest."""
    columns = list(dict.fromkeys(name for line in sorted(lines, key=len)[::-1] for name in line))
    return [{name: line.get(name) for name in columns} for line in lines]


def _lines(cell: Cell, store: Store) -> Iterator[Line]:
    labels = {"task": cell.task, "row": cell.row, "seed": cell.seed, "cell": cell.key}
    record, error = store.finished(cell), store.failure(cell)
    if record is not None:
        constant = flat(record["settings"]) | record.get("model", {}) | record["versions"]
        for point in record["points"]:
            yield {**labels, "status": "finished", "error": None, **point, **constant}
    elif error is not None:
        yield {**labels, "status": "failed", "error": error, **flat(cell.settings)}


def flat(settings: Mapping[str, Any]) -> Line:
    """Return settings as columns: "options.kl_coef", "agent.lr". Mappings and lists become text."""
    found: Line = {}
    for name, value in settings.items():
        if name in ("options", "agent"):
            found |= {f"{name}.{key}": _plain(one) for key, one in value.items()}
        else:  # "gold" is the column of what was found
            found["gold_function" if name == "gold" else name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_table(path: Path, lines: Sequence[Line]) -> list[Path]:
    """Write a table as `path`.csv and, where pyarrow is installed, as `path`.parquet, and return
    what was written."""
    written = [path.with_suffix(".csv")]
    text = as_csv(lines)
    replace_file(written[0], lambda temporary: temporary.write_text(text, encoding="utf-8"))
    table = as_arrow(lines)
    if table is not None:
        import pyarrow.parquet

        written.append(path.with_suffix(".parquet"))
        replace_file(written[1], lambda file: pyarrow.parquet.write_table(table, file))
    return written


def as_csv(lines: Sequence[Line]) -> str:
    """Return the text of a CSV file; None is an empty field."""
    if not lines:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_arrow(lines: Sequence[Line]) -> Any:
    """Return a pyarrow table; None where pyarrow is not installed.

    A column whose values are of several types, such as a reward that is a word in one row and
    nothing in another, is text.
    """
    try:
        import pyarrow
    except ImportError:
        return None
    columns = {}
    for name in lines[0] if lines else ():
        values = [line[name] for line in lines]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pyarrow.array(values)
    return pyarrow.table(columns)
