"""From texts to token ids and back: what a tokenizer does at the borders of prompt and response."""

from collections.abc import Sequence
from typing import Any

from .alignment import common_length

BEFORE = ("\n", ".")
"""What a continuation is encoded behind: a line break joins with what follows it in no tokenizer we
know, and some drop it."""


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt with the special tokens that the tokenizer adds; a beginning that is
    spelled out in the text, as by a chat template, is not added again."""
    ids, bos = list(tokenizer(text)["input_ids"]), getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids[:2] == [bos, bos] and len(_plain(text, tokenizer)) < len(ids):
        return ids[1:]
    return ids


def encode_continuation(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that goes on from another one, as it stands: without the special tokens
    and the space that tokenizers put before and behind a text of its own. A new word begins with a
    space."""
    for before in BEFORE:
        start, both = _plain(before, tokenizer), _plain(before + text, tokenizer)
        if (
            both[: len(start)] == start
            and _spelled(both, tokenizer) == _spelled(start, tokenizer) + text
        ):
            return both[len(start) :]
    return _plain(text, tokenizer)


def decode_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokenizer: Any,
    *,
    skip_special_tokens: bool = True,
) -> list[tuple[str, str]]:
    """The texts of prompts and responses, cut out of the two decoded together: alone, a response
    loses its first space in some tokenizers, and a character that begins in the prompt."""
    both = [ids for prompt, response in pairs for ids in (list(prompt), [*prompt, *response])]
    flat = tokenizer.batch_decode(both, skip_special_tokens=skip_special_tokens)
    ends = [
        common_length(prompt, whole) for prompt, whole in zip(flat[0::2], flat[1::2], strict=True)
    ]
    return [(whole[:end], whole[end:]) for whole, end in zip(flat[1::2], ends, strict=True)]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that mark something, rather than spell it; not that of unknown words."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {index for index, token in added.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    return marks - {getattr(tokenizer, "unk_token_id", None)}


def _plain(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _spelled(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
