"""Text that others wrote, made safe to show on a terminal, on a page, in a picture or in an error;
and settings without their secrets, safe to keep.

A generated token, a prompt or a file's name may hold characters that move the cursor, reverse the
line, or are not seen at all.
"""

import re
from collections.abc import Mapping
from typing import Any

DOT = "·"
"""What is shown in the place of such a character."""
HIDDEN = (
    (0x00, 0x08),  # controls, but tab and line feed
    (0x0B, 0x1F),
    (0x7F, 0x9F),
    (0xAD, 0xAD),  # soft hyphen
    (0x34F, 0x34F),  # combining grapheme joiner
    (0x600, 0x605),  # Arabic number signs
    (0x61C, 0x61C),  # Arabic letter mark
    (0x6DD, 0x6DD),
    (0x70F, 0x70F),
    (0x890, 0x891),
    (0x8E2, 0x8E2),
    (0x115F, 0x1160),  # Hangul fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors and vowel separator
    (0x200B, 0x200F),  # zero-width characters, marks of direction
    (0x2028, 0x202E),  # line and paragraph separators, embeddings and overrides of direction
    (0x2060, 0x206F),  # word joiner, invisible operators, isolates of direction
    (0x3164, 0x3164),  # Hangul filler
    (0xD800, 0xDFFF),  # surrogates: half a character
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFEFF, 0xFEFF),  # byte order mark
    (0xFFA0, 0xFFA0),  # Hangul filler
    (0xFFF0, 0xFFFB),  # unassigned and ignored; interlinear annotation
    (0x110BD, 0x110BD),  # Kaithi number signs
    (0x110CD, 0x110CD),
    (0x13430, 0x1343F),  # joiners of Egyptian hieroglyphs
    (0x1BCA0, 0x1BCA3),  # shorthand format controls
    (0x1D173, 0x1D17A),  # musical format controls
    (0xE0000, 0xE0FFF),  # tags, variation selectors
)
"""Ranges of code points, each with its first and last: Unicode's categories Cc, Cf, Cs, Zl and Zp
except tab and line feed, and the characters that it calls default-ignorable."""
_RANGES = (f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in HIDDEN)
_HIDDEN = re.compile(f"[{''.join(_RANGES)}]")
_SECRET = re.compile(r"(api_?key|token|password|secret)$", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)\S*@")


def visible(text: str) -> str:
    """Return `text` with a dot for each character that steers or hides. Tabs and line feeds
    stay."""
    return _HIDDEN.sub(DOT, text)


def javascript_class() -> str:
    """Return the characters that `visible` replaces, as the source of a JavaScript regular
    expression with the flags "gu"."""
    return "[{}]".format("".join(f"\\u{{{first:x}}}-\\u{{{last:x}}}" for first, last in HIDDEN))


def without_user(text: str) -> str:
    """Return `text` without the user:password@ of its URLs."""
    return _USER_IN_URL.sub("", text)


def without_secrets(value: Any) -> Any:
    """Return a nest of dicts, lists and tuples as a file may keep it: without entries that are
    named like a key to a server, and without users and passwords in URLs."""
    if isinstance(value, Mapping):
        kept = ((key, entry) for key, entry in value.items() if not _SECRET.search(str(key)))
        return {key: without_secrets(entry) for key, entry in kept}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(entry) for entry in value)
    return without_user(value) if isinstance(value, str) else value
