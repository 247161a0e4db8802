"""Which prompts are held out."""

import hashlib

SPLITS = ("train", "test")
_TEST_SHARE = 0.25


def split_of(text: str) -> str:
    """'train' or 'test' (a quarter), by a stable hash of what a prompt is made from."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] < 256 * _TEST_SHARE else "train"
