"""Prompts: read them from where users keep them, and turn them into token ids."""

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.chats import Chats, is_chat, keep_ends
from tokenenv.models.encoding import encode_continuation, encode_prompt
from tokenenv.tables import read_rows
from tokenenv.types import PromptLimit, TokenSpec

LONG_PROMPTS = ("refuse", "truncate")
_ONE, _HALF = np.uint64(1), np.uint64(32)

Encode = Callable[[str, Any], list[int]]
"""A function of a text and a tokenizer that returns token ids."""

LONGER_THAN: dict[PromptLimit, str] = {
    "task": "which this task fixes; shorten the prompt.",
    "option": "as the env was made; shorten the prompt, or make the env with "
    "max_prompt_tokens={length}.",
    "prompts": "the length of the longest prompt in prompts=; shorten this one, or make the env "
    "with max_prompt_tokens={length}.",
}
"""What to do about a prompt of `length` tokens that is too long for an env, by where the env's
`max_prompt_tokens` came from."""


def load_prompts(
    source: Any,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_prompt_tokens: int | None = None,
    long_prompts: str = "refuse",
    chat_template: bool | Chats = False,
    column: str = "prompt",
) -> list[list[int]]:
    """Prompt token ids from a list, a file or a dataset, or from the rows that `read_rows` made of
    one.

    A prompt is a string or a list of token ids. With `chat_template` (True, or the `Chats` that
    keep the conversations) it may also be a list of chat messages, and a string is one user
    message.

    Args:
        max_prompt_tokens: the most tokens a prompt may have, special tokens and the chat template
            included; None sets no limit.
        long_prompts: what happens to a longer prompt. "refuse" raises. "truncate" keeps special
            tokens at the beginning and the last tokens; of a chat it keeps what the template writes
            around the longest message, and the end of that message.
        column: the name of the prompt's column.

    Raises:
        InvalidArgument: nothing to read, no prompts, or a prompt that cannot be used; names the
            prompt or the file's line. "truncate" without `max_prompt_tokens` is refused too.
    """
    check_limit(max_prompt_tokens, long_prompts)
    if not isinstance(chat_template, bool | Chats):
        raise InvalidArgument(
            f"chat_template must be True, False or Chats, not of type "
            f"{type(chat_template).__name__}."
        )
    chats = Chats(tokenizer) if chat_template is True else chat_template or None
    # Chats cut their longest message before they are encoded; plain prompts are cut afterwards.
    chat_limit = max_prompt_tokens if long_prompts == "truncate" else None
    prompts = []
    for row in read_rows(source, column):
        text = chats.encode(row.prompt, row.where, chat_limit) if chats else row.prompt
        ids = to_ids(text, tokenizer, vocab_size, row.where)
        prompts.append(fit_prompt(ids, max_prompt_tokens, long_prompts, row.where, tokenizer))
    return prompts


def check_limit(max_prompt_tokens: int | None, long_prompts: str) -> None:
    """Raises `InvalidArgument` unless the two options of `load_prompts` go together."""
    check_choice("long_prompts", long_prompts, LONG_PROMPTS)
    if max_prompt_tokens is None:
        if long_prompts == "truncate":
            raise InvalidArgument(
                "long_prompts='truncate' needs max_prompt_tokens=, the number of tokens to keep of "
                "a longer prompt; without it every prompt is kept whole."
            )
    elif not isinstance(max_prompt_tokens, int | np.integer) or max_prompt_tokens < 1:
        raise InvalidArgument(
            f"max_prompt_tokens={max_prompt_tokens!r} must be a whole number, 1 or more, or None "
            f"for the length of the longest prompt."
        )


def read_prompt(prompt: Any, spec: TokenSpec, label: str) -> list[int]:
    """Token ids of a prompt that an env is given after it was made: token ids are taken as they
    are, and texts and chat messages are read as the env read its own.

    Raises:
        InvalidArgument: the prompt is empty, cannot be used, or is longer than the env's prompts
            may be; `label` names it.
    """
    if spec.chats is not None and (isinstance(prompt, str) or is_chat(prompt)):
        prompt = spec.chats.encode(_text(prompt, label), label)
    ids = to_ids(prompt, spec.tokenizer, spec.vocab_size, label)
    _require_tokens(ids, label)
    if len(ids) > spec.max_prompt_tokens:
        what_to_do = LONGER_THAN[spec.max_prompt_tokens_from].format(length=len(ids))
        raise InvalidArgument(
            f"{label} has {len(ids)} tokens and max_prompt_tokens={spec.max_prompt_tokens}, "
            f"{what_to_do}"
        )
    return ids


