"""Conversations that go on inside a text: the tokens that a chat template writes between two
answers of the policy's, and the messages that a text with such tokens is made of.

What the policy sampled stays in the text as it is and is never tokenised again. The tokens behind
it are what a rendering with the next messages adds to a rendering without them, so a template that
writes the conversation before them in another way is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenenv.errors import InvalidArgument
from tokenenv.turns import TextSoFar

from .chats import RESPONSE, Chats, Messages, end_of_turn, is_chat, render
from .encoding import BREAK, decode_quoted, encode_plain, quoted

READ_BACK = ("user", "tool", "system")
"""The roles that are recognised in what a template wrote, where it takes them."""
PROBES = ("a b", "a b", " a ", "", "<think>\na\n</think>\n\nb")
"""Answers with which a template is tried. Templates are known to strip spaces, to leave out empty
answers and to drop what a model thought."""
CLOCK = "{{% macro strftime_now(form) %}}{}{{% endmacro %}}"
"""Put before a template, it stands in the place of the clock that transformers gives to it."""


class Answer(NamedTuple):
    """What an environment says to a turn of the policy's."""

    message: Any
    """A text, which the user says; a message {"role": ..., "content": ...}; or a list of such
    messages. None: it says nothing, and the conversation ends."""
    reward: float = 0.0
    """Its own reward for the turn. Finite."""
    ends: bool = False
    """Whether the conversation ends after the message."""


def messages_of(message: Any) -> list[dict[str, Any]]:
    """Return the message of an `Answer` as a list of messages.

    Raises:
        InvalidArgument: it is none of what is allowed.
    """
    if isinstance(message, str):
        message = {"role": "user", "content": message}
    several = [message] if isinstance(message, Mapping) else message
    if not is_chat(several) or not all(_is_message(one) for one in several):
        raise InvalidArgument(
            f"respond returned the message {message!r:.200}; allowed: a text, a message "
            '{"role": ..., "content": ...} whose values are texts, a list of these, or None. '
            "Half a character (U+D800 to U+DFFF) is no text."
        )
    for one in several:
        # Any other would be taken for the user's when the text is read again.
        if one["role"] not in READ_BACK:
            raise InvalidArgument(
                f"respond returned a message of the role {one['role']!r:.80}; allowed: "
                f"{', '.join(READ_BACK)}."
            )
    return [dict(one) for one in several]


