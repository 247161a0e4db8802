"""The page: what was found, figure by figure, in one file that needs nothing else."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from urllib.parse import quote

from tokenenv.report import tables, texts
from tokenenv.report.checklist import checklist
from tokenenv.report.drawing import panel, swatch
from tokenenv.report.figure import Figure, Panel
from tokenenv.report.inline import inline
from tokenenv.report.reading import Found
from tokenenv.report.style import variables
from tokenenv.report.words import html

MOST_LETTERS = 150_000
"""Of the panels of a figure on the page, which so stays below two megabytes. The files beside it
have all panels."""
HEAT_MAPS, CHECKLIST = "heat-maps", "checklist"


def page(found: Found, figures: Sequence[Figure], shown: Sequence[texts.Shown], folder: str) -> str:
    """Return the page's HTML.

    Args:
        found: what the bench has found.
        figures: those of which something is known.
        shown: texts for the heat maps.
        folder: where the files of the figures are, seen from the page.
    """
    rows = {row: number for number, row in enumerate(found.rows)}
    sections = {"leaderboard": ("Leaderboard", tables.leaderboards(found))} if found.summary else {}
    for one in figures:
        section = _figure(one, rows, folder)
        if one.name in sections:
            section += sections[one.name][1]
        sections[one.name] = (one.title, section)
    if shown:
        sections[HEAT_MAPS] = ("Texts, token by token", _heat_maps(shown, folder))
    if found.failed:
        sections["failures"] = ("Cells that failed", tables.failures(found))
    sections[CHECKLIST] = ("Reporting checklist", _checklist(found, folder))
    settings = tables.settings(found) + tables.warned(found)
    sections["settings"] = ("Settings", settings)
    if again := tables.commands(found):
        sections["commands"] = ("Run it again", again)
    sections["versions"] = ("Versions", tables.versions(found))
    return _filled(
        {
            "TITLE": html(found.grid.get("name") or found.folder.resolve().name),
            "ABOUT": html(found.grid.get("about") or ""),
            "COUNTS": html(f"{_counts(found)} {found.damage}"),
            "CONTENTS": "".join(
                f'<li><a href="#{name}">{html(title)}</a></li>'
                for name, (title, _) in sections.items()
            ),
            "SWATCHES": _swatches(len(rows)),
            "BODY": "\n".join(
                f'<section id="{name}"><h2>{html(title)}</h2>{body}</section>'
                for name, (title, body) in sections.items()
            ),
        }
    )


def _counts(found: Found) -> str:
    places = found.cells()
    cells = sum(line.get("cells") or 0 for line in found.summary if line["task"] in found.tasks)
    finished = sum(line["status"] == "finished" for line, _ in places)
    ended = f"{finished:,} of {max(cells, finished):,} runs have finished"
    failed = f", {len(found.failed):,} failed" if found.failed else ""
    what = f"{len(found.tasks)} environments, {len(found.rows)} rows"
    return f"{what}; {ended}{failed}."


def _figure(figure: Figure, rows: dict[str, int], folder: str) -> str:
    """Return a figure's words, legend, panels and files."""
    panels: list[str] = []
    for one in figure.panels:
        if sum(map(len, panels)) < MOST_LETTERS:
            panels.append(_panel(figure, one, rows))
    left = len(figure.panels) - len(panels)
    more = f"<p>More environments are in the files: {left}.</p>" if left else ""
    named = any(one.names for one in figure.panels)
    legend = "" if named else _legend(figure, rows)
    return (
        f"<p>{html(figure.says)}</p><p class='dim'>{html(figure.how)}</p>{legend}"
        f'<div class="panels">{"".join(panels)}</div>{more}{_files(figure.name, folder, _KINDS)}'
    )


def _panel(figure: Figure, one: Panel, rows: dict[str, int]) -> str:
    said = f"{figure.title}: {one.title}. The file {figure.name}.csv has its numbers."
    drawn = inline(panel(one, rows), said)
    return f"<figure><figcaption>{html(one.title)}</figcaption>{drawn}</figure>"


_KINDS = ("svg", "png", "csv")


def _legend(figure: Figure, rows: dict[str, int]) -> str:
    """Return the rows of a figure as buttons: one that is pressed is seen alone."""
    some = dict.fromkeys(series.row for panel in figure.panels for series in panel.series)
    keys = [
        f'<button type="button" aria-pressed="false" data-row="{rows[row]}">'
        f"{_key(rows[row])}{html(row)}</button>"
        for row in some
        if row is not None
    ]
    exact = f"<span>{_key(EXACT)}exact advantage</span>" if None in some else ""
    return f'<div class="legend" role="group" aria-label="rows">{"".join(keys)}{exact}</div>'


EXACT = "exact"


def _key(name: str | int) -> str:
    return f'<svg aria-hidden="true"><use href="#swatch-{name}"/></svg>'


def _swatches(count: int) -> str:
    """Return a symbol of each row's line and marker."""
    made = []
    for number in (*range(count), None):
        svg, name = inline(swatch(number), ""), EXACT if number is None else number
        inside, box = svg[svg.index(">") + 1 : svg.rindex("</svg>")], svg.partition('viewBox="')[2]
        made.append(
            f'<symbol id="swatch-{name}" viewBox="{box.partition(chr(34))[0]}">{inside}</symbol>'
        )
    return f'<svg class="swatches" aria-hidden="true">{"".join(made)}</svg>'


def _heat_maps(shown: Sequence[texts.Shown], folder: str) -> str:
    return (
        "<p>One text of the last update of each row, of its first seed. Under each token stand "
        "what it was paid without the KL, the advantage that was learnt from, and the exact "
        "advantage where it is known. Orange is above zero and blue below; the strongest colour "
        "is the largest number of its line.</p>"
        f"{texts.heat_maps(shown)}{_files(HEAT_MAPS, folder, ['csv'])}"
    )


def _checklist(found: Found, folder: str) -> str:
    names = ("item", "reported")
    body = [[line[name] for name in names] for line in checklist(found)]
    return (
        "<p>What the survey of Zhang 2026 (arXiv 2604.09459, table 11) asks every paper on credit "
        f"assignment to say.</p>{tables.table(names, body, 'checklist')}"
        f"{_files(CHECKLIST, folder, ['csv'])}"
    )


def _files(name: str, folder: str, kinds: Sequence[str]) -> str:
    links = [
        f'<a href="{html(quote(str(PurePosixPath(folder) / f"{name}.{kind}")))}">{kind.upper()}</a>'
        for kind in kinds
    ]
    return f'<p class="files">{" ".join(links)}</p>'


def _filled(parts: dict[str, str]) -> str:
    """Return the template with its parts. It is cut first, so that no part is looked into."""
    template = files("tokenenv.report").joinpath("report.html").read_text(encoding="utf-8")
    light, dark = (
        " ".join(f"--{name}: {pair[side]};" for name, pair in variables().items())
        for side in (0, 1)
    )
    parts = parts | {"LIGHT": light, "DARK": dark}
    pieces = template.split("__")
    return "".join(piece if at % 2 == 0 else parts[piece] for at, piece in enumerate(pieces))