def read_continuation(text: Any, spec: TokenSpec, label: str) -> list[int]:
    """Token ids of what follows a prompt, without the special tokens that the tokenizer adds."""
    return to_ids(text, spec.tokenizer, spec.vocab_size, label, encode_continuation)


def fit_prompt(
    ids: list[int],
    max_prompt_tokens: int | None,
    long_prompts: str,
    label: str,
    tokenizer: Any = None,
) -> list[int]:
    """`ids` where it has 1 to `max_prompt_tokens` tokens. A longer prompt is an error or, under
    "truncate", loses tokens after the special tokens of `tokenizer` that it begins with."""
    _require_tokens(ids, label)
    if max_prompt_tokens is None or len(ids) <= max_prompt_tokens:
        return ids
    if long_prompts == "refuse":
        raise InvalidArgument(
            f"{label} has {len(ids)} tokens and max_prompt_tokens={max_prompt_tokens}; shorten "
            f"it, raise max_prompt_tokens, leave max_prompt_tokens out (the longest prompt then "
            f"sets it), or pass long_prompts='truncate' to keep its last tokens."
        )
    return keep_ends(ids, max_prompt_tokens, tokenizer)


def _require_tokens(ids: list[int], label: str) -> None:
    if not ids:
        raise InvalidArgument(f"{label} is empty; a prompt needs at least one token.")


def to_ids(
    text: Any, tokenizer: Any, vocab_size: int, label: str, encode: Encode = encode_prompt
) -> list[int]:
    """Token ids of a string, or of a sequence of ids (a list, a NumPy array or a tensor); raises
    `InvalidArgument` for an id that is out of range."""
    if isinstance(text, str):
        if tokenizer is None:
            raise InvalidArgument(f"{label}: tokens of this env have no text; give token ids.")
        ids = encode(_text(text, label), tokenizer)
    else:
        ids = _read_ids(text, label)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidArgument(
                f"{label}: token id {token} is out of range; allowed: 0 to {vocab_size - 1}."
            )
    return ids


def draw(count: int, starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Draw n prompts of `count` uniformly; return their indices, (n,) int64.

    Each is draw `numbers` (n,) (0 or more) of the stream that begins at `starts` (n,) uint64. The
    generator is SplitMix64 (Steele, Lea and Flood 2014): it gives any draw of a stream without
    those before.
    """
    if count == 1:
        return np.zeros(len(numbers), dtype=np.int64)
    # Products of uint64 arrays are taken modulo 2^64, as the generator asks for.
    mixed = starts + (numbers.astype(np.uint64) + _ONE) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    # The upper half of the product with `count`, which has 128 bits, from two halves of 32 bits.
    high, low, size = mixed >> _HALF, mixed & np.uint64(2**32 - 1), np.uint64(count)
    return ((high * size + (low * size >> _HALF)) >> _HALF).astype(np.int64)


@lru_cache(maxsize=4096)
def stream_start(seed: int) -> int:
    """Mix any seed (0 or more) into 64 bits, the start of its stream of prompts, so that the
    streams of neighbouring seeds start far apart."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def _text(text: Any, label: str) -> Any:
    """Return `text` as it is; raise `InvalidArgument` for a string that cannot have tokens."""
    if not isinstance(text, str):
        return text
    if text.startswith("<generator object"):
        raise InvalidArgument(
            f"{label}: a text cannot pass through ArrayConversion; give token ids."
        )
    half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise InvalidArgument(
            f"{label} holds half a character (U+{ord(half):04X}), which has no tokens."
        )
    return text


def _read_ids(values: Any, label: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        hint = " Chat messages need chat_template=True." if is_chat(values) else ""
        kind = type(values).__name__
        raise InvalidArgument(
            f"{label} is no text (type {kind}); allowed: a string or a sequence of token ids.{hint}"
        ) from error
