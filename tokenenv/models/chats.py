"""Chats: messages as a tokenizer's template writes them, kept beside the token ids so that other
models can write theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenenv.errors import InvalidArgument

from .encoding import special_ids

Messages = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": ..., "content": ...}` each."""
RESPONSE = "\ue000\ue001\ue000"
"""Stands for a message's text where a template is looked at; characters that no text has."""


class Chats:
    """The conversations behind an env's prompts, by the token ids that the policy reads.

    Raises:
        InvalidArgument: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidArgument(
                "chat_template=True needs a tokenizer with a chat template, which this one has not."
            )
        self.tokenizer = tokenizer
        self._messages: dict[tuple[int, ...], Messages] = {}

    def encode(self, prompt: Any, label: str, limit: int | None = None) -> list[int]:
        """Token ids of a conversation, or of a text as one message of the user's, up to where the
        answer begins.

        Of one with more than `limit` tokens the beginning of its longest message is left out, and
        where that is not enough all but special tokens at the beginning and the last tokens.
        `label` names the prompt in errors.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not is_chat(messages):
            raise InvalidArgument(
                f"{label} must be a string or a list of chat messages under chat_template=True."
            )
        try:
            text = render(self.tokenizer, messages, add_generation_prompt=True)
            ids = self._ids(text)
            if limit is not None and len(ids) > limit:
                ids = self._shortened(messages, text, ids, limit)
        except Exception as error:  # whatever the tokenizer's own template raises
            raise InvalidArgument(
                f"{label}: the tokenizer's chat template does not take it ({error})."
            ) from error
        self._messages.setdefault(tuple(ids), messages)
        return ids

    def messages(self, ids: Sequence[int]) -> Messages | None:
        """The conversation that was encoded as `ids`, or None."""
        return self._messages.get(tuple(ids))

    def conversations(self) -> list[Messages]:
        """All of them."""
        return list(self._messages.values())

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _shortened(self, messages: Messages, text: str, ids: list[int], limit: int) -> list[int]:
        longest = max(range(len(messages)), key=lambda i: len(str(messages[i].get("content", ""))))
        marked = [{**m, "content": RESPONSE} if i == longest else m for i, m in enumerate(messages)]
        before, _, after = render(self.tokenizer, marked, add_generation_prompt=True).partition(
            RESPONSE
        )
        start, end = self._ids(before), self._ids(after)
        room = limit - len(start) - len(end)
        if room < 1 or not (text.startswith(before) and text.endswith(after)):
            return keep_ends(ids, limit, self.tokenizer)
        return [*start, *self._ids(text[len(before) : len(text) - len(after)])[-room:], *end]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around an answer."""

    before: str
    after: str
    strips: bool
    """Whether spaces at the answer's ends are left out."""

    def fill(self, answer: str, complete: bool) -> str:
        """The conversation with the answer; one that is not complete is not closed."""
        return (
            self.before
            + (answer.strip() if self.strips else answer)
            + (self.after if complete else "")
        )


def frame_of(tokenizer: Any, messages: Messages) -> Frame:
    """The frame of the answer to `messages`. Raises `InvalidArgument` where the tokenizer's
    template does not take them."""
    try:
        plain, spaced = (
            render(tokenizer, [*messages, {"role": "assistant", "content": content}])
            for content in (RESPONSE, f" {RESPONSE} ")
        )
    except Exception as error:  # whatever the tokenizer's own template raises
        raise InvalidArgument(
            f"a conversation does not fit the chat template of {_name(tokenizer)} ({error})."
        ) from error
    before, found, after = plain.partition(RESPONSE)
    if not found:
        raise InvalidArgument(
            f"the chat template of {_name(tokenizer)} does not write an assistant's message as it "
            f"is."
        )
    return Frame(before, after, strips=spaced == plain)


def same_frames(chats: Chats, tokenizer: Any) -> bool:
    """Whether another tokenizer's template, if it has one, writes all conversations up to the
    answer as the policy's."""
    other = getattr(tokenizer, "chat_template", None)
    if not other or other == chats.tokenizer.chat_template:
        return True
    both = ((frame_of(chats.tokenizer, m), frame_of(tokenizer, m)) for m in chats.conversations())
    return all(mine.before == theirs.before for mine, theirs in both)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which a tokenizer's chat template, if it has one, closes an answer."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        after = frame_of(tokenizer, [{"role": "user", "content": "a"}]).after
    except InvalidArgument:
        return None
    first = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
    return first[0] if first and first[0] in special_ids(tokenizer) else None


def render(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """The text that the tokenizer's template makes of a conversation."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def keep_ends(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """The last tokens of a prompt that has too many, behind the special tokens at its beginning, if
    it has any."""
    special = special_ids(tokenizer) if tokenizer is not None else set()
    head = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    head = min(head, limit - 1)
    return [*ids[:head], *ids[len(ids) - (limit - head) :]]


def _name(tokenizer: Any) -> str:
    where = getattr(tokenizer, "name_or_path", "") or "built in memory"
    return f"{type(tokenizer).__name__} ({where})"
