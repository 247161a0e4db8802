"""Scores of one tokenizer's tokens, shared out over another's tokens of the same text, by characters."""

from bisect import bisect
from collections.abc import Sequence

import numpy as np


def token_ends(prefixes: Sequence[str]) -> np.ndarray:
    """Where each response token ends in the decoded text, as (T + 1,) int64 numbers of characters.

    A character belongs to the token after which it is decoded for good: a character that several tokens make up to the
    one that completes it, a space that is only decoded with the next word to that word. Token t's characters are those
    from end t to end t + 1; a token may have none.

    Args:
        prefixes: the text decoded after 0, 1, ..., T response tokens, so that the last one is the whole text and end 0 is
            where the prompt ends.
    """
    agree = np.array([common_length(prefix, prefixes[-1]) for prefix in prefixes])
    return np.minimum.accumulate(agree[::-1])[::-1]  # what a later prefix takes back was not yet final


def shares(offsets: Sequence[tuple[int, int]] | np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The part of each reward token's score that each policy token takes, (R, T) float64.

    A reward token that ends in the response is shared out whole, over the policy tokens that its characters in the
    response overlap, in proportion to the characters. Its row sums to 1, that of a token that ends in the prompt to 0.
    A token without characters stands at the last character before it, but at the end of the text (a closing special
    token) at the last policy token. So a policy token without characters takes nothing, unless it is the last one.

    Args:
        offsets: (R, 2) first character and end of each reward token in the text, as fast tokenizers give them.
        ends: (T + 1,) of `token_ends`.
    """
    begin, end, closing = _places(np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
    overlap = np.minimum(end[:, None], ends[1:]) - np.maximum(begin[:, None], ends[:-1])
    overlap = overlap.clip(min=0).astype(np.float64)
    overlap[closing] = np.arange(overlap.shape[1]) == overlap.shape[1] - 1
    return overlap / overlap.sum(1, keepdims=True).clip(min=1)


def align(scores: np.ndarray, offsets: Sequence[tuple[int, int]] | np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Scores (R,) of reward tokens as scores (T,) float32 of policy tokens; see `shares`."""
    return (np.asarray(scores, dtype=np.float64) @ shares(offsets, ends)).astype(np.float32)


def common_length(prefix: str, text: str) -> int:
    """With how many of its characters `prefix` agrees with the beginning of `text`."""
    return bisect(range(1, len(prefix) + 1), False, key=lambda count: not text.startswith(prefix[:count]))


def _places(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First character (R,) and end (R,) of each reward token, and which of them (R,) close the text.

    Tokens without characters are special tokens, at (0, 0), and spaces that some tokenizers cut from their offsets.
    """
    begin, end = offsets.T
    empty, reached = begin == end, np.maximum.accumulate(end)
    behind = np.arange(len(end)) > np.flatnonzero(~empty).max(initial=-1)
    return np.where(empty, reached - 1, begin), np.where(empty, reached, end), behind & (end < reached)
