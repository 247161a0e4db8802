"""Scores of one tokenizer's tokens, shared out over another's tokens of the same text, by
characters."""

from bisect import bisect
from collections.abc import Callable, Sequence

import numpy as np

WINDOW = 16
"""Tokens that are decoded with the same context."""
SETTLED = 4
"""Tokens that must follow a place without taking back what was decoded up to there."""

Decode = Callable[[list[list[int]]], list[str]]
"""Token ids of several texts to the texts."""


def read_text(
    decode: Decode, prompt: Sequence[int], response: Sequence[int]
) -> tuple[str, np.ndarray]:
    """A text decoded whole, and its `token_ends`, in time linear in the tokens.

    A token is decoded with a window of those before it, not with all of them. A window begins at a
    place up to which the text is decoded for good: what was decoded up to there agrees with the
    whole text, ends in a whole character, and is not taken back by the next tokens. The tokens
    between that place and the one before it come along as context, since many decoders treat a
    beginning otherwise (a space is left out, say). Where a decoder looks back further than that,
    every beginning is decoded.
    """
    ids = [*prompt, *response]
    [text] = decode([ids])
    if not response:
        return text, np.array([len(text)])
    agree: list[int] = []
    context, begin, known = (
        0,
        0,
        0,
    )  # the window's context and its beginning, as tokens; the beginning as characters
    while len(agree) <= len(response):
        first = len(prompt) + len(agree)
        counts = range(first, min(first + WINDOW, len(ids) + 1))
        before, *decoded = decode([ids[context:begin], *(ids[context:count] for count in counts)])
        tails = [one[len(before) :] for one in decoded]
        agree += [known + common_length(tail, text, known) for tail in tails]
        final = _final(agree[-len(tails) :])
        for place in reversed(range(len(tails) - SETTLED)):
            tail, count = tails[place], counts[place]
            whole = tail and not tail.endswith("\ufffd") and final[place] == known + len(tail)
            if whole and count >= begin + WINDOW // 4:
                context, begin, known = begin, count, known + len(tail)
                break
    if agree[-1] == len(text):
        return text, _final(agree)
    return text, token_ends(decode([ids[:count] for count in range(len(prompt), len(ids) + 1)]))


def token_ends(prefixes: Sequence[str]) -> np.ndarray:
    """Where each response token ends in the decoded text, as (T + 1,) int64 numbers of characters.

    A character belongs to the token after which it is decoded for good: a character that several
    tokens make up to the one that completes it, a space that is only decoded with the next word to
    that word. Token t's characters are those from end t to end t + 1; a token may have none.

    Args:
        prefixes: the text decoded after 0, 1, ..., T response tokens, so that the last one is the
            whole text and end 0 is where the prompt ends.
    """
    return _final([common_length(prefix, prefixes[-1]) for prefix in prefixes])


def shares(
    offsets: Sequence[tuple[int, int]] | np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of each reward token's score that each policy token takes, where it takes any.

    A reward token that ends in the response is shared out whole, over the policy tokens that its
    characters in the response overlap, in proportion to the characters. Its parts add up to 1; one
    that ends in the prompt has none. A token without characters stands at the last character before
    it, but at the end of the text (a closing special token) at the last policy token. So a policy
    token without characters takes nothing, unless it is the last one.

    Args:
        offsets: (R, 2) first character and end of each reward token in the text, as fast tokenizers
            give them.
        ends: (T + 1,) of `token_ends`.

    Returns:
        K reward tokens, policy tokens, int64, and parts, float64: (K,) each.
    """
    begin, end, closing = _places(np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
    last = len(ends) - 2
    first = np.where(closing, max(last, 0), np.searchsorted(ends[1:], begin, side="right"))
    behind = np.where(closing, last + 1, np.searchsorted(ends[:-1], end, side="left"))
    count = (behind - first).clip(min=0)
    reward = np.repeat(np.arange(len(count)), count)
    policy = np.arange(len(reward)) + np.repeat(first - (np.cumsum(count) - count), count)
    overlap = np.minimum(end[reward], ends[policy + 1]) - np.maximum(begin[reward], ends[policy])
    overlap = np.where(closing[reward], 1, overlap.clip(min=0))
    total = np.bincount(reward, overlap, minlength=len(count)).clip(min=1)
    return reward, policy, overlap / total[reward]


def align(
    scores: np.ndarray, offsets: Sequence[tuple[int, int]] | np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Scores (R,) of reward tokens as scores (T,) float32 of policy tokens; see `shares`."""
    reward, policy, part = shares(offsets, ends)
    taken = np.asarray(scores, dtype=np.float64)[reward] * part
    return np.bincount(policy, taken, minlength=len(ends) - 1).astype(np.float32)


def _final(agree: Sequence[int]) -> np.ndarray:
    """What a later prefix takes back was not yet final."""
    return np.minimum.accumulate(np.array(agree)[::-1])[::-1]


def common_length(tail: str, text: str, start: int = 0) -> int:
    """With how many of its characters `tail` agrees with the text from `start` on."""
    return bisect(
        range(1, len(tail) + 1), False, key=lambda count: not text.startswith(tail[:count], start)
    )


def _places(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First character (R,) and end (R,) of each reward token, and which of them (R,) close the
    text.

    Tokens without characters are special tokens, at (0, 0), and spaces that some tokenizers cut
    from their offsets.
    """
    begin, end = offsets.T
    empty, reached = begin == end, np.maximum.accumulate(end)
    behind = np.arange(len(end)) > np.flatnonzero(~empty).max(initial=-1)
    return (
        np.where(empty, reached - 1, begin),
        np.where(empty, reached, end),
        behind & (end < reached),
    )
