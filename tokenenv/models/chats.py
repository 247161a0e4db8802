"""Conversations behind prompts: messages as a chat template writes them, kept beside their token
ids, so that a reward model can read them by its own template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenenv.errors import InvalidArgument

from .encoding import special_ids

Messages = Sequence[Mapping[str, Any]]
"""A conversation, a list of messages `{"role": ..., "content": ...}`."""
RESPONSE = "\ue000\ue001\ue000"
"""Stands for a message's text where it is looked up what a template writes around it. It is made of
private-use characters, which no text has."""


class Chats:
    """The conversations behind an env's prompts, found by the token ids that the policy reads.

    Args:
        tokenizer: the policy's.

    Raises:
        InvalidArgument: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidArgument(
                "chat_template=True needs a tokenizer with a chat template, and this one has none."
            )
        self.tokenizer = tokenizer
        self._messages: dict[tuple[int, ...], Messages] = {}

    def encode(self, prompt: Any, label: str, limit: int | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins, and remember the
        conversation.

        Args:
            prompt: a list of messages, or a text, which is taken as one message of the user's.
            label: the prompt's name in errors.
            limit: the most tokens; None: any number. A longer conversation loses the beginning of
                its longest message. Where that is not enough, only special tokens at the beginning
                and the last tokens stay.

        Raises:
            InvalidArgument: the prompt is neither, or the tokenizer's template does not take it.
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
        # The tokenizer's own template may raise anything.
        except Exception as error:
            raise InvalidArgument(
                f"{label}: the tokenizer's chat template does not take it ({error})."
            ) from error
        self._messages.setdefault(tuple(ids), messages)
        return ids

    def messages(self, ids: Sequence[int]) -> Messages | None:
        """Return the conversation that was encoded as `ids`; None if there is none."""
        return self._messages.get(tuple(ids))

    def conversations(self) -> list[Messages]:
        """Return all conversations that were encoded."""
        return list(self._messages.values())

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _shortened(self, messages: Messages, text: str, ids: list[int], limit: int) -> list[int]:
        """Return a conversation in `limit` tokens, with the beginning of its longest message left
        out."""
        # The marker in the place of the longest message splits what the template writes around it.
        longest = max(range(len(messages)), key=lambda i: len(str(messages[i].get("content", ""))))
        marked = [{**m, "content": RESPONSE} if i == longest else m for i, m in enumerate(messages)]
        rendered = render(self.tokenizer, marked, add_generation_prompt=True)
        before, _, after = rendered.partition(RESPONSE)
        start, end = self._ids(before), self._ids(after)
        room = limit - len(start) - len(end)
        # Some templates change a message (they strip it, say), so that the parts do not fit.
        if room < 1 or not (text.startswith(before) and text.endswith(after)):
            return keep_ends(ids, limit, self.tokenizer)
        return [*start, *self._ids(text[len(before) : len(text) - len(after)])[-room:], *end]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around an answer."""

    before: str
    """The conversation up to the answer."""
    after: str
    """What closes the answer."""
    strips: bool
    """Whether the template leaves out spaces at both ends of the answer."""

    def fill(self, answer: str, complete: bool) -> str:
        """Return the conversation with an answer, which is closed only if it is complete."""
        answer = answer.strip() if self.strips else answer
        return self.before + answer + (self.after if complete else "")


def frame_of(tokenizer: Any, messages: Messages) -> Frame:
    """Return what a tokenizer's template writes around the answer to `messages`. Raise
    `InvalidArgument` where the template does not take them."""
    # Rendered with a marker as the answer, plain and between spaces: the second shows whether the
    # template strips them.
    try:
        plain, spaced = (
            render(tokenizer, [*messages, {"role": "assistant", "content": content}])
            for content in (RESPONSE, f" {RESPONSE} ")
        )
    # The tokenizer's own template may raise anything.
    except Exception as error:
        raise InvalidArgument(
            f"a conversation does not fit the chat template of {_name(tokenizer)} ({error})."
        ) from error
    before, found, after = plain.partition(RESPONSE)
    if not found:
        raise InvalidArgument(
            f"the chat template of {_name(tokenizer)} does not write an assistant's message as it "
            "is."
        )
    return Frame(before, after, strips=spaced == plain)


def same_frames(chats: Chats, tokenizer: Any) -> bool:
    """Whether another tokenizer's template writes all conversations up to the answer as the
    policy's does. A tokenizer without a template passes."""
    other = getattr(tokenizer, "chat_template", None)
    if not other or other == chats.tokenizer.chat_template:
        return True
    both = ((frame_of(chats.tokenizer, m), frame_of(tokenizer, m)) for m in chats.conversations())
    return all(mine.before == theirs.before for mine, theirs in both)


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the id of the special token with which a tokenizer's chat template closes an answer;
    None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        after = frame_of(tokenizer, [{"role": "user", "content": "a"}]).after
    except InvalidArgument:
        return None
    first = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
    return first[0] if first and first[0] in special_ids(tokenizer) else None


def render(
    tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """Return the text that the tokenizer's template makes of a conversation. `variables` are those
    that the template gets beside it, by name."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    filled = isinstance(prompt, Sequence) and len(prompt) > 0
    return filled and all(isinstance(message, Mapping) for message in prompt)


def keep_ends(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """Shorten a prompt to `limit` tokens: special tokens at its beginning stay, and behind them its
    last tokens."""
    special = special_ids(tokenizer) if tokenizer is not None else set()
    head = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    head = min(head, limit - 1)
    return [*ids[:head], *ids[len(ids) - (limit - head) :]]


def _name(tokenizer: Any) -> str:
    where = getattr(tokenizer, "name_or_path", "") or "built in memory"
    return f"{type(tokenizer).__name__} ({where})"
