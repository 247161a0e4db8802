"""The table of a bench that runs: what has ended, what learns, what failed."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenenv.bench.cells import Cell
from tokenenv.bench.events import Event
from tokenenv.safety.shown import visible

MOST_ROWS = 30
"""Lines of the live table; a larger grid shows those where something happens."""


class Progress:
    """Follows the events of a bench, as a table on a terminal and as lines elsewhere.

    Args:
        cells: all cells of the grid.
        done: the keys of those that had finished before.
        console: where it is shown.
    """

    def __init__(self, cells: Sequence[Cell], done: Sequence[str], console: Console) -> None:
        self.cells, self.console = cells, console
        self.state = {cell.key: "waits" for cell in cells} | dict.fromkeys(done, "finished")
        self.learns: dict[str, float] = {}
        self.gold: dict[str, float | None] = {}
        self.began, self.todo = time.monotonic(), Counter(self.state.values())["waits"]
        self.live: Live | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        key = event.cell.key
        if event.kind == "learns":
            total = event.cell.settings.get("total_tokens", 200_000)
            self.learns[key] = min(event.value / float(total), 1.0)
        else:
            self.state[key] = "learns" if event.kind == "began" else event.kind
        if event.kind == "finished":
            self.gold[key] = event.value["points"][-1]["gold"]
        if self.live is not None:
            self.live.update(self.table())
        elif event.kind in ("finished", "failed"):
            self._line(event)

    @contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Keep the table on a terminal's screen, and leave it there at the end."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(self.table(), console=self.console, refresh_per_second=2) as self.live:
            yield self
            self.live.update(self.table())
        self.live = None

    def table(self) -> Table:
        """Return a table with a line for each environment and row."""
        made = Table("environment", "row", "cells", "gold at the end", title=self._title())
        groups: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells:
            groups.setdefault((cell.task, cell.row), []).append(cell.key)
        shown = list(groups.items())
        if len(shown) > MOST_ROWS:
            shown = [one for one in shown if {self.state[key] for key in one[1]} & {"learns"}]
        for (task, row), keys in shown[:MOST_ROWS]:
            known = [gold for key in keys if (gold := self.gold.get(key)) is not None]
            mean = f"{sum(known) / len(known):.3f}" if known else ""
            made.add_row(visible(task), visible(row), self._bar(keys), mean)
        return made

    def _bar(self, keys: Sequence[str]) -> Text:
        """Return a mark for each cell: how far it is."""
        text = Text()
        for key in keys:
            state = self.state[key]
            if state == "learns":
                text.append(f" {self.learns.get(key, 0.0):.0%}", style="yellow")
            else:
                mark, style = {
                    "waits": ("·", "dim"),
                    "finished": ("✓", "green"),
                    "failed": ("✗", "red"),
                }[state]
                text.append(f" {mark}", style=style)
        return text

    def _title(self) -> str:
        counts, total = Counter(self.state.values()), len(self.state)
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        return f"{counts['finished']} of {total} cells{failed}{self._left()}"

    def _left(self) -> str:
        """Say how long the rest will take, as the cells that were run now have taken."""
        counts = Counter(self.state.values())
        left = (
            counts["waits"]
            + counts["learns"]
            - sum(share for key, share in self.learns.items() if self.state[key] == "learns")
        )
        ran = self.todo - left
        if left <= 0 or ran <= 0.2:
            return ""
        seconds = (time.monotonic() - self.began) * left / ran
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"

    def _line(self, event: Event) -> None:
        figure = "failed"
        if event.kind == "finished":
            gold = self.gold[event.cell.key]
            figure = "finished" if gold is None else f"gold {gold:.3f}"
        line = visible(f"{self._title()} | {event.cell.name}: {figure}")
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
