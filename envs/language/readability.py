"""Flesch reading ease, the gold metric of PyDocs-v0.

Formula: R. Flesch, "A new readability yardstick", Journal of Applied Psychology 32 (1948) 221-233:
206.835 - 1.015 * words / sentences - 84.6 * syllables / words. Higher is easier; plain English is
60 to 70.
"""

import re
from functools import lru_cache

MIN_WORDS = 12
"""A text of fewer words scores 0: the formula means nothing there, and a few short words would beat
any prose."""
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s+[^a-z\s]|\s*$)")
_VOWELS = re.compile(r"[aeiouy]+")
_SILENT_END = re.compile(
    r"(?<=[^aeiouylsxzcgtd])es$|(?<=[^aeiouytd])ed$|(?<=[^aeiouyl])e$|(?<=[aeiouy]l)e[sd]?$"
)


def words(text: str) -> list[str]:
    """Runs of letters, apostrophes inside included; digits and symbols are no words."""
    return _WORD.findall(text)


@lru_cache(maxsize=100_000)
def count_syllables(word: str) -> int:
    """Groups of vowels, a silent final e, -es or -ed not counted; at least 1. A heuristic, right
    for most words."""
    return max(1, len(_VOWELS.findall(_SILENT_END.sub("", word.lower()))))


def count_sentences(text: str) -> int:
    """Sentences that end: in . ! or ?, then the end of the text or white space and no small letter;
    at least 1.

    A last sentence that is cut off adds its words but no sentence, so nothing is gained by stopping
    inside one.
    """
    return max(1, len(_SENTENCE_END.findall(text)))


def reading_ease(text: str, min_words: int = MIN_WORDS) -> float:
    """Flesch reading ease clamped to 0..100, or 0 below `min_words` words."""
    found = words(text)
    if len(found) < max(1, min_words):
        return 0.0
    syllables = sum(map(count_syllables, found))
    ease = 206.835 - 1.015 * len(found) / count_sentences(text) - 84.6 * syllables / len(found)
    return min(100.0, max(0.0, ease))
