"""Calling a user's function of texts: its parameters say what it is given.

The first two are prompt and response. Any further one is filled by its name: `messages`, `turns`,
or a column of the prompt's row.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenenv.errors import InvalidArgument
from tokenenv.models.chats import Chats
from tokenenv.rewards.seen import FinishedTexts, RunningTexts
from tokenenv.tables import Columns

Texts = FinishedTexts | RunningTexts
GIVEN = ("prompt", "response", "messages")
"""Names of parameters that a column of the same name does not fill."""
BY_NAME = ("messages", "turns")
"""Parameters that say what they take, which is neither the prompt nor the response."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a function asks for beyond prompt and response, by name."""

    first: tuple[str, ...] = ()
    """The names of the two that take prompt and response."""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """Those with a default, which they keep where there is no such column."""
    whole_row: bool = False
    """Whether `**row` takes all columns."""

    @property
    def messages(self) -> bool:
        """Whether it asks for the conversation."""
        return "messages" in (*self.required, *self.optional)

    @property
    def turns(self) -> bool:
        """Whether it asks for the segments of the response."""
        return "turns" in (*self.required, *self.optional)

    @property
    def given(self) -> tuple[str, ...]:
        """Names that no column fills. A table may have `turns` of its own, for those functions
        that do not ask for the text's."""
        return (*GIVEN, "turns") if self.turns else GIVEN

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that there must be."""
        return tuple(name for name in self.required if name not in self.given)

    def of_row(self, row: Columns) -> Columns:
        """The columns of a row that the function takes."""
        taken, given = (*self.required, *self.optional), self.given
        return {
            name: value
            for name, value in row.items()
            if name not in given and (self.whole_row or name in taken)
        }


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """Return what a function asks for.

    Raises:
        InvalidArgument: it cannot be called with a prompt, a response, and the rest by name.
    """
    try:
        listed = list(inspect.signature(function).parameters.values())
    except ValueError:  # some built-in functions have no signature
        return Parameters()
    by_place = [p for p in listed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first, further = by_place[:2], by_place[2:]
    takes_any = any(p.kind == p.VAR_POSITIONAL for p in listed)
    nameless = [p for p in further if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    names = tuple(p.name for p in first)
    swapped = names[:1] == ("response",) or names[1:] == ("prompt",) or {*names} & {*BY_NAME}
    if (len(first) < 2 and not takes_any) or nameless or swapped:
        raise InvalidArgument(
            f"the function {name_of(function)!r} has the parameters "
            f"({', '.join(map(str, listed))}); it must take prompt and response, in this order, "
            "and what comes after them by name."
        )
    named = [p for p in further if p.kind == p.POSITIONAL_OR_KEYWORD]
    named += [p for p in listed if p.kind == p.KEYWORD_ONLY]
    return Parameters(
        first=names,
        required=tuple(p.name for p in named if p.default is p.empty),
        optional=tuple(p.name for p in named if p.default is not p.empty),
        whole_row=any(p.kind == p.VAR_KEYWORD for p in listed),
    )


def keywords_of(parameters: Parameters, texts: Texts, chats: Chats | None) -> list[dict[str, Any]]:
    """Return what the function gets by name, for each of the texts."""
    if parameters == Parameters(parameters.first):
        return [{}] * len(texts.length)  # most functions ask for nothing more
    rows = texts.columns or [{}] * len(texts.length)
    # Copies: what a function does to a list must not change the env's table.
    found = [copy.deepcopy(dict(parameters.of_row(row))) for row in rows]
    if parameters.messages:
        for keywords, messages in zip(found, conversations(texts, chats), strict=True):
            keywords["messages"] = messages
    if parameters.turns:
        for keywords, turns in zip(found, texts.turns(), strict=True):
            keywords["turns"] = turns
    return found


def conversations(texts: Texts, chats: Chats | None) -> list[list[dict[str, Any]]]:
    """Return the messages of each text's prompt, as copies. A prompt that was no conversation is
    one message of the user's."""
    found = []
    pairs = zip(texts.prompt_and_response_ids(), texts.prompt_and_response_texts(), strict=True)
    for (ids, _), (prompt, _) in pairs:
        messages = chats.messages(ids) if chats is not None else None
        messages = messages or [{"role": "user", "content": prompt}]
        found.append([dict(message) for message in messages])
    return found


def name_of(function: Any) -> str:
    """Return what a user calls the function."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
