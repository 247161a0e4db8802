"""Tables of prompts: each row holds a prompt and, in its other columns, what belongs to it (an
answer, say)."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

import numpy as np
from torch import Tensor

from tokenenv.errors import InvalidArgument, missing

Columns = Mapping[str, Any]
"""The values of one row by the names of their columns, without the prompt. They are plain data
(`plain_value`)."""

ABSENT: Any = ...
"""Stands in a list of `columns=` for a row that does not have the column. None is a value."""
TEXT_SUFFIXES = ("", ".txt", ".text")
"""Suffixes of files that hold one prompt a line. Any other that is not a table's is refused: a
table read as text would make prompts of its header and its answers."""
PLAIN = "text, numbers, True, False, None, and lists and mappings of these"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table of prompts."""

    where: str
    """The place where it was found, for error messages."""
    prompt: Any
    columns: dict[str, Any]
    """The row's other columns."""


def read_rows(source: Any, column: str = "prompt") -> list[Row]:
    """Return the rows of a list, a file or a `datasets` dataset, read to its end.

    Args:
        source: a list whose entries are prompts, or mappings that hold one under `column`; a
            dataset; or the path of a file. Tables are .jsonl (.ndjson), .json (an array, or one
            value a line), .csv, .tsv (the first line names the columns, and every value is a text)
            and .parquet (needs pyarrow). A JSON value that is no object is a prompt. A file with
            the suffix .txt, .text or none holds one prompt a line. Empty lines are skipped.
        column: the name of the prompt's column.

    Raises:
        InvalidArgument: it cannot be read, is empty, or a row has no such column; names the file's
            line or the entry.
        MissingDependency: a .parquet file without pyarrow.
    """
    rows = [_row(value, column, where) for where, value in read_values(source)]
    if not rows:
        raise InvalidArgument(f"prompts={_name(source)} holds no prompts; at least one is needed.")
    return rows


def read_values(source: Any, label: str = "prompts") -> Iterator[tuple[str, Any]]:
    """Yield the rows of a list, a file or a `datasets` dataset, streamed or not, as they were
    found, each with its place: a mapping, or the prompt alone.

    Lines of .jsonl files, and batches of .parquet files, are read one after the other; a .json
    array, a .csv and a .tsv file are read as a whole.

    Args:
        source: what `read_rows` takes.
        label: the argument that the source was given as, for errors.

    Raises:
        InvalidArgument: it cannot be read; names the file's line.
        MissingDependency: a .parquet file without pyarrow.
    """
    if isinstance(source, str | Path):
        yield from _read_file(Path(source), label)
    elif isinstance(getattr(source, "column_names", None), Mapping):
        raise InvalidArgument(
            f"{label} is a dataset of several splits; give one of them: {', '.join(source)}."
        )
    elif hasattr(source, "column_names") or isinstance(source, Sequence):
        yield from ((f"{label}[{index}]", value) for index, value in enumerate(source))
    else:
        raise InvalidArgument(
            f"{label}={_name(source)} is of type {type(source).__name__}; allowed: a list, a path, "
            "a datasets.Dataset."
        )


