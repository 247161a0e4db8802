"""English prose of the Python reference. It is read at run time from the standard library's
`pydoc_data.topics`."""

import re
import sys
from collections.abc import Iterator
from functools import cache

from tokenenv.envs.language.splits import SPLITS, split_of
from tokenenv.errors import ModelError, check_choice

MIN_WORDS, MAX_WORDS = 25, 44
"""The length of a passage in words."""
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_CODE = re.compile(r"::=|>>>|[|{}=<>\\]|\+--|\*\*|__ __")
_VERSION_NOTE = re.compile(r"(Changed|New|Added|Removed) in version|Deprecated since|Availability:")
_BULLET = re.compile(r"^\s*(\* |\[\d+\] |\d+\. |- )")
_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'")
    | dict.fromkeys('"\u201c\u201d')
    | dict.fromkeys("\u2013\u2014", "-")
    | {"\u2026": "..."}
)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the prose paragraphs of one page of plain-text documentation, each on one line and
    without markup."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = _plain(_BULLET.sub("", block))
        if _is_prose(paragraph):
            yield paragraph


def _plain(block: str) -> str:
    text = re.sub(r"(?<=\w-)\n\s*(?=\w)", "", block)  # joins a word that is broken at its hyphen
    text = re.sub(r"\s*\[\d+\]", "", text)  # drops footnote references
    markup = r"\*\*(.+?)\*\*|\*(\w.*?)\*|`+(.+?)`+"
    text = re.sub(markup, lambda m: next(filter(None, m.groups())), text, flags=re.S)
    return " ".join(text.translate(_PLAIN).split())


def _is_prose(text: str) -> bool:
    """Whether a paragraph is whole English sentences, and no code, grammar, table, heading, version
    note or list of operators."""
    whole = text[:1].isupper() and text.endswith((".", ".)")) and len(text.split()) >= 12
    return whole and text.isascii() and not _CODE.search(text) and not _VERSION_NOTE.match(text)


def passages(text: str) -> Iterator[str]:
    """Yield runs of whole sentences of a paragraph: from each sentence on the longest one that has
    `MIN_WORDS` to `MAX_WORDS` words, if there is any."""
    sentences = SENTENCE_BREAK.split(text)
    for start in range(len(sentences)):
        runs = [" ".join(sentences[start:stop]) for stop in range(start + 1, len(sentences) + 1)]
        fitting = [run for run in runs if MIN_WORDS <= len(run.split()) <= MAX_WORDS]
        if fitting:
            yield fitting[-1]


@cache
def prose(split: str) -> tuple[str, ...]:
    """Return the paragraphs of one split, "train" or "test".

    Topics repeat one another's paragraphs. A paragraph belongs to the shortest topic that holds it,
    so that none is in both splits.
    """
    check_choice("split", split, SPLITS)
    topics = _topics()
    owner: dict[str, str] = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for paragraph in paragraphs(topics[topic]):
            owner.setdefault(paragraph, topic)
    return tuple(paragraph for paragraph, topic in owner.items() if split_of(topic) == split)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        package = f"libpython3.{sys.version_info.minor}-stdlib"
        raise ModelError(
            "this Python lacks the module pydoc_data.topics, whose prose PyDocs-v0 continues; "
            f"Debian and Ubuntu have it in the package {package}, other systems in their full "
            "Python package"
        ) from error
    return topics
