"""`tokenenv report`: a page of what a bench has found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenenv.cli.console import counting, say
from tokenenv.cli.help import PATH


@dataclass(kw_only=True)
class Report:
    """Write one page of what `tokenenv bench` has found, to open in a browser: who leads and by how
    much, learning curves, regret, KL, credit, texts token by token, and the commands to run it
    again."""

    results: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RESULTS")]
    """A folder that `tokenenv bench` made, finished or not."""
    output: Annotated[Path | None, PATH] = None
    """The file to write; by default report.html in that folder. The figures are beside it, in a
    folder with its name, as SVG, PNG and CSV."""

    def run(self) -> None:
        """Write the page and say where it is."""
        # Imported here, because what it imports needs this package.
        from tokenenv.report import write_report

        with counting("drawing", "figures") as on_figure:
            path = write_report(self.results, self.output, on_figure)
        say(f"open {path} in a browser")
