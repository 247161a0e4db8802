"""The folder of a grid's results: one file for each cell that has ended.

FOLDER/grid.yaml            the grid, runnable again
FOLDER/cells/KEY.json       a finished cell
FOLDER/cells/KEY.failed     a failed one, JSON too
FOLDER/results.csv ...      tables, written anew from the files of the cells
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenenv.agents.run.files import replace_file
from tokenenv.bench.cells import Cell
from tokenenv.bench.grid import Grid
from tokenenv.errors import InvalidArgument
from tokenenv.safety.shown import without_secrets
from tokenenv.safety.values import to_yaml

GRID, CELLS = "grid.yaml", "cells"
FAILED = "failed"


class Store:
    """Reads and writes the files of cells.

    Args:
        folder: is made where there is none.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise InvalidArgument(f"out={str(folder)!r} is a file; it must be a folder.")
        self.folder = folder

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """Return the record of a finished cell; None where it has not finished."""
        return self._read(self._path(cell, "json"))

    def failure(self, cell: Cell) -> str | None:
        """Return why a cell failed when it was last tried; None where it did not."""
        record = self._read(self._path(cell, FAILED))
        return None if record is None else str(record["error"])

    def finish(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Keep the record of a cell. The file appears whole or not at all."""
        self._write(self._path(cell, "json"), {"asked": self._asked(cell), **record})
        self._path(cell, FAILED).unlink(missing_ok=True)

    def fail(self, cell: Cell, error: str) -> None:
        """Keep why a cell failed."""
        self._write(self._path(cell, FAILED), {"asked": self._asked(cell), "error": error})

    def save_grid(self, grid: Grid) -> None:
        """Write the grid's own file."""
        text = to_yaml(json.loads(json.dumps(without_secrets(grid.as_values()), default=str)))
        replace_file(self.folder / GRID, lambda path: path.write_text(text, encoding="utf-8"))

    def _path(self, cell: Cell, kind: str) -> Path:
        return self.folder / CELLS / f"{cell.key}.{kind}"

    def _asked(self, cell: Cell) -> dict[str, Any]:
        """Return what was asked for, which the key is a hash of."""
        return {"settings": cell.settings, "points": cell.points, "texts": cell.texts}

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"{path} cannot be read ({error}); remove it, and its cell is run again."
            ) from error

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        text = json.dumps(without_secrets(record), indent=1, default=str)
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def unfinished(store: Store, cells: Sequence[Cell], retry: bool) -> list[Cell]:
    """Return the cells that have to be run, each key once; failed ones only to `retry` them."""
    by_key = {cell.key: cell for cell in reversed(cells)}
    first = [cell for cell in cells if by_key[cell.key] is cell]
    return [
        cell
        for cell in first
        if store.finished(cell) is None and (retry or store.failure(cell) is None)
    ]
