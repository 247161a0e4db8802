"""The texts of a row: its prompt, its responses, and what is known of their tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.fit.cells import Row, Span, flags
from tokenenv.fit.encode import Encoder, Prompt, Response, check_messages
from tokenenv.fit.examples import Text
from tokenenv.models.alignment import common_length
from tokenenv.models.chats import is_chat


def one_text(
    row: Row,
    encoder: Encoder,
    name: str,
    value: Any = None,
    *,
    target: np.ndarray | None = None,
    column: str = "",
    spans: Sequence[Span] | None = None,
) -> Text:
    """Return the text of the response in column `name` (or of `value`), with what is known of its
    tokens (`target`, from a column) or of its characters (`spans`)."""
    value = row.values[name] if value is None else value
    prompt, [response] = read_responses(row, encoder, {name: value})
    if target is not None:
        target = _fitted(target, response, np.nan, row.label(column))
    if spans is not None:
        target = _of_tokens(spans, response)
    if target is not None and np.isnan(target).all():
        raise InvalidArgument(f"{row.where} says nothing of any token of its response.")
    return text_of(prompt, response, row.values.get("own"), row.label("own"), target)


def text_of(
    prompt: Prompt, response: Response, own: Any, label: str, target: np.ndarray | None = None
) -> Text:
    """Return a text. `own` is what a column says of who wrote its tokens, and `label` the column's
    name; None: the policy wrote all, or what a conversation says."""
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


def _of_tokens(spans: Sequence[Span], response: Response) -> np.ndarray:
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


def read_responses(
    row: Row, encoder: Encoder, values: Mapping[str, Any]
) -> tuple[Prompt, list[Response]]:
    """Return the prompt of a row, and the responses in its columns `values`."""
    prompt, answers = _prompted(row, encoder, values)
    cut = _truncated(row, len(values))
    return prompt, [
        encoder.response(prompt, answer, not ends, row.label(name))
        for name, answer, ends in zip(values, answers, cut, strict=True)
    ]


def _truncated(row: Row, count: int) -> np.ndarray:
    """Whether each of a row's texts was cut; the column says so of all of them, or of each."""
    given = row.values.get("truncated")
    if not isinstance(given, list | tuple | np.ndarray):
        given = [False if given is None else given] * count
    found = flags(given, row.label("truncated"))
    if len(found) != count:
        raise InvalidArgument(
            f"{row.label('truncated')} has {len(found)} entries for {count} texts."
        )
    return found


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
    if given := row.first("prompt_ids", "prompt"):
        return encoder.prompt(row.values[given], row.label(given)), answers
    if len(answers) == 2 and all(isinstance(one, str) for one in answers):
        cut = _shared(*answers)
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


def _shared(one: str, other: str) -> int:
    """Where the beginning that two texts share ends, before a space; 0 where there is none."""
    most = min(common_length(one, other), len(one) - 1, len(other) - 1)
    return next((i for i in range(most, 0, -1) if one[i].isspace()), 0)
