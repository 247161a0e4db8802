"""The columns in which people keep what a reward model is trained from: one row as an example.

A column `x_ids` holds the token ids of the column `x` and is read in its place. A column that is
null counts as missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.fit.cells import flags, listed, number, numbers, spans_of
from tokenenv.fit.encode import Encoder, Prompt, Response, check_messages
from tokenenv.fit.examples import Example, Kind, Text
from tokenenv.models.alignment import common_length
from tokenenv.models.chats import is_chat

RESPONSE = ("response_ids", "completion_ids", "tokens", "response", "completion", "messages")
"""The columns that may hold one response. The first that is there is read."""
WANTED: dict[Kind, str] = {
    "ranking": "chosen and rejected, or responses (the best first, or with scores), or response "
    "and score",
    "scores": "response and score (or label: true or false), or responses and scores",
    "labels": "tokens and labels, or response and spans, or completions and labels",
    "values": "response and values",
    "texts": "response, or responses, or chosen and rejected, or messages",
}
"""The columns beside the prompt that each kind of data has, for errors."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data."""

    where: str
    """Its place, such as "pairs.jsonl:12"."""
    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether the column is there and not null."""
        return self.values.get(name) is not None

    def first(self, *names: str) -> str | None:
        """Return the first of the columns that is there."""
        return next((name for name in names if self.has(name)), None)

    def label(self, name: str) -> str:
        """Return the place of a column, for errors."""
        return f"{self.where}: {name!r}"

    def lacks(self, wanted: str) -> InvalidArgument:
        """Return the error of a row without the columns that are `wanted`."""
        there = ", ".join(f"{name!s:.80}" for name, one in self.values.items() if one is not None)
        return InvalidArgument(f"{self.where} has the columns {there or '(none)'}; {wanted}.")


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
    raise row.lacks(f"{kind} are read from prompt, and {WANTED[kind]}")


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
        return Example((_one(row, encoder, name),), where=row.where)
    if row.has("completions"):
        text, _ = _joined(row)
        return Example((_one(row, encoder, "completions", text),), where=row.where)
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
    names = [row.first(f"{name}_ids", name) for name in ("chosen", "rejected")]
    given = [name for name in names if name is not None]
    if len(given) < 2:
        return None
    prompt, responses = _read(row, encoder, {name: row.values[name] for name in given})
    owns = [f"{name}_own" for name in ("chosen", "rejected")]
    texts = [
        _text(prompt, response, row.values.get(own), row.label(own))
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
    prompt, responses = _read(row, encoder, {f"{name}[{i}]": v for i, v in enumerate(values)})
    owns = _beside(row, "responses_own", len(values)) or [None] * len(values)
    texts = [
        _text(prompt, response, own, row.label(f"responses_own[{i}]"))
        for i, (response, own) in enumerate(zip(responses, owns, strict=True))
    ]
    scores = _beside(row, "scores", len(values))
    found = scores and tuple(number(one, row.label(f"scores[{i}]")) for i, one in enumerate(scores))
    return Example(tuple(texts), found, row.where)


def _scored(row: Row, encoder: Encoder) -> Example | None:
    """A response and its score, or its outcome."""
    name, score = row.first(*RESPONSE), next((n for n in ("score", "label") if n in row.values), "")
    if name is None or not score:
        return None
    found = number(row.values[score], row.label(score))
    return Example((_one(row, encoder, name),), (found,), row.where)


def _marked(row: Row, encoder: Encoder, column: str) -> Example | None:
    """A response with a number for each of its tokens in a column."""
    name = row.first(*RESPONSE)
    if name is None:
        return None
    bounds = (0.0, 1.0) if column == "labels" else None
    found = numbers(row.values[column], row.label(column), bounds)
    return Example((_one(row, encoder, name, target=found, column=column),), where=row.where)


def _spans(row: Row, encoder: Encoder) -> Example | None:
    """A response with labels of some of its characters."""
    name = row.first("response", "completion")
    text = row.values.get(str(name))
    if not isinstance(text, str):
        return None
    spans = spans_of(row.values["spans"], len(text), row.label("spans"))
    return Example((_one(row, encoder, str(name), spans=spans),), where=row.where)


def _steps(row: Row, encoder: Encoder) -> Example:
    """A response in steps, each with a label, which all tokens of the step get. The stop token
    belongs to the last step."""
    text, ends = _joined(row)
    found = numbers(row.values["labels"], row.label("labels"), (0.0, 1.0))
    if len(found) != len(ends):
        raise InvalidArgument(
            f"{row.label('labels')} has {len(found)} entries for {len(ends)} completions."
        )
    # What a template writes behind the last step, too.
    starts = [0, *ends[:-1]]
    ends[-1] = len(text) + 1
    spans = list(zip(starts, ends, found, strict=True))
    made = _one(row, encoder, "completions", text, spans=spans)
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


# ---------------------------------------------------------------- texts


def _one(
    row: Row,
    encoder: Encoder,
    name: str,
    value: Any = None,
    *,
    target: np.ndarray | None = None,
    column: str = "",
    spans: Sequence[tuple[int, int, float]] | None = None,
) -> Text:
    """The response in column `name` (or `value`), with the numbers of its tokens (from `column`) or
    of its characters."""
    value = row.values[name] if value is None else value
    prompt, [response] = _read(row, encoder, {name: value})
    if target is not None:
        target = _fitted(target, response, np.nan, row.label(column))
    if spans is not None:
        target = _of_tokens(spans, response)
    if target is not None and np.isnan(target).all():
        raise InvalidArgument(f"{row.where} says nothing of any token of its response.")
    return _text(prompt, response, row.values.get("own"), row.label("own"), target)


def _text(
    prompt: Prompt, response: Response, own: Any, label: str, target: np.ndarray | None = None
) -> Text:
    mask = None if response.own is None else np.array(response.own)
    if own is not None:
        mask = _fitted(flags(own, label), response, True, label)
        if not mask.any():
            raise InvalidArgument(f"{label} is 0 everywhere; at least one token must be own.")
    ids = [np.array(ids, np.int64) for ids in (prompt.ids, response.ids)]
    return Text(ids[0], ids[1], None if target is None else target.astype(np.float32), mask)


def _fitted(values: np.ndarray, response: Response, stop: Any, label: str) -> np.ndarray:
    """The values of each token. A stop token that the data does not spell may be without one, and
    gets `stop`."""
    if response.closed and len(values) == len(response.ids) - 1:
        return np.append(values, stop)
    if len(values) != len(response.ids):
        raise InvalidArgument(
            f"{label} has {len(values)} entries for {len(response.ids)} tokens of the response."
        )
    return values


def _of_tokens(spans: Sequence[tuple[int, int, float]], response: Response) -> np.ndarray:
    """The label of each token from labels of characters: the mean over the characters that it has
    in spans; NaN where it has none."""
    assert response.offsets is not None
    places = response.offsets()[: len(response.ids)]
    total, count = np.zeros((2, len(response.ids)))
    begin, end = places.T
    for first, behind, label in spans:
        overlap = (np.minimum(end, behind) - np.maximum(begin, first)).clip(min=0)
        total[: len(places)] += label * overlap
        count[: len(places)] += overlap
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _read(row: Row, encoder: Encoder, values: Mapping[str, Any]) -> tuple[Prompt, list[Response]]:
    """The prompt of a row, and the responses in its columns `values`."""
    prompt, answers = _prompted(row, encoder, values)
    complete = _complete(row, len(values))
    return prompt, [
        encoder.response(prompt, answer, whole, row.label(name))
        for name, answer, whole in zip(values, answers, complete, strict=True)
    ]


def _prompted(row: Row, encoder: Encoder, values: Mapping[str, Any]) -> tuple[Prompt, list[Any]]:
    """The prompt, and what follows it in each column. A conversation that does not begin with the
    assistant holds the prompt itself."""
    answers = list(values.values())
    chats = [is_chat(answer) for answer in answers]
    for name, answer in zip(values, answers, strict=True):
        if is_chat(answer):
            check_messages(answer, row.label(name))
    if all(chats) and not any(answer[0]["role"] == "assistant" for answer in answers):
        cut, where = _said(answers), row.label(next(iter(values)))
        if cut == 0:
            raise InvalidArgument(f"{where} holds no message of the assistant's to be read.")
        if not encoder.chat_template:
            raise InvalidArgument(f"{where} holds messages, which need chat_template=True.")
        prompt = encoder.prompt(answers[0][:cut], where)
        return prompt, [answer[cut:] for answer in answers]
    if name := row.first("prompt_ids", "prompt"):
        return encoder.prompt(row.values[name], row.label(name)), answers
    if len(answers) == 2 and all(isinstance(one, str) for one in answers):
        cut = _shared(answers)
        if cut and not encoder.chat_template:
            prompt = encoder.prompt(answers[0][:cut], row.label(next(iter(values))))
            return prompt, [answer[cut:] for answer in answers]
    raise row.lacks("the prompt is missing")


def _said(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """How many messages the prompt has: of one conversation those before the assistant's first, of
    several those that all of them begin with; 0 where no message of the assistant's follows."""
    most = min(map(len, conversations)) - 1
    spelled = [[(m["role"], m["content"]) for m in messages] for messages in conversations]
    alike = (len(set(same)) == 1 for same in zip(*spelled, strict=False))
    shared = next((i for i, same in enumerate(alike) if not same), most)
    begins = [
        i
        for i in range(1, min(most, shared) + 1)
        if all(messages[i]["role"] == "assistant" for messages in conversations)
    ]
    if not begins:
        return 0
    return begins[0] if len(conversations) == 1 else begins[-1]


def _shared(texts: Sequence[str]) -> int:
    """Where the beginning that two texts share ends, before a space; 0 where there is none."""
    most = min(common_length(*texts), *(len(text) - 1 for text in texts))
    return next((i for i in range(most, 0, -1) if texts[0][i].isspace()), 0)


def _complete(row: Row, count: int) -> list[bool]:
    """Whether each text ended by itself: `truncated` says which did not."""
    given = row.values.get("truncated")
    if given is None:
        return [True] * count
    several = given if isinstance(given, list | tuple | np.ndarray) else [given] * count
    found = flags(several, row.label("truncated"))
    if len(found) != count:
        raise InvalidArgument(
            f"{row.label('truncated')} has {len(found)} entries for {count} texts."
        )
    return [not one for one in found]


def _beside(row: Row, name: str, count: int) -> list[Any] | None:
    """The column `name` with one entry for each of `count` responses; None where there is none."""
    if not row.has(name):
        return None
    found = listed(row.values[name], row.label(name))
    if len(found) != count:
        raise InvalidArgument(f"{row.label(name)} has {len(found)} entries for {count} responses.")
    return found
