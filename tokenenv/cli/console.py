"""Where the commands print.

Texts, names of files and errors may come from strangers. They are printed as they are: rich takes
nothing in them for its markup, and no character steers the terminal.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tokenenv import ranks
from tokenenv.safety.shown import visible

console = Console()
QUICK = 2.0
"""Seconds after which a command shows how far it is."""


def say(*lines: str, style: str | None = None, end: str = "\n") -> None:
    """Print plain lines, all but the first one indented; of processes that learn together the
    first prints."""
    if ranks.number() > 0:
        return
    text = visible("\n  ".join(lines))
    console.print(
        text, style=style, end=end, markup=False, highlight=False, emoji=False, soft_wrap=True
    )


def say_text(text: str) -> None:
    """Print a text of several lines, and an empty line after it."""
    for line in [*text.split("\n"), ""]:
        say(line)


def say_error(message: str) -> None:
    """Print an error on one line of stderr."""
    Console(stderr=True).print("error: ", style="red", end="")
    say_on_stderr(message)


def say_on_stderr(message: str) -> None:
    """Print one line on stderr; of processes that learn together the first prints."""
    if ranks.number() > 0:
        return
    text = visible(" ".join(message.split()))
    Console(stderr=True).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def counting(label: str, what: str = "texts") -> Iterator[Callable[[int, int], None]]:
    """Yield what `evaluate(on_text=...)` calls, which shows the texts that have been written, or
    `what` else: as a bar on a terminal, and elsewhere as a line every ten seconds. What is quick
    shows nothing."""
    errors = Console(stderr=True)
    columns = BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn()
    bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    task = bar.add_task("", total=None)
    next_line = began = time.monotonic()
    next_line += QUICK

    def on_text(written: int, asked: int) -> None:
        nonlocal next_line
        line, now = f"{label}: {written:,} of {asked:,} {what}", time.monotonic()
        bar.update(task, completed=written, total=asked, description=line)
        if now - began >= QUICK:
            bar.start()
        if now >= next_line and not errors.is_terminal:
            say_on_stderr(line)
            next_line = now + 10.0

    try:
        yield on_text
    finally:
        bar.stop()
