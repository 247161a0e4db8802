"""Prompts: reading them from where users keep them, and turning them into token ids."""

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.chats import Chats, is_chat, keep_ends
from tokenenv.models.encoding import encode_continuation, encode_prompt
from tokenenv.types import TokenSpec

LONG_PROMPTS = ("refuse", "truncate")
MASK = 2**64 - 1

Encode = Callable[[str, Any], list[int]]
"""Token ids of a text by a tokenizer."""

Labelled = tuple[str, Any]
"""Where a prompt was found, for error messages, and the prompt."""


def load_prompts(
    source: Any,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_prompt_tokens: int,
    long_prompts: str = "refuse",
    chat_template: bool | Chats = False,
    column: str = "prompt",
) -> list[list[int]]:
    """Prompt token ids from a list, a JSONL or text file, or a `datasets` dataset.

    A JSONL line, and a dataset's row, holds the prompt under `column` (a JSONL line may also be a
    bare string); a text file holds one prompt a line; empty lines are skipped. A prompt is a
    string, a list of token ids or, with `chat_template` (True, or the `Chats` that keep the
    conversations), a list of chat messages; a string is then one user message. `long_prompts` says
    what happens above `max_prompt_tokens`: "refuse" raises, "truncate" keeps special tokens at the
    beginning and the last tokens; of a chat what the template writes around the longest message,
    and that one's end.

    Raises:
        InvalidArgument: nothing to read, no prompts, or a prompt that cannot be used; names the
            prompt or the file's line.
    """
    check_choice("long_prompts", long_prompts, LONG_PROMPTS)
    if not isinstance(chat_template, bool | Chats):
        raise InvalidArgument(
            f"chat_template must be True, False or Chats, not of type "
            f"{type(chat_template).__name__}."
        )
    chats = Chats(tokenizer) if chat_template is True else chat_template or None
    limit = max_prompt_tokens if long_prompts == "truncate" else None
    labelled = list(_read(source, column))
    if not labelled:
        raise InvalidArgument(f"prompts={_name(source)} holds no prompts; at least one is needed.")
    prompts = []
    for label, prompt in labelled:
        text = chats.encode(prompt, label, limit) if chats else prompt
        ids = to_ids(text, tokenizer, vocab_size, label)
        prompts.append(fit_prompt(ids, max_prompt_tokens, long_prompts, label, tokenizer))
    return prompts


def read_prompt(prompt: Any, spec: TokenSpec, label: str) -> list[int]:
    """Token ids of a prompt that an env is given: ids are taken as they are; a text, or chat
    messages, as the env's own."""
    if spec.chats is not None and (isinstance(prompt, str) or is_chat(prompt)):
        prompt = spec.chats.encode(_text(prompt, label), label)
    ids = to_ids(prompt, spec.tokenizer, spec.vocab_size, label)
    return fit_prompt(ids, spec.max_prompt_tokens, "refuse", label)


def read_continuation(text: Any, spec: TokenSpec, label: str) -> list[int]:
    """Token ids of what follows a prompt, without special tokens of the tokenizer's own."""
    return to_ids(text, spec.tokenizer, spec.vocab_size, label, encode_continuation)


def fit_prompt(
    ids: list[int], max_prompt_tokens: int, long_prompts: str, label: str, tokenizer: Any = None
) -> list[int]:
    """`ids` if it has 1 to `max_prompt_tokens` tokens, else an error or, under "truncate", its last
    tokens behind the special tokens of `tokenizer` that it begins with."""
    if not ids:
        raise InvalidArgument(f"{label} is empty; a prompt needs at least one token.")
    if len(ids) <= max_prompt_tokens:
        return ids
    if long_prompts == "refuse":
        raise InvalidArgument(
            f"{label} has {len(ids)} tokens and max_prompt_tokens={max_prompt_tokens}; "
            "shorten it, raise max_prompt_tokens, or pass long_prompts='truncate' to keep its last "
            "tokens."
        )
    return keep_ends(ids, max_prompt_tokens, tokenizer)


def to_ids(
    text: Any, tokenizer: Any, vocab_size: int, label: str, encode: Encode = encode_prompt
) -> list[int]:
    """Token ids of a string or of a sequence of ids (lists, NumPy arrays or tensors); checks that
    ids are in range."""
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


def draw(prompts: Sequence[Sequence[int]], seed: int, number: int) -> tuple[int, Sequence[int]]:
    """An index and its prompt, uniformly: draw `number` (from 0) of the stream of `seed`, 0 or
    more.

    The generator is SplitMix64 (Steele, Lea and Flood 2014), which gives any of its numbers without
    those before it.
    """
    if len(prompts) == 1:
        return 0, prompts[0]
    mixed = (_start(seed) + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    index = (mixed ^ (mixed >> 31)) * len(prompts) >> 64
    return index, prompts[index]


def _text(text: Any, label: str) -> Any:
    """`text`, if it is a chat or has tokens."""
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


@lru_cache(maxsize=4096)
def _start(seed: int) -> int:
    """64 bits of any seed, so that neighbouring seeds start far apart."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def _read_ids(values: Any, label: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        hint = " Chat messages need chat_template=True." if is_chat(values) else ""
        kind = type(values).__name__
        raise InvalidArgument(
            f"{label} is no text (type {kind}); allowed: a string or a sequence of token ids.{hint}"
        ) from error


def _read(source: Any, column: str) -> Iterable[Labelled]:
    if isinstance(source, (str, Path)):
        return _read_file(Path(source), column)
    if hasattr(source, "column_names"):
        return _read_dataset(source, column)
    if isinstance(source, Sequence):
        return [(f"prompts[{index}]", prompt) for index, prompt in enumerate(source)]
    raise InvalidArgument(
        f"prompts={_name(source)} is of type {type(source).__name__}; allowed: a list, a path, a "
        f"datasets.Dataset."
    )


def _read_file(path: Path, column: str) -> Iterator[Labelled]:
    if not path.is_file():
        raise InvalidArgument(
            f"prompts={str(path)!r} is not a file; give a .jsonl or a text file, or a list."
        )
    is_json = path.suffix in (".jsonl", ".json")
    # Not splitlines(): it also splits at characters, such as U+2028, that JSON strings and prose
    # may hold.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), 1):
            where = f"{path}:{number}"
            if line.strip():
                yield where, _json_prompt(line, column, where) if is_json else line.rstrip("\n")


def _lines(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"prompts={str(path)!r} is not UTF-8 text: {error.reason}."
        ) from error


def _json_prompt(line: str, column: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of a number of too many digits
        raise InvalidArgument(
            f"{where} is not JSON ({getattr(error, 'msg', error)}); each line holds one value."
        ) from error
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or column not in row:
        raise InvalidArgument(
            f"{where} holds no {column!r}; name the right one with prompt_column=."
        )
    return row[column]


def _read_dataset(dataset: Any, column: str) -> Iterator[Labelled]:
    if isinstance(dataset.column_names, Mapping):
        raise InvalidArgument(
            f"prompts is a dataset of several splits; give one of them: {', '.join(dataset)}."
        )
    for index, row in enumerate(dataset):
        if column not in row:
            raise InvalidArgument(
                f"prompt_column={column!r} is not in the dataset; it has {', '.join(row)}."
            )
        yield f"prompts[{index}]", row[column]


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else f"<{type(source).__name__}>"
