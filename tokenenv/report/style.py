"""What tells the rows apart: a colour, a marker and dashes each, so that no one needs the colour.

The colours keep the hues that Okabe and Ito chose for the colour-blind. They are darker than theirs
on white, and lighter on black, for a contrast of 3 to 1 at least.
"""

from typing import NamedTuple

ROW_COLOURS = (
    ("#0067a5", "#5cb8f0"),
    ("#b84a00", "#ff9d5c"),
    ("#00765a", "#33c9a0"),
    ("#9c3f7a", "#ec9fcb"),
    ("#7a5c00", "#e6c84a"),
    ("#5b4bb0", "#b5a8f5"),
    ("#a3262f", "#ff8f8f"),
    ("#476070", "#b3c4d1"),
)
"""Of the rows in their order, on a light page and on a dark one."""
INKS = {
    "text": ("#16181d", "#f0f2f5"),
    "dim": ("#5b6270", "#a2a9b6"),
    "line": ("#d9dce1", "#343943"),
}
"""Of what is written, of axes, and of the grid."""
MARKERS = "os^DvP*X<>"
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4)), (0, (8, 2)))


class Style(NamedTuple):
    """How a row is drawn."""

    colour: str
    marker: str
    dashes: str | tuple[int, tuple[float, ...]]


def style_of(number: int) -> Style:
    """Return the style of the row with this number. Eighty rows have styles that differ."""
    return Style(
        ROW_COLOURS[number % len(ROW_COLOURS)][0],
        MARKERS[number % len(MARKERS)],
        DASHES[(number + number // len(ROW_COLOURS)) % len(DASHES)],
    )


def variables() -> dict[str, tuple[str, str]]:
    """Return the colours by the name of their CSS variable, light and dark."""
    rows = {f"row{number}": pair for number, pair in enumerate(ROW_COLOURS)}
    return rows | INKS