def by_name(rows: Sequence[Columns], absent: Any = ABSENT) -> dict[str, list[Any]]:
    """Return the columns of rows as `columns=` takes them: a list for each name, with `absent`
    where a row does not have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, absent) for row in rows] for name in names}


def read_columns(columns: Any, places: Sequence[int], count: int, label: str) -> list[Columns]:
    """Return the columns of the rows `places` from lists by name, each of `count` values.

    Raises:
        InvalidArgument: they are no such lists, or hold what a column may not (`plain_value`).
    """
    if columns is None:
        return [{} for _ in places]
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns):
        raise InvalidArgument(
            f"{label} must map names of columns to lists, such as {{'answer': ['4', '7']}}."
        )
    for name, values in columns.items():
        listed = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str | bytes)
        if not listed or len(values) != count:
            raise InvalidArgument(
                f"{label}[{name!r}] must be a list of {count}, one for each text."
            )

    def row(i: int) -> Columns:
        own = {name: values[i] for name, values in columns.items() if values[i] is not ABSENT}
        return {name: plain_value(one, f"{label}[{name!r}][{i}]") for name, one in own.items()}

    return [row(i) for i in places]


def require_columns(rows: Sequence[Columns], names: Iterable[str], who: str, whose: str) -> None:
    """Raise `InvalidArgument` unless every row has all columns `names`.

    Args:
        who: asks for them: the beginning of the error's sentence.
        whose: the place of the rows, such as "prompts".
    """
    for name in names:
        lacking = [i for i, row in enumerate(rows) if name not in row]
        if rows and not lacking:
            continue
        if len(lacking) < len(rows):
            raise InvalidArgument(
                f"{who} asks for the column {name!r}, which row {lacking[0]} of the {whose} does "
                "not have."
            )
        has = ", ".join(dict.fromkeys(key for row in rows for key in row)) or "none"
        raise InvalidArgument(
            f"{who} asks for the column {name!r}, which the {whose} do not have; their columns "
            f"beside the prompt: {has}."
        )


def plain_value(value: Any, where: str) -> Any:
    """Return a column's value as plain data, which a saved state and a run folder can hold.

    Arrays become lists, dates and decimal numbers become texts, and a number that is not finite
    counts as missing: None. Raises `InvalidArgument` for what is none of these.
    """
    try:
        return _plain(value, where)
    except RecursionError as error:
        raise InvalidArgument(f"{where} holds lists that are nested too deeply.") from error


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(one, where) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(one, where) for key, one in value.items()}
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise InvalidArgument(f"{where} is of type {type(value).__name__}; a column holds {PLAIN}.")


# ---------------------------------------------------------------- reading


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else f"<{type(source).__name__}>"


def _row(value: Any, column: str, where: str) -> Row:
    if isinstance(value, Row):
        return value
    if not isinstance(value, Mapping):
        return Row(where, value, {})
    if column not in value:
        has = ", ".join(map(str, value)) or "nothing"
        raise InvalidArgument(
            f"{where} holds no {column!r}; name the right one with prompt_column=. It holds {has}."
        )
    others = {str(name): one for name, one in value.items() if name != column}
    columns = {name: plain_value(one, f"{where}: {name!r}") for name, one in others.items()}
    return Row(where, value[column], columns)


def _read_file(path: Path, label: str) -> Iterable[tuple[str, Any]]:
    suffix = path.suffix.lower()
    known = ", ".join([*READERS, *filter(None, TEXT_SUFFIXES)])
    if not path.is_file():
        raise InvalidArgument(
            f"{label}={str(path)!r} is not a file; give a list, or a file of these: {known}."
        )
    if suffix in READERS:
        return READERS[suffix](path)
    if suffix in TEXT_SUFFIXES:
        return _lines(path)
    raise InvalidArgument(
        f"{label}={str(path)!r} ends in {path.suffix!r}; allowed: {known}. A file of one prompt a "
        "line is a .txt file."
    )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, each with its place."""
    # Not splitlines(): it also splits at characters, such as U+2028, that JSON strings and prose
    # may hold.
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.removesuffix("\n")


def _text(path: Path) -> str:
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{str(path)!r} is not UTF-8 text: {error.reason}.") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        yield where, _json(line, where, "each line holds one value")


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    for index, value in enumerate(_json(text, str(path), "it begins as an array of rows")):
        yield f"{path}[{index}]", value


def _json(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number of too many digits
        reason = getattr(error, "msg", error)
        raise InvalidArgument(f"{where} is not JSON ({reason}); {hint}.") from error


def _separated(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a .csv or .tsv file, every value a text."""
    text = _text(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    # Python's limit of 131,072 characters a value is its own, and a value may be a long document.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))
    try:
        names = next(filter(None, lines), [])
        if len(set(names)) < len(names):
            where = f"{path}:{lines.line_num}"
            raise InvalidArgument(f"{where} names a column twice: {', '.join(names)}.")
        for values in lines:
            where = f"{path}:{lines.line_num}"
            if values and len(values) != len(names):
                raise InvalidArgument(
                    f"{where} ends a row of {len(values)} values; the first line names "
                    f"{len(names)} columns."
                )
            if values:
                yield where, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise InvalidArgument(f"{path}:{lines.line_num} cannot be read: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing("reading .parquet files", "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield f"{path}[{index}]", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InvalidArgument(f"{str(path)!r} is no Parquet file: {reason}.") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".parquet": _parquet,
}
"""How a table's file is read, by its suffix."""
