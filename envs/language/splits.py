"""The rule that says which prompts are held out."""

import hashlib

SPLITS = ("train", "test")
_TEST_SHARE = 0.25


def split_of(text: str) -> str:
    """Return the split of a text, "train" or "test" (a quarter of all texts), by a stable hash."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] < 256 * _TEST_SHARE else "train"
