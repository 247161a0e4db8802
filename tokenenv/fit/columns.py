"""The columns in which people keep what a reward model is trained from: one row as an example.

A column `x_ids` holds the token ids of the column `x` and is read in its place. A column that is
null counts as missing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.fit.cells import Row, listed, number, numbers, spans_of
from tokenenv.fit.encode import Encoder
from tokenenv.fit.examples import Example, Kind
from tokenenv.fit.texts import one_text, read_responses, text_of

RESPONSE = ("response_ids", "completion_ids", "tokens", "response", "completion", "messages")
"""The columns that may hold one response. The first that is there is read."""
SIDES = ("chosen", "rejected")
WANTED: dict[Kind, str] = {
    "ranking": "chosen and rejected, or responses (the best first, or with scores), or response "
    "and score",
    "scores": "response and score (or label: true or false), or responses and scores",
    "labels": "tokens and labels, or response and spans, or completions and labels",
    "values": "response and values",
    "texts": "response, or responses, or chosen and rejected, or messages",
}
"""The columns beside the prompt that each kind of data has, for errors."""


def read_row(row: Row, kind: Kind, encoder: Encoder) -> Example:
    """Return the example of a row.

    A row of a ranking that holds one response and its score is an example of one text; the other
    texts of its ranking are in other rows.

    Raises:
        InvalidArgument: the row does not have the columns that the kind needs, or a column holds
            what it may not; names the row's place.
    """
    try:
        if found := KINDS[kind](row, encoder):
            return found
    except InvalidArgument as error:
        if row.where in str(error):
            raise
        raise InvalidArgument(f"{row.where}: {error}") from error
    many = "rankings" if kind == "ranking" else kind
    raise row.lacks(f"{many} are read from prompt, and {WANTED[kind]}")


# ---------------------------------------------------------------- kinds


def _ranking(row: Row, encoder: Encoder) -> Example | None:
    return _pair(row, encoder) or _several(row, encoder) or _scored(row, encoder)


def _scores(row: Row, encoder: Encoder) -> Example | None:
    found = _scored(row, encoder)
    if found or not row.has("scores"):
        return found
    return _several(row, encoder)


def _labels(row: Row, encoder: Encoder) -> Example | None:
    if row.has("completions") and row.has("labels"):
        return _steps(row, encoder)
    if row.has("labels"):
        return _marked(row, encoder, "labels")
    return _spans(row, encoder) if row.has("spans") else None


def _values(row: Row, encoder: Encoder) -> Example | None:
    return _marked(row, encoder, "values") if row.has("values") else None


def _texts(row: Row, encoder: Encoder) -> Example | None:
    if name := row.first(*RESPONSE):
        return Example((one_text(row, encoder, name),), where=row.where)
    if row.has("completions"):
        text, _ = _joined(row)
        return Example((one_text(row, encoder, "completions", text),), where=row.where)
    return _pair(row, encoder) or _several(row, encoder)


KINDS: dict[Kind, Callable[[Row, Encoder], Example | None]] = {
    "ranking": _ranking,
    "scores": _scores,
    "labels": _labels,
    "values": _values,
    "texts": _texts,
}
"""How a row of each kind is read; None where the row does not have its columns."""


# ---------------------------------------------------------------- layouts


def _pair(row: Row, encoder: Encoder) -> Example | None:
    """A chosen and a rejected text."""
    names = [row.first(f"{name}_ids", name) for name in SIDES]
    given = [name for name in names if name is not None]
    if len(given) < 2:
        return None
    prompt, responses = read_responses(row, encoder, {name: row.values[name] for name in given})
    owns = [f"{name}_own" for name in SIDES]
    texts = [
        text_of(prompt, response, row.values.get(own), row.label(own))
        for response, own in zip(responses, owns, strict=True)
    ]
    return Example(tuple(texts), where=row.where)


def _several(row: Row, encoder: Encoder) -> Example | None:
    """A list of responses, with their scores where the row has them."""
    name = row.first("responses_ids", "responses")
    if name is None:
        return None
    values = listed(row.values[name], row.label(name))
    if not values:
        raise InvalidArgument(f"{row.label(name)} is empty; at least one response is needed.")
    named = {f"{name}[{i}]": value for i, value in enumerate(values)}
    prompt, responses = read_responses(row, encoder, named)
    owns = _beside(row, "responses_own", len(values)) or [None] * len(values)
    texts = [
        text_of(prompt, response, own, row.label(f"responses_own[{i}]"))
        for i, (response, own) in enumerate(zip(responses, owns, strict=True))
    ]
    scores = _beside(row, "scores", len(values))
    if scores is None:
        return Example(tuple(texts), None, row.where)
    found = [number(one, row.label(f"scores[{i}]")) for i, one in enumerate(scores)]
    return Example(tuple(texts), tuple(found), row.where)


def _scored(row: Row, encoder: Encoder) -> Example | None:
    """A response and its score, or its outcome."""
    name, there = row.first(*RESPONSE), [one for one in ("score", "label") if one in row.values]
    if name is None or not there:
        return None
    score = row.first(*there) or there[0]
    found = number(row.values[score], row.label(score))
    return Example((one_text(row, encoder, name),), (found,), row.where)


def _marked(row: Row, encoder: Encoder, column: str) -> Example | None:
    """A response with a number for each of its tokens in a column."""
    name = row.first(*RESPONSE)
    if name is None:
        return None
    if name == "tokens" and row.first("prompt", "prompt_ids") is None:
        row = _begun(row, column)
    bounds = (0.0, 1.0) if column == "labels" else None
    found = numbers(row.values[column], row.label(column), bounds)
    return Example((one_text(row, encoder, name, target=found, column=column),), where=row.where)


def _begun(row: Row, column: str) -> Row:
    """The row of a text without a prompt: its first token is read as one, and has no number."""
    names = ["tokens", column, *(["own"] if row.has("own") else [])]
    lists = {name: listed(row.values[name], row.label(name)) for name in names}
    rest = {name: values[1:] for name, values in lists.items()}
    return Row(row.where, {**row.values, **rest, "prompt_ids": lists["tokens"][:1]})


def _spans(row: Row, encoder: Encoder) -> Example | None:
    """A response with labels of some of its characters."""
    name = row.first("response", "completion")
    text = row.values.get(str(name))
    if not isinstance(text, str):
        return None
    spans = spans_of(row.values["spans"], len(text), row.label("spans"))
    return Example((one_text(row, encoder, str(name), spans=spans),), where=row.where)


def _steps(row: Row, encoder: Encoder) -> Example:
    """A response in steps, each with a label, which all tokens of the step get. The stop token
    belongs to the last step."""
    text, ends = _joined(row)
    found = numbers(row.values["labels"], row.label("labels"), (0.0, 1.0))
    if len(found) != len(ends):
        raise InvalidArgument(
            f"{row.label('labels')} has {len(found)} entries for {len(ends)} completions."
        )
    starts = [0, *ends[:-1]]
    spans = list(zip(starts, ends, found, strict=True))
    made = one_text(row, encoder, "completions", text, spans=spans)
    assert made.target is not None
    if np.isnan(made.target[-1]):
        made.target[-1] = found[-1]
    return Example((made,), where=row.where)


def _joined(row: Row) -> tuple[str, list[int]]:
    """The text of a response that is given in steps, and where each step ends in it. Between two
    steps stands a line break where no other space does; it belongs to the first of them."""
    steps = listed(row.values["completions"], row.label("completions"))
    if not steps or not all(isinstance(step, str) and step for step in steps):
        raise InvalidArgument(
            f"{row.label('completions')} must be a list of texts, none of which is empty."
        )
    text, ends = "", []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        apart = following is None or step[-1].isspace() or following[0].isspace()
        text += step if apart else step + "\n"
        ends.append(len(text))
    return text, ends


def _beside(row: Row, name: str, count: int) -> list[Any] | None:
    """The column `name` with one entry for each of `count` responses; None where there is none."""
    if not row.has(name):
        return None
    found = listed(row.values[name], row.label(name))
    if len(found) != count:
        raise InvalidArgument(f"{row.label(name)} has {len(found)} entries for {count} responses.")
    return found
