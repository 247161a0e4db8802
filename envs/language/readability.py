"""Flesch reading ease, the gold metric of PyDocs-v0.

Formula: R. Flesch, "A new readability yardstick", Journal of Applied Psychology 32 (1948) 221-233:
206.835 - 1.015 * words / sentences - 84.6 * syllables / words. Higher is easier; plain English is
60 to 70.
"""

import re
from functools import lru_cache

MIN_WORDS = 12
"""A text of fewer words scores 0. The formula means nothing there: a few short words would beat any
prose."""
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s+[^a-z\s]|\s*$)")
_VOWELS = re.compile(r"[aeiouy]+")
_SILENT_END = re.compile(
    r"(?<=[^aeiouylsxzcgtd])es$|(?<=[^aeiouytd])ed$|(?<=[^aeiouyl])e$|(?<=[aeiouy]l)e[sd]?$"
)


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters with the apostrophes inside them. Digits and
    symbols are no words."""
    return _WORD.findall(text)


@lru_cache(maxsize=100_000)
def count_syllables(word: str) -> int:
    """Count the groups of vowels in a word, without a silent final e, -es or -ed; at least 1. It is
    a heuristic that is right for most words."""
    return max(1, len(_VOWELS.findall(_SILENT_END.sub("", word.lower()))))


def count_sentences(text: str) -> int:
    """Count the sentences that end, at least 1.

    A sentence ends with . ! or ?, followed by the end of the text, or by white space and no small
    letter. A last sentence that is cut off adds its words but no sentence, so that nothing is
    gained by stopping inside one.
    """
    return max(1, len(_SENTENCE_END.findall(text)))


def reading_ease(text: str, min_words: int = MIN_WORDS) -> float:
    """Return the Flesch reading ease of a text, clamped to 0..100, or 0 below `min_words` words."""
    found = words(text)
    if len(found) < max(1, min_words):
        return 0.0
    syllables = sum(map(count_syllables, found))
    ease = 206.835 - 1.015 * len(found) / count_sentences(text) - 84.6 * syllables / len(found)
    return min(100.0, max(0.0, ease))
