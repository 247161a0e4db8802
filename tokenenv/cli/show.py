"""`tokenenv show`: a page of a run's episodes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenenv.agents.run.show import write_page
from tokenenv.cli.console import say
from tokenenv.cli.help import PATH


@dataclass(kw_only=True)
class Show:
    """Write one page of a run's episodes, to open in a browser: every token coloured by reward, KL,
    value or advantage."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """A run folder that `tokenenv train` made, finished or not."""
    output: Annotated[Path | None, PATH] = None
    """The file to write; by default episodes.html in the run folder."""
    max_episodes: int = 200
    """Episodes on the page at most, taken evenly from the run."""

    def run(self) -> None:
        """Write the page and say where it is."""
        path = write_page(self.run_dir, self.output, self.max_episodes)
        say(f"open {path} in a browser")
