"""Running a grid: what has not finished is run, and the tables are written from all that has."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenenv.agents.run.files import locked
from tokenenv.bench.cells import Cell
from tokenenv.bench.events import Event, OnEvent, no_listener
from tokenenv.bench.grid import Grid
from tokenenv.bench.on_ray import run_on_ray
from tokenenv.bench.processes import run_in_processes
from tokenenv.bench.store import Store, unfinished
from tokenenv.bench.summary import compare, summarise
from tokenenv.bench.table import Line, tidy, write_table
from tokenenv.bench.versions import code
from tokenenv.errors import InvalidArgument, check_choice

LAUNCHERS = {"local": run_in_processes, "ray": run_on_ray}


@dataclass(frozen=True)
class Results:
    """What a grid has found so far."""

    grid: Grid
    folder: Path
    lines: list[Line]
    """The tidy table, one mapping a line; docs/bench.md names the columns."""
    summary: list[Line]
    """A line for each environment and row: figures over seeds, with intervals."""
    comparisons: list[Line]
    """A line for each environment and ordered pair of rows: the probability of improvement."""
    written: list[Path]
    """The tables' files."""

    @property
    def failed(self) -> dict[str, str]:
        """The errors of the cells that failed, by the cells' names."""
        return {
            f"{line['task']} / {line['row']} / seed {line['seed']}": line["error"]
            for line in self.lines
            if line["status"] == "failed"
        }

    @property
    def made_by_other_code(self) -> int:
        """How many finished cells another state of tokenenv's sources has made."""
        made = {line["cell"]: line["code"] for line in self.lines if line["status"] == "finished"}
        return sum(one != code() for one in made.values())


def bench(
    grid: Grid | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    launcher: str = "local",
    retry: bool = False,
    on_event: OnEvent = no_listener,
) -> Results:
    """Run the cells of a grid that have not finished, and write its tables into a folder.

    Cells are run in processes of their own, so a script that calls this needs the guard `if
    __name__ == "__main__":`. A finished cell is one file and is never run again; a bench that was
    killed goes on. A cell that raises is recorded as failed and stops no other.

    Args:
        grid: a `Grid`, or what one is made of: `Grid(**grid)`.
        out: the folder of the results; is made where there is none.
        workers: how many cells are run at a time, by default one for each core.
        launcher: "local", or "ray": the cells are tasks of a Ray cluster.
        retry: whether cells that have failed are tried again.
        on_event: is called in this process with each `Event`.

    Raises:
        InvalidArgument: an argument is not allowed.
        RunFolderError: another process writes into the folder.
    """
    made = grid if isinstance(grid, Grid) else Grid(**grid)
    check_choice("launcher", launcher, LAUNCHERS)
    if workers is not None and workers < 1:
        raise InvalidArgument(f"workers={workers} must be a whole number, 1 or more.")
    store, cells = Store(Path(out)), made.cells()
    with locked(store.folder):
        store.save_grid(made)
        waiting = unfinished(store, cells, retry)
        try:
            if waiting:
                LAUNCHERS[launcher](waiting, workers or _cores(), _keeping(store, on_event))
        finally:
            results = write_results(made, store, cells)
    return results


def write_results(grid: Grid, store: Store, cells: list[Cell]) -> Results:
    """Write the tables of all cells that have ended, and return them."""
    lines = tidy(cells, store)
    summary, comparisons = summarise(grid, lines), compare(grid, lines)
    tables = {"results": lines, "summary": summary, "comparisons": comparisons}
    written = [
        path for name, table in tables.items() for path in write_table(store.folder / name, table)
    ]
    return Results(grid, store.folder, lines, summary, comparisons, written)


def _keeping(store: Store, on_event: OnEvent) -> OnEvent:
    """Return a listener that keeps what cells have found before it passes the event on."""

    def hear(event: Event) -> None:
        if event.kind == "finished":
            store.finish(event.cell, event.value)
        elif event.kind == "failed":
            store.fail(event.cell, event.value)
        on_event(event)

    return hear


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
