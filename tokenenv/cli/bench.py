"""`tokenenv bench`: a grid of environments, reward designs, algorithms and seeds."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from tokenenv.cli.console import console, say, say_on_stderr
from tokenenv.cli.help import OPTIONS, PATH, shown_as
from tokenenv.cli.names import make_importable
from tokenenv.errors import InvalidArgument
from tokenenv.safety.values import typed

FOLDER = Path("runs") / "bench"
"""Where the folders of results are by default."""
NAMES = shown_as("[NAME ...]")


@dataclass(kw_only=True)
class Bench:
    """Run a grid of environments x reward designs x algorithms x seeds in parallel, and write what
    it finds as one table: gold, regret, KL, length, tokens.

    From a small file (docs/bench.md shows one), from a suite of the repository, or from flags:

    tokenenv bench my-grid.yaml

    tokenenv bench --suite quick

    tokenenv bench --env tokenenv/DelayedKey-v0 --reward terminal uniform oracle --seeds 5
    --total-tokens 50000

    The same command goes on with a bench that was stopped: cells that have finished are kept.
    """

    grid: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]", help_behavior_hint="")
    ] = None
    """A grid in YAML or TOML."""
    suite: Annotated[str | None, shown_as("NAME|FOLDER")] = None
    """In place of a file: a folder of benchmarks/suite, or any folder with a grid.yaml."""
    env: Annotated[list[str], NAMES] = field(default_factory=list)
    """Without a file: environments, as `tokenenv train --env` takes one."""
    reward: Annotated[list[str], NAMES] = field(default_factory=list)
    """Without a file: reward designs, as `tokenenv train --reward` takes one."""
    algo: Annotated[list[str], NAMES] = field(default_factory=list)
    """Without a file: algorithms, as `tokenenv train --algo` takes one."""
    seeds: Annotated[int | None, shown_as("INT")] = None
    """How many seeds a row has: 0, 1, ... By default the file's, else 3."""
    total_tokens: Annotated[int | None, shown_as("INT")] = None
    """Length of each run, in tokens; goes before the file's."""
    num_envs: Annotated[int | None, shown_as("INT")] = None
    """Texts side by side; goes before the file's."""
    options: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Options of every environment: --options kl_coef 0.1. They go before the file's."""
    agent: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Settings of every algorithm: --agent lr 1e-3. They go before the file's."""
    out: Annotated[Path | None, PATH] = None
    """The folder of the results; by default runs/bench/NAME with the grid's name."""
    workers: Annotated[int | None, shown_as("INT")] = None
    """Cells that are run at a time; by default one for each core."""
    launcher: Literal["local", "ray"] = "local"
    """"local": processes of this machine; "ray": tasks of a Ray cluster (pip install ray), that of
    RAY_ADDRESS or a new one here."""
    retry: bool = False
    """Try cells again that have failed."""
    modules: Annotated[list[str], shown_as("[MODULE ...]")] = field(default_factory=list)
    """Modules of yours that the file may name, as in my_rewards:brief."""

    def run(self) -> None:
        """Run what has not finished, and print what was found."""
        # Imported here, because what it imports needs this package.
        from tokenenv.bench import bench
        from tokenenv.bench.live import Progress
        from tokenenv.bench.shown import tables
        from tokenenv.bench.store import Store, unfinished

        make_importable()
        grid = self.read()
        folder, cells = self.out or FOLDER / grid.name, grid.cells()
        store = Store(folder)
        waiting = {cell.key for cell in unfinished(store, cells, retry=True)}
        done = [cell.key for cell in cells if cell.key not in waiting]
        progress = Progress(cells, done, Console(stderr=True))
        how: dict[str, Any] = {
            "workers": self.workers,
            "launcher": self.launcher,
            "retry": self.retry,
        }
        try:
            with progress.shown():
                results = bench(grid, folder, **how, on_event=progress)
        except KeyboardInterrupt:
            say_on_stderr("stopped by SIGINT; the cells that have finished are kept")
            say_on_stderr("the same command goes on")
            sys.exit(130)
        for table in tables(grid, results.summary, results.comparisons):
            console.print(table)
        for name, error in results.failed.items():
            say_on_stderr(f"failed: {name}: {error}")
        others = results.made_by_other_code
        if others:
            say_on_stderr(
                f"{others} of the cells were made by another state of tokenenv's code; another "
                f"--out runs them anew"
            )
        say(f"results: {folder}", *(path.name for path in results.written))
        if results.failed:
            say_on_stderr(f"{len(results.failed)} cells failed; --retry tries them again")
            sys.exit(1)

    def read(self) -> Any:
        """Return the grid of the file, or of the flags."""
        from tokenenv.bench.file import read_grid, suite_file
        from tokenenv.bench.grid import Grid

        tables = {"envs": self.env, "designs": self.reward, "algorithms": self.algo}
        always: dict[str, Any] = {
            name: {key: typed(value) for key, value in getattr(self, name).items()}
            for name in ("options", "agent")
            if getattr(self, name)
        }
        for name in ("total_tokens", "num_envs"):
            always |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        sources = [self.grid, self.suite, *filter(None, [self.env or self.reward or self.algo])]
        if len([one for one in sources if one]) > 1:
            raise InvalidArgument(
                "A grid comes from a FILE, from --suite, or from --env, --reward and --algo: give "
                "one of the three."
            )
        path = suite_file(self.suite) if self.suite is not None else self.grid
        if path is not None:
            return read_grid(path, self.modules, seeds=self.seeds, always=always or None)
        axes: dict[str, Any] = {
            name: {_short(word): word for word in words} for name, words in tables.items()
        }
        return Grid(**axes, always=always, seeds=3 if self.seeds is None else self.seeds)


def _short(word: str) -> str:
    """Return the label of what was typed: an id without its namespace."""
    return word.rpartition("/")[2] if "/" in word else word
