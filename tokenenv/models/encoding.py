"""Texts to token ids and back, with care for what tokenizers do where prompt and response meet."""

import re
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

from tokenenv.errors import InvalidArgument
from tokenenv.turns import Segment

from .alignment import common_length, token_ends

BEFORE = ("\n", ".")
"""The texts that a continuation is encoded behind, tried in this order. No tokenizer that we know
joins a line break with what follows it, but some drop line breaks."""
BREAK = "\ue002\ue001\ue002"
"""Stands within the names of special tokens that are meant as plain text. It is made of private-use
characters, which no text has."""


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt, with the special tokens that the tokenizer adds. A
    beginning-of-text token that the text spells out itself is not added again."""
    # A chat template writes the token into the text, and the tokenizer would put another before it.
    ids, bos = list(tokenizer(text)["input_ids"]), getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids[:2] == [bos, bos] and len(_plain(text, tokenizer)) < len(ids):
        return ids[1:]
    return ids


def encode_continuation(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text that goes on from another one, exactly as it stands.

    A tokenizer adds special tokens, and often a space, to a text of its own. A continuation gets
    neither: if it begins with a new word, the text begins with a space.
    """
    return _behind(text, tokenizer)[1]


def continuation_offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Return the first character in `text`, and the end, of each token of `encode_continuation`.

    Raises:
        InvalidArgument: the tokenizer does not know where in a text its tokens are.
    """
    before, ids = _behind(text, tokenizer)
    try:
        found = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise InvalidArgument(
            f"spans of characters need a fast tokenizer, and {type(tokenizer).__name__} does not "
            "tell where its tokens are in a text."
        ) from error
    places = found["offset_mapping"][len(found["input_ids"]) - len(ids) :]
    return [(start - len(before), end - len(before)) for start, end in places]


def _behind(text: str, tokenizer: Any) -> tuple[str, list[int]]:
    """Return the token ids of a continuation, and the text that it was encoded behind."""
    # Encoded behind another text and cut off again, if the tokens do not join and the whole is
    # decoded as it was written.
    for before in BEFORE:
        start, both = _plain(before, tokenizer), _plain(before + text, tokenizer)
        spelled = _spelled(start, tokenizer) + text
        if both[: len(start)] == start and _spelled(both, tokenizer) == spelled:
            return before, both[len(start) :]
    return "", _plain(text, tokenizer)


def quoted(text: str, tokenizer: Any) -> str:
    """Return a text with `BREAK` within every name of a special token, for `encode_plain`."""
    marks = (tokenizer.convert_ids_to_tokens(token) for token in special_ids(tokenizer))
    names = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark)
    return re.sub(names, lambda m: m[0][:1] + BREAK + m[0][1:], text) if names else text


def encode_plain(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a continuation in which what `quoted` has marked is spelled, and is
    no special token."""
    return [i for part in text.split(BREAK) for i in encode_continuation(part, tokenizer)]


def decode_quoted(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of tokens, special ones included. The names of special tokens that others
    spell are `quoted`."""
    special = special_ids(tokenizer)
    runs = [(mark, list(run)) for mark, run in groupby(ids, special.__contains__)]
    texts = [_spelled(run, tokenizer) for _, run in runs]
    plain = [
        text if mark else quoted(text, tokenizer)
        for (mark, _), text in zip(runs, texts, strict=True)
    ]
    # Decoded apart, a run loses its first space in some tokenizers.
    return _spelled(list(ids), tokenizer) if plain == texts else "".join(plain)


def decode_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokenizer: Any,
    *,
    skip_special_tokens: bool = True,
) -> list[tuple[str, str]]:
    """Return the texts (prompt, response) of pairs of token id lists.

    Both are cut out of the two decoded together. Decoded alone, a response would lose its first
    space in some tokenizers, and a character whose first bytes are in the prompt.
    """
    both = [ids for prompt, response in pairs for ids in (list(prompt), [*prompt, *response])]
    flat = tokenizer.batch_decode(both, skip_special_tokens=skip_special_tokens)
    prompts, wholes = flat[0::2], flat[1::2]
    ends = [common_length(prompt, whole) for prompt, whole in zip(prompts, wholes, strict=True)]
    return [(whole[:end], whole[end:]) for whole, end in zip(wholes, ends, strict=True)]


def decode_segments(
    prompt: Sequence[int], segments: Sequence[Segment], tokenizer: Any
) -> list[str]:
    """Return the text of each segment of a response, without special tokens. Joined they are the
    response as it is decoded behind the prompt: each is cut out of the whole text."""
    beginnings = accumulate((segment.tokens for segment in segments), initial=list(prompt))
    texts = tokenizer.batch_decode(list(beginnings), skip_special_tokens=True)
    return [texts[-1][start:end] for start, end in pairwise(token_ends(texts).tolist())]


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, which mark something rather than spell it; without the one
    for unknown words, which stands for text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {index for index, token in added.items() if token.special}
    return (marks | set(tokenizer.all_special_ids)) - {getattr(tokenizer, "unk_token_id", None)}


def _plain(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _spelled(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
