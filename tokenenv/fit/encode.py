"""Prompts and responses of data as token ids: as a policy would read the ones and write the
others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.models.chat_turns import ChatTurns
from tokenenv.models.chats import Chats, Messages, end_of_turn, frame_of, is_chat, render
from tokenenv.models.encoding import continuation_offsets, encode_continuation, encode_prompt
from tokenenv.prompts import Encode, to_ids


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, with the conversation that they were written from."""

    ids: list[int]
    messages: Messages | None = None
    """None where the prompt was given as token ids, or no chat template is used."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response as token ids, with what is needed to find the tokens of its characters."""

    ids: list[int]
    own: list[bool] | None = None
    """Which tokens the assistant wrote, in a conversation that goes on; None: all of them."""
    closed: bool = False
    """Whether the last token is a stop token that the data does not spell."""
    offsets: Callable[[], np.ndarray] | None = None
    """Returns (n, 2) int64: the first character and the end, in the text that the data holds, of
    the first n tokens. None where the data holds token ids or messages."""


class Encoder:
    """Turns what a row holds into token ids.

    Args:
        tokenizer: the policy's; None where tokens have no text.
        vocab_size: ids are 0 to `vocab_size` - 1.
        chat_template: whether a prompt that is a text or a list of messages is written by the
            tokenizer's chat template.

    Raises:
        InvalidArgument: `chat_template` without a template.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, chat_template: bool = False) -> None:
        self.tokenizer, self.vocab_size, self.chat_template = tokenizer, vocab_size, chat_template
        self._end: int | None = None
        self._turns: dict[tuple[str, ...], ChatTurns] = {}
        if chat_template:
            Chats(tokenizer)  # raises where there is no template
            self._end = end_of_turn(tokenizer)
        self._end_text = "" if self._end is None else tokenizer.convert_ids_to_tokens(self._end)
        eos = getattr(tokenizer, "eos_token_id", None)
        self._stop: int | None = eos if self._end is None else self._end

    def prompt(self, value: Any, label: str) -> Prompt:
        """Return a prompt that is a text, a list of messages, or token ids."""
        messages = None
        if self.chat_template and (isinstance(value, str) or is_chat(value)):
            messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
            # Not kept: the conversations of a million rows are more than their tokens.
            value = Chats(self.tokenizer).encode(messages, label)
        ids = self.ids(value, label, encode_prompt)
        if not ids:
            raise InvalidArgument(f"{label} is empty; a prompt needs at least one token.")
        return Prompt(ids, messages)

    def response(self, prompt: Prompt, value: Any, complete: bool, label: str) -> Response:
        """Return a response that is a text, a list of messages that begins with the assistant's, or
        token ids. A text that is `complete` gets the stop token behind it, unless it ends in it
        already; token ids stay as they are."""
        if is_chat(value):
            return self._conversation(prompt, value, complete, label)
        if isinstance(value, str) and prompt.messages is not None:
            return self._answer(prompt.messages, value, complete, label)
        ids = self.ids(value, label)
        if not ids:
            raise _empty(label)
        if not isinstance(value, str):
            return Response(ids)
        offsets = partial(self._offsets, value, 0)
        if not complete or self._stop is None or ids[-1] == self._stop:
            return Response(ids, offsets=offsets)
        return Response([*ids, self._stop], closed=True, offsets=offsets)

    def _answer(self, said: Messages, text: str, complete: bool, label: str) -> Response:
        """The answer to a conversation: what the template writes behind it for the assistant, up to
        the token that closes the answer."""
        frame, begun = frame_of(self.tokenizer, said), self._rendered(said)
        # Some templates write a space, or an empty thought, before an answer; it is the policy's
        # where it stands behind what begins the answer.
        lead = frame.before[len(begun) :] if frame.before.startswith(begun) else ""
        body = text.removesuffix(self._end_text)
        body, cut = (body.strip(), len(body) - len(body.lstrip())) if frame.strips else (body, 0)
        if not body:
            raise _empty(label)
        whole = lead + body + (frame.after if complete and self._end_text else "")
        ids = self.ids(whole, label)
        if complete and self._end in ids:
            ids = ids[: len(ids) - ids[::-1].index(self._end)]
        elif complete and self._stop is not None:
            ids = [*ids, self._stop]
        closed = (
            complete
            and self._stop is not None
            and not (self._end_text and text.endswith(self._end_text))
        )
        return Response(ids, closed=closed, offsets=partial(self._offsets, whole, len(lead) - cut))

    def _conversation(
        self, prompt: Prompt, messages: Messages, complete: bool, label: str
    ) -> Response:
        """The assistant's messages, and what is written between them."""
        if prompt.messages is None:
            raise InvalidArgument(
                f"{label} holds messages, which need chat_template=True and a prompt that is a "
                "text or messages."
            )
        check_messages(messages, label)
        said, ids, own = list(prompt.messages), list[int](), list[bool]()
        turns = _turns(messages)
        if not turns:
            raise InvalidArgument(f"{label} must begin and end with a message of the assistant's.")
        for number, (answer, others) in enumerate(turns):
            last = number == len(turns) - 1
            found = self._answer(said, answer["content"], complete or not last, label)
            ids, own = ids + found.ids, own + [True] * len(found.ids)
            if not last:
                more = self._written(said, answer["content"], others)
                ids, own = ids + more, own + [False] * len(more)
            said += [answer, *others]
        return Response(ids, own if len(turns) > 1 else None, closed=complete)

    def _written(self, said: Messages, answer: str, others: Messages) -> list[int]:
        """What the template writes between an answer and the next one."""
        shape = tuple(str(message.get("role")) for message in said)
        if shape not in self._turns:
            chats = Chats(self.tokenizer)
            chats.encode(said, "the conversation")
            self._turns[shape] = ChatTurns(chats)
        return self._turns[shape].written(said, answer.removesuffix(self._end_text), others)

    def _rendered(self, said: Messages) -> str:
        try:
            return render(self.tokenizer, said, add_generation_prompt=True)
        # The tokenizer's own template may raise anything.
        except Exception as error:
            raise InvalidArgument(
                f"the tokenizer's chat template does not take the conversation ({error})."
            ) from error

    def ids(self, value: Any, label: str, encode: Encode = encode_continuation) -> list[int]:
        """Return the token ids of a text, or of a sequence of ids, as they are."""
        if isinstance(value, str) and self.tokenizer is None:
            raise InvalidArgument(f"{label} is a text, which needs a tokenizer; give tokenizer=.")
        return to_ids(value, self.tokenizer, self.vocab_size, label, encode)

    def _offsets(self, text: str, start: int) -> np.ndarray:
        places = continuation_offsets(text, self.tokenizer)
        return np.array(places, np.int64).reshape(-1, 2) - start


def check_messages(messages: Messages, label: str) -> None:
    """Raise `InvalidArgument` unless each message has a role and a content that are texts."""
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidArgument(
                f"{label} holds a message whose role or content is no text; allowed: "
                '{"role": ..., "content": ...}.'
            )


def _empty(label: str) -> InvalidArgument:
    return InvalidArgument(f"{label} is empty; a response needs at least one token.")


def _turns(messages: Messages) -> list[tuple[Mapping[str, Any], Messages]]:
    """Each message of the assistant's, with the messages between it and the next one; none where
    the messages do not begin and end with one."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places or places[0] != 0 or places[-1] != len(messages) - 1:
        return []
    ends = [*places[1:], len(messages)]
    return [(messages[i], messages[i + 1 : end]) for i, end in zip(places, ends, strict=True)]
