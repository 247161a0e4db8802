"""Numbers and labels in sentences. Labels are data: what steers or hides in them is a dot."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tokenenv.bench.shown import figure
from tokenenv.safety.shown import DOT, visible

__all__ = ["all_of", "figure", "highest", "html", "listed", "plain", "short"]


def plain(value: Any) -> str:
    """Return a label as it may be shown, of one line."""
    text = " ".join(visible(str(value)).split())
    # No XML may hold these two.
    return text.replace("\ufffe", DOT).replace("\uffff", DOT)


def short(value: Any, most: int = 28) -> str:
    """Return a label that is cut where it is long."""
    text = plain(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def html(value: Any) -> str:
    """Return a label or a sentence as HTML text, also within the quotes of an attribute."""
    return escape(plain(value))


def all_of(sentences: Iterable[str]) -> str:
    """Return the sentences that are not empty, as one text."""
    return " ".join(filter(None, sentences))


def listed(labels: Sequence[str], most: int = 3) -> str:
    """Return labels in a row, and how many more there are."""
    left = len(labels) - most
    return ", ".join(labels[:most]) + (f" and {left} more" if left > 0 else "")


def highest(values: Mapping[str, float], least: bool = False) -> str:
    """Return the label with the highest value, or with the least one."""
    return (min if least else max)(values, key=lambda label: values[label])
