"""A drawing as a part of the page: SVG whose colours are variables of the page's style."""

import io
import re
import xml.etree.ElementTree as tree
from typing import Any

from tokenenv.report.style import variables
from tokenenv.report.words import html

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FONT = re.compile(r"font: ([\d.]+px)[^;]*")
_REFERENCE = re.compile(r"#([-\w]+)")
_COLOURS = {light: f"var(--{name})" for name, (light, _) in variables().items()}
_COLOUR = re.compile("|".join(_COLOURS))
_ROW = re.compile(r"row-\d+")


def inline(made: Any, said: str) -> str:
    """Return a matplotlib figure as an <svg> element.

    What belongs to a row has the class "row-NUMBER". Numbers are rounded to a tenth of a point.

    Args:
        made: the figure.
        said: what those hear who do not see it.
    """
    text = io.BytesIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    made.savefig(text, format="svg", metadata=none)
    root = tree.fromstring(text.getvalue())
    for child in [one for one in root if one.tag == f"{{{SVG}}}metadata"]:
        root.remove(child)
    for element in root.iter():
        _restyle(element)
    used = set(_REFERENCE.findall(" ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        if "id" in element.attrib and element.attrib["id"] not in used:
            del element.attrib["id"]
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    tree.register_namespace("", SVG)
    tree.register_namespace("xlink", LINK)
    found = tree.tostring(root, encoding="unicode", short_empty_elements=True)
    return found.replace("<svg ", f'<svg role="img" aria-label="{html(said)}" ', 1)


def _restyle(element: tree.Element) -> None:
    """Give an element the page's colours and letters, and a class in place of a row's id."""
    row = _ROW.match(element.attrib.get("id", ""))
    if row:
        element.attrib["class"] = row[0]
    for name, value in element.attrib.items():
        if name == "style":
            value = _COLOUR.sub(
                lambda found: _COLOURS[found[0]],
                _FONT.sub(r"font: \1 system-ui, sans-serif", value),
            )
        if name in ("d", "style", "transform", "x", "y", "points"):
            value = _NUMBER.sub(lambda found: f"{float(found[0]):.1f}", value)
        element.attrib[name] = " ".join(value.split())
