"""`tokenenv show`: a page of a run's episodes."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from tokenenv.agents.run.show import write_page
from tokenenv.cli.console import say


@dataclass(kw_only=True)
class Show:
    """Write one page of a run's episodes, to open in a browser: every token coloured by reward, KL,
    value or advantage."""

    run_dir: tyro.conf.Positional[Path]
    """A run folder that `tokenenv train` made, finished or not."""
    output: Path | None = None
    """Where the page goes; by default episodes.html in the run folder."""
    max_episodes: int = 200
    """Episodes on the page, evenly over the run."""

    def run(self) -> None:
        """Writes the page and says where it is."""
        path = write_page(self.run_dir, self.output, self.max_episodes)
        say(f"open {path} in a browser")
