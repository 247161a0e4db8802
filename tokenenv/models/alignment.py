"""Scores of one tokenizer's tokens, shared out over another tokenizer's tokens of the same text by
the characters that they have in common.

The *policy tokens* are those that a policy has written, and the *reward tokens* those in which a
reward model reads the same text.
"""

from bisect import bisect
from collections.abc import Callable, Sequence

import numpy as np

WINDOW = 16
"""Tokens that are decoded with the same context."""
SETTLED = 4
"""Tokens that must follow a place without changing what was decoded up to there, before the place
counts as final."""

Decode = Callable[[list[list[int]]], list[str]]
"""Maps the token ids of several texts to the texts."""


def read_text(
    decode: Decode, prompt: Sequence[int], response: Sequence[int]
) -> tuple[str, np.ndarray]:
    """Decode a text as a whole, and find where its tokens end in it, in time linear in the tokens.

    Decoding every beginning of the text would find the ends too, but takes quadratic time. Here a
    token is decoded with a window of the tokens before it. A window begins at a *final* place: what
    was decoded up to there agrees with the whole text, ends in a whole character, and is not
    changed by the next tokens. The tokens between that place and the final place before it come
    along as context, because many decoders treat a beginning in another way (they leave out a
    space, say). Where a decoder looks back further than that, every beginning is decoded after all.

    Args:
        decode: the policy tokenizer's.
        prompt: token ids.
        response: T token ids.

    Returns:
        The text, and the (T + 1,) int64 ends that `token_ends` describes; of an empty response the
        end of the text alone.
    """
    ids = [*prompt, *response]
    [text] = decode([ids])
    if not response:
        return text, np.array([len(text)])
    # agree[t]: with how many characters of the text its beginning of t response tokens agrees.
    agree: list[int] = []
    # The window's context begins at token `context`, the window itself at token `begin`, which is
    # character `known` of the text.
    context, begin, known = 0, 0, 0
    while len(agree) <= len(response):
        first = len(prompt) + len(agree)
        counts = range(first, min(first + WINDOW, len(ids) + 1))
        before, *decoded = decode([ids[context:begin], *(ids[context:count] for count in counts)])
        tails = [one[len(before) :] for one in decoded]
        agree += [known + common_length(tail, text, known) for tail in tails]
        # The next window begins at the last final place of this one, if there is one that is far
        # enough on. "\ufffd" stands for a character whose bytes are not all there yet.
        final = _final(agree[-len(tails) :])
        for place in reversed(range(len(tails) - SETTLED)):
            tail, count = tails[place], counts[place]
            whole = tail and not tail.endswith("\ufffd") and final[place] == known + len(tail)
            if whole and count >= begin + WINDOW // 4:
                context, begin, known = begin, count, known + len(tail)
                break
    # The last window decodes the text to its end. Where that agrees with the text, the windows
    # reached back far enough.
    if agree[-1] == len(text):
        return text, _final(agree)
    return text, token_ends(decode([ids[:count] for count in range(len(prompt), len(ids) + 1)]))


def token_ends(prefixes: Sequence[str]) -> np.ndarray:
    """Return where the prompt and each response token end in the decoded text.

    A character belongs to the token after which it is decoded for good. A character that several
    tokens make up belongs to the one that completes it, and a space that is decoded only with the
    next word belongs to that word. The characters of token t are those from end t to end t + 1; a
    token may have none.

    Args:
        prefixes: the text decoded after 0, 1, ..., T response tokens. The first one is the prompt
            and the last one the whole text.

    Returns:
        (T + 1,) int64, in characters: the end of the prompt, then of each response token.
    """
    return _final([common_length(prefix, prefixes[-1]) for prefix in prefixes])


def shares(
    offsets: Sequence[tuple[int, int]] | np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which part of each reward token's score each policy token takes.

    The score of a reward token that ends in the response is shared out whole, over the policy
    tokens that overlap the token's characters in the response, in proportion to the characters. Its
    parts add up to 1. A reward token that ends in the prompt has no parts. A reward token without
    characters stands at the last character before it; at the end of the text (a closing special
    token) it stands at the last policy token. So a policy token without characters takes nothing,
    unless it is the last one.

    Args:
        offsets: (R, 2) the first character and the end of each reward token in the text, as fast
            tokenizers give them.
        ends: (T + 1,) of `token_ends`.

    Returns:
        Three arrays (K,), one entry for each pair that shares something: the reward token int64,
        the policy token int64, and the part float64, 0 to 1.
    """
    begin, end, closing = _places(np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
    last = len(ends) - 2
    # Policy tokens `first` to `behind` - 1 overlap a reward token. `ends` never decreases, so two
    # binary searches find them.
    first = np.where(closing, max(last, 0), np.searchsorted(ends[1:], begin, side="right"))
    behind = np.where(closing, last + 1, np.searchsorted(ends[:-1], end, side="left"))
    count = (behind - first).clip(min=0)
    # The ragged ranges first..behind of all reward tokens as two flat arrays.
    reward = np.repeat(np.arange(len(count)), count)
    policy = np.arange(len(reward)) + np.repeat(first - (np.cumsum(count) - count), count)
    overlap = np.minimum(end[reward], ends[policy + 1]) - np.maximum(begin[reward], ends[policy])
    overlap = np.where(closing[reward], 1, overlap.clip(min=0))
    total = np.bincount(reward, overlap, minlength=len(count)).clip(min=1)
    return reward, policy, overlap / total[reward]


def align(
    scores: np.ndarray, offsets: Sequence[tuple[int, int]] | np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Turn the scores (R,) of reward tokens into scores (T,) float32 of policy tokens; see `shares`
    for the other arguments."""
    reward, policy, part = shares(offsets, ends)
    taken = np.asarray(scores, dtype=np.float64)[reward] * part
    return np.bincount(policy, taken, minlength=len(ends) - 1).astype(np.float32)


def _final(agree: Sequence[int]) -> np.ndarray:
    """Return the characters that each beginning has for good: a later beginning that agrees less
    has taken the rest back. That is the minimum from each place to the end."""
    return np.minimum.accumulate(np.array(agree)[::-1])[::-1]


def common_length(tail: str, text: str, start: int = 0) -> int:
    """Return how many of its first characters `tail` has in common with the text from `start`
    on."""
    # Whether a beginning agrees can only turn from yes to no as it gets longer, so a binary search
    # finds where, with comparisons in C.
    beginnings = range(1, len(tail) + 1)
    return bisect(beginnings, False, key=lambda n: not text.startswith(tail[:n], start))


def _places(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first character (R,) and the end (R,) of each reward token, and whether it closes
    the text (R,)."""
    # Tokens without characters are special tokens, which tokenizers put at (0, 0), and spaces that
    # some tokenizers cut from their offsets.
    begin, end = offsets.T
    empty, reached = begin == end, np.maximum.accumulate(end)
    behind = np.arange(len(end)) > np.flatnonzero(~empty).max(initial=-1)
    return (
        np.where(empty, reached - 1, begin),
        np.where(empty, reached, end),
        behind & (end < reached),
    )
