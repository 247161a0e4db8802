"""Writing the page, and the files of its figures beside it."""

import os
from collections.abc import Callable
from pathlib import Path

from tokenenv.agents.run.files import replace_file
from tokenenv.bench.table import as_csv, unified
from tokenenv.report import texts
from tokenenv.report.checklist import checklist
from tokenenv.report.drawing import drawn, save, whole
from tokenenv.report.figure import Figure, Line
from tokenenv.report.figures import make_figures
from tokenenv.report.page import CHECKLIST, HEAT_MAPS, page
from tokenenv.report.reading import read
from tokenenv.safety.trust import refuse_link

PAGE = "report.html"


OnFigure = Callable[[int, int], None]
"""Is called with the number of figures that are written, and with those that there are."""


def no_listener(written: int, asked: int) -> None:
    """Hear nothing."""


def write_report(
    results: str | os.PathLike[str], output: Path | None = None, on_figure: OnFigure = no_listener
) -> Path:
    """Write one page of what a bench has found, and return where it is.

    Every figure is also an SVG, a PNG and a CSV file, in a folder beside the page that is called as
    it is: `report/learning-curves.png` beside `report.html`. The folder of the bench is data,
    whoever made it: nothing in it runs, and what it says is text on the page.

    Args:
        results: the folder of a bench, finished or not.
        output: the page; by default `report.html` in that folder.
        on_figure: is called after each figure.

    Raises:
        InvalidArgument: the folder holds no table of results.
        RunFolderError: a file that would be written is a link.
    """
    found = read(Path(results))
    path = output or found.folder / PAGE
    folder = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-figures")
    for one in (path, folder):
        refuse_link(one)
    folder.mkdir(parents=True, exist_ok=True)
    figures, shown = make_figures(found), texts.chosen(found)
    rows = {row: number for number, row in enumerate(found.rows)}
    with drawn():
        for number, figure in enumerate(figures):
            _write_figure(figure, folder, rows)
            on_figure(number + 1, len(figures))
        if shown:
            _write_csv(folder / f"{HEAT_MAPS}.csv", texts.lines(shown))
        _write_csv(folder / f"{CHECKLIST}.csv", checklist(found))
        text = page(found, figures, shown, folder.name)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _write_figure(figure: Figure, folder: Path, rows: dict[str, int]) -> None:
    _write_csv(folder / f"{figure.name}.csv", list(figure.table))
    made = whole(figure, rows)
    for kind in ("svg", "png"):
        path = folder / f"{figure.name}.{kind}"
        refuse_link(path)
        save(made, path, figure.title)


def _write_csv(path: Path, lines: list[Line]) -> None:
    refuse_link(path)
    text = as_csv(unified(lines))
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
