"""Where the commands print.

Texts, names of files and errors may come from strangers. They are printed as they are: rich takes
nothing in them for its markup, and no character steers the terminal.
"""

from rich.console import Console

from tokenenv.safety.shown import visible

console = Console()


def say(*lines: str, style: str | None = None, end: str = "\n") -> None:
    """Print plain lines, all but the first one indented."""
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
    """Print one line on stderr."""
    text = visible(" ".join(message.split()))
    Console(stderr=True).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
