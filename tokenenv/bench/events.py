"""What launchers tell: how far each cell is, and what it has found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tokenenv.bench.cells import Cell
from tokenenv.errors import TokenEnvError
from tokenenv.plugins import said

Kind = Literal["began", "learns", "finished", "failed"]


@dataclass(frozen=True, slots=True)
class Event:
    """What has happened to a cell."""

    cell: Cell
    kind: Kind
    value: Any = None
    """Of "learns" the tokens that have been seen, of "finished" the record, of "failed" the
    error."""


OnEvent = Callable[[Event], None]


def no_listener(event: Event) -> None:
    """Hear nothing."""


def played(cell: Cell, on_tokens: Callable[[int], None] | None = None) -> tuple[Kind, Any]:
    """Play a cell in this process, and return ("finished", its record) or ("failed", the error).

    `on_tokens` is called with the tokens that have been seen, after each update.
    """
    # Imported here: the process that waits for others needs no models.
    from tokenenv.bench.play import play

    def hear(seen: int, total: int) -> None:
        if on_tokens is not None:
            on_tokens(seen)

    try:
        return "finished", play(cell.settings, cell.points, cell.texts, hear)
    except BrokenPipeError:  # nobody listens any more
        raise
    except TokenEnvError as error:
        return "failed", str(error)
    # Whatever else one cell raises must not stop the others.
    except Exception as error:
        return "failed", said(error)
