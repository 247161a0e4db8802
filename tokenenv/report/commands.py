"""The commands that run a bench, or one of its cells, again."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tokenenv.bench.file import modules_named
from tokenenv.bench.store import GRID
from tokenenv.report.reading import Found


def whole_command(found: Found) -> str:
    """Return what runs the whole grid again, into another folder."""
    grid = shlex.quote(str(found.folder / GRID))
    return (
        f"tokenenv bench {grid} --out {shlex.quote(f'{found.folder}-again')}{_modules(found.grid)}"
    )


def cell_command(key: str, asked: Mapping[str, Any]) -> str:
    """Return what runs a cell again: a grid of this cell alone is written, and run. Its file of
    results has the same key.

    Args:
        key: of the cell.
        asked: its `settings`, `points` and `texts`, as its file has them.
    """
    settings = asked["settings"]
    agent = dict(settings.get("agent", {}))
    about = {"seeds": [agent.pop("seed", 0)], "points": asked["points"], "texts": asked["texts"]}
    grid = {**about, **settings, "agent": agent}
    name = f"cell-{key}"
    written = f"printf %s {shlex.quote(json.dumps(grid))} > {name}.yaml"
    return f"{written} && tokenenv bench {name}.yaml --out runs/bench/{name}{_modules(settings)}"


def is_asked(asked: Any) -> bool:
    """Return whether a cell's file says what was asked for."""
    return (
        isinstance(asked, dict)
        and {"settings", "points", "texts"} <= set(asked)
        and isinstance(asked["settings"], dict)
        and isinstance(asked["settings"].get("agent", {}), dict)
    )


def _modules(values: Any) -> str:
    """Return the flag that a file needs which names modules."""
    named = sorted(set(_named("", values)))
    return f" --modules {shlex.join(named)}" if named else ""


def _named(name: str, values: Any) -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _named(str(key), value)
    elif isinstance(values, list | str):
        yield from modules_named(name, values)
