"""Drawing with matplotlib: panels for the page, whole figures for their files."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.report.curves import At
from tokenenv.report.figure import Figure, Panel, Series
from tokenenv.report.style import INKS, Style, style_of
from tokenenv.report.words import plain, short

TEXT, DIM, LINE = (INKS[name][0] for name in ("text", "dim", "line"))
WIDTH, HEIGHT = 4.4, 3.1
"""Of a panel, in inches. A telephone is about as wide, so its letters keep their size there."""
EXACT = "--"
"""How a line that is exact is drawn."""
ROW_HEIGHT = 0.26
"""Of a row in a list of rows."""
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": DIM,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "text.color": TEXT,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tokenenv",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
Rows = Mapping[str, int]
"""The numbers of the rows, which decide how they are drawn."""


@contextmanager
def drawn() -> Iterator[None]:
    """Set how everything is drawn."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(SETTINGS):
        # The font of the measure may lack letters that a browser has.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def panel(panel: Panel, rows: Rows) -> Any:
    """Return a matplotlib figure of one panel, without title and legend, which the page has."""
    # pyplot would open windows and keep the figure.
    from matplotlib.figure import Figure as Canvas

    made = Canvas(figsize=(WIDTH, _height(panel)), layout="constrained")
    _draw(made.subplots(), panel, rows)
    return made


def whole(figure: Figure, rows: Rows) -> Any:
    """Return a matplotlib figure of all panels, with their titles and a legend."""
    from matplotlib.figure import Figure as Canvas

    across = min(3, len(figure.panels))
    down = math.ceil(len(figure.panels) / across)
    height = max(map(_height, figure.panels)) + 0.3
    size = (WIDTH * across, height * down + 0.6)
    made = Canvas(figsize=size, layout="constrained", facecolor="white")
    grid = made.subplots(down, across, squeeze=False).ravel()
    for axes, one in zip(grid, figure.panels, strict=False):
        _draw(axes, one, rows)
        axes.set_title(short(one.title, 40), loc="left")
    for axes in grid[len(figure.panels) :]:
        axes.set_axis_off()
    _legend(made, figure, rows)
    return made


def swatch(number: int | None) -> Any:
    """Return a matplotlib figure of a row's line and marker, for a legend; None stands for what is
    exact."""
    from matplotlib.figure import Figure as Canvas

    made = Canvas(figsize=(0.42, 0.16))
    colour, marker, dashes = Style(TEXT, "", EXACT) if number is None else style_of(number)
    axes = made.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0.03, 0.97], [0.5, 0.5], color=colour, ls=dashes, lw=1.6)
    axes.plot([0.5], [0.5], color=colour, marker=marker, ms=5)
    return made


def _height(panel: Panel) -> float:
    return max(1.3, 0.75 + ROW_HEIGHT * len(panel.names)) if panel.names else HEIGHT


def _draw(axes: Any, panel: Panel, rows: Rows) -> None:
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    for side in "xy":
        if side in panel.log and _positive(panel, side):
            getattr(axes, f"set_{side}scale")("log")
    if panel.zero:
        axes.axhline(0, color=DIM, lw=0.8)
    for series in panel.series:
        if series.lying:
            _mark(axes, series, rows)
        else:
            _line(axes, series, rows, panel)
    if panel.names:
        axes.set_yticks(range(len(panel.names)), [short(name) for name in panel.names])
        axes.set_ylim(-0.7, len(panel.names) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=TEXT)
    _ticks(axes, panel)


def _positive(panel: Panel, side: str) -> bool:
    """Return whether anything along an axis is positive: a logarithm needs that."""
    points = [at for series in panel.series for at in series.points]
    lying = any(series.lying for series in panel.series)
    values = [at.x if (side == "x") != lying else at.value for at in points]
    return max(values, default=0.0) > 0


def _ticks(axes: Any, panel: Panel) -> None:
    """Write tokens as "10k" and logarithms as plain numbers, at as few ticks as a narrow panel has
    room for."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    for side, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        elif side == "x":
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if panel.x.startswith("tokens"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _line(axes: Any, series: Series, rows: Rows, panel: Panel) -> None:
    """Draw a line with its band, or with a larger last mark. The elements of the file are called
    after the row."""
    points = with_gaps(series.points) if panel.gaps else series.points
    x, y = ([getattr(at, name) for at in points] for name in ("x", "value"))
    if series.row is None:
        axes.plot(x, y, color=TEXT, ls=EXACT, lw=1.4)
        return
    number = rows[series.row]
    colour, marker, dashes = style_of(number)
    (made,) = axes.plot(x, y, color=colour, ls=dashes, marker=marker, ms=4, lw=1.5)
    made.set_gid(f"row-{number}")
    if not panel.bands:
        axes.plot(x[-1:], y[-1:], color=colour, marker=marker, ms=8, gid=f"row-{number}-end")
        return
    low, high = (
        np.array([getattr(at, name) for at in points], dtype=float) for name in ("low", "high")
    )
    if np.isfinite(low).any():
        if axes.get_yscale() == "log":
            low = np.maximum(low, _least(y))
        between = axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
        between.set_gid(f"row-{number}-band")


def with_gaps(points: Sequence[At]) -> list[At]:
    """Return a point for each whole x, which has no number where none is known."""
    known = {at.x: at for at in points}
    first, last = int(min(known)), int(max(known))
    return [known.get(x, At(x, math.nan, None, None, 0)) for x in range(first, last + 1)]


def _least(values: Sequence[float]) -> float:
    """Return the least positive value: where a band goes on to zero, a logarithm ends it there."""
    return min((value for value in values if value > 0), default=1e-12)


def _mark(axes: Any, series: Series, rows: Rows) -> None:
    """Draw a mark with its bar in a list of rows."""
    number = rows.get(series.row or "", 0)
    colour, marker, _ = style_of(number)
    for at in series.points:
        bar = (
            None
            if at.low is None or at.high is None
            else [[at.value - at.low], [at.high - at.value]]
        )
        if bar is not None:
            axes.hlines(at.x, at.low, at.high, color=colour, lw=2.2, gid=f"row-{number}-bar")
        look = {"marker": marker, "ms": 6, "mfc": colour}
        if not series.arrived:
            look = {"marker": ">", "ms": 8, "mfc": "none"}
        (made,) = axes.plot([at.value], [at.x], color=colour, ls="", **look)
        made.set_gid(f"row-{number}")


def _legend(made: Any, figure: Figure, rows: Rows) -> None:
    """Name the rows below all panels, where the places do not."""
    from matplotlib.lines import Line2D

    if any(panel.names for panel in figure.panels):
        return
    lines = []
    for row in dict.fromkeys(series.row for panel in figure.panels for series in panel.series):
        look: dict[str, Any] = {"color": TEXT, "ls": EXACT, "label": "exact"}
        if row is not None:
            colour, marker, dashes = style_of(rows[row])
            look = {
                "color": colour,
                "marker": marker,
                "ms": 4,
                "ls": dashes,
                "label": short(row, 40),
            }
        lines.append(Line2D([], [], **look))
    columns = min(len(lines), 2 * min(3, len(figure.panels)))
    made.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)


def save(made: Any, path: Path, title: str) -> None:
    """Write a drawing as a file of the kind that its name says."""
    metadata = {"Title": plain(title)}
    if path.suffix == ".svg":
        metadata["Date"] = None  # type: ignore[assignment]
    made.savefig(path, dpi=160, metadata=metadata)
