"""Put the tables of the results into docs/findings.md and its translations.

    .venv/bin/python -m benchmarks.suite.pages

A line `<!-- answers: kl -->` of a page stands before the table of that folder's answers, and
`<!-- survey -->` before that of the survey's methods. The table behind each is written anew; the
text around it is not touched, and has to be read again where figures have changed.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite.answers import SUITE, answers, markdown
from benchmarks.suite.survey import lines

DOCS = SUITE.parents[1] / "docs"
PAGES = DOCS / "findings.md", DOCS / "zh" / "findings.md"
TABLE = re.compile(r"^<!-- (answers: (?P<folder>\w+)|survey) -->\n\n(\|.*\n)*", re.M)


def written(page: Path) -> str:
    """Return the text of a page with the tables of the present results."""
    return TABLE.sub(_table, page.read_text(encoding="utf-8"))


def _table(found: re.Match[str]) -> str:
    rows: Sequence[Mapping[str, str]]
    rows = lines() if found["folder"] is None else list(answers(SUITE / found["folder"]))
    return found[0].splitlines()[0] + "\n\n" + "".join(f"{one}\n" for one in markdown(_short(rows)))


def _short(rows: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """Return the rows without a column that says the same environment in all of them."""
    if len({row.get("environment") for row in rows}) > 1:
        return rows
    return [{name: cell for name, cell in row.items() if name != "environment"} for row in rows]


def main() -> None:
    """Write the pages."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")


if __name__ == "__main__":
    main()