class ChatTurns:
    """Write the messages between the answers of a text, and read them back.

    Args:
        chats: the conversations behind the prompts. One of each shape (its roles) is tried.

    Raises:
        InvalidArgument: the chat template closes an answer with no special token, rewrites what was
            said before when the conversation goes on, writes the date, or does not take a second
            message of the user's.
    """

    def __init__(self, chats: Chats) -> None:
        end = end_of_turn(chats.tokenizer)
        if end is None:
            raise InvalidArgument(
                "the tokenizer's chat template closes an answer with no special token, so nobody "
                "could see where a turn of the policy's ends; give a tokenizer whose chat_template "
                "does."
            )
        self.chats, self.tokenizer, self.end = chats, chats.tokenizer, end
        self._end_text = self.tokenizer.convert_ids_to_tokens(end)
        for messages in {_shape(one): one for one in chats.conversations()}.values():
            self._try(messages)
        self._pattern = re.compile("|".join(self._patterns()) or "(?!)", re.DOTALL)

    def written(
        self, said: Messages, answer: str, messages: Messages, ends: bool = False
    ) -> list[int]:
        """Return the token ids that follow an answer's last token, which closes it.

        Args:
            said: the conversation before the answer.
            answer: the policy's.
            messages: what is said next.
            ends: whether the conversation ends with them. Otherwise the template also writes what
                begins the next answer.

        Raises:
            InvalidArgument: the template would write what is in the text already in another way.
        """
        answered = [*said, {"role": "assistant", "content": answer}]
        messages = [{**one, "content": quoted(one["content"], self.tokenizer)} for one in messages]
        before = self._render(said, add_generation_prompt=True)
        closed = self._render(answered)
        whole = self._render([*answered, *messages], add_generation_prompt=not ends)
        _check_prefix(before, closed, "when an answer is closed")
        end = closed.rfind(self._end_text, len(before)) + len(self._end_text)
        if end <= len(before):
            raise _refusal(f"it leaves out the answer {answer!r:.80}")
        _check_prefix(closed[:end], whole, "when the conversation goes on")
        # Tokenised behind the token that closes the answer, as they stand in the text: there a
        # tokenizer adds no space of its own, and a special token may take a space behind it.
        first, _, others = whole[end:].partition(BREAK)
        return [*self._ids(self._end_text + first)[1:], *encode_plain(others, self.tokenizer)]

    def messages(self, text: TextSoFar) -> list[dict[str, Any]]:
        """Return the conversation of a text up to the policy's last turn, which is the last
        message. The messages of its prompt are those that were given; the others are read from the
        tokens."""
        found = self._prompt(text)
        for own, tokens in text.segments:
            found += [self._answer(tokens)] if own else self._read(tokens)
        return found

    def _prompt(self, text: TextSoFar) -> list[dict[str, Any]]:
        """The messages of the prompt; one of the user's where it was given as token ids."""
        known = self.chats.messages(text.prompt)
        if known is None:
            return [{"role": "user", "content": text.decode(text.prompt)}]
        return [dict(message) for message in known]

    def _answer(self, tokens: Sequence[int]) -> dict[str, Any]:
        content = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return {"role": "assistant", "content": content}

    def _read(self, tokens: Sequence[int]) -> list[dict[str, Any]]:
        """The messages that were written as `tokens`; one of the user's where none is found."""
        found = [
            {
                "role": str(match.lastgroup),
                "content": match[str(match.lastgroup)].replace(BREAK, ""),
            }
            for match in self._pattern.finditer(decode_quoted(tokens, self.tokenizer))
        ]
        plain = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return found or [{"role": "user", "content": plain}]

    def _patterns(self) -> Iterator[str]:
        """Regular expressions of what the template writes for each role, the longer ones first: a
        tool's message may begin as one of the user's."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        frames = ((role, self._around(said, role)) for role in READ_BACK)
        spelled = [(role, *map(self._spelled, frame)) for role, frame in frames if frame]
        for role, before, after in sorted(spelled, key=lambda one: -len(one[1])):
            yield rf"{_loose(before)}\s*(?P<{role}>.*?)\s*{_loose(after)}"

    def _spelled(self, text: str) -> str:
        """A text as it is decoded: some tokenizers have no line break, say."""
        return self._decode(self._ids(self._end_text + text)[1:])

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _around(self, said: Messages, role: str) -> tuple[str, str] | None:
        """What the template writes before and after a message; None where it takes none of this
        role."""
        try:
            start = self._render(said)
            rendered = self._render([*said, {"role": role, "content": RESPONSE}])
            prompted = self._render([*said, {"role": role, "content": RESPONSE}], True)
        except InvalidArgument:
            return None
        before, found, after = rendered.partition(RESPONSE)
        cut = start.rfind(self._end_text) + len(self._end_text)
        if not found or not before[cut:].strip():
            return None
        # Where nothing closes a message, it goes on to where the next answer begins.
        return before[cut:], after if after.strip() else prompted.partition(RESPONSE)[2]

    def _try(self, messages: Messages) -> None:
        """Raises `InvalidArgument` where a conversation cannot go on for two turns."""
        said = list(messages)
        template = self.tokenizer.get_chat_template()
        days = [CLOCK.format(day) + template for day in "12"]
        if len({self._render(said, True, chat_template=dated) for dated in days}) > 1:
            raise _refusal("it writes the date, so the same conversation is another text tomorrow")
        more = [{"role": "user", "content": "c"}]
        for answer in PROBES:
            self.written(said, answer, more)
            said = [*said, {"role": "assistant", "content": answer}, *more]
        self.written(said, PROBES[0], more, ends=True)

    def _render(
        self, messages: Messages, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        try:
            return render(
                self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **variables
            )
        # The tokenizer's own template may raise anything.
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise InvalidArgument(
                f"the tokenizer's chat template does not take messages of {roles} ({error})."
            ) from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_message(message: Mapping[str, Any]) -> bool:
    texts = [message.get(key) for key in ("role", "content")]
    return all(isinstance(t, str) and not re.search("[\ud800-\udfff]", t) for t in texts)


def _shape(messages: Messages) -> tuple[str, ...]:
    """The roles of a conversation."""
    return tuple(str(message.get("role")) for message in messages)


def _loose(text: str) -> str:
    """A regular expression for a text, whatever a tokenizer made of its spaces."""
    return r"\s*".join(re.escape(part) for part in text.split())


def _check_prefix(before: str, after: str, when: str) -> None:
    """Raises `InvalidArgument` unless `after` begins with `before`."""
    if after.startswith(before):
        return
    pairs = zip(before, after, strict=False)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), len(after))
    raise _refusal(
        f"{when} it writes {after[place : place + 40]!r} where {before[place : place + 40]!r} stood"
    )


def _refusal(reason: str) -> InvalidArgument:
    return InvalidArgument(
        f"the tokenizer's chat template rewrites what was said before: {reason}. What the policy "
        "has written stays as it is, so a conversation needs a template that only adds to it; give "
        "a tokenizer= with such a chat_template."
    )
