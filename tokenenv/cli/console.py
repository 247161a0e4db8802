"""Where the commands print. What comes from texts, files and errors is printed as it is, not as
markup, and steers nothing."""

from rich.console import Console

from tokenenv.safety.shown import visible

console = Console()


def say(*lines: str, style: str | None = None, end: str = "\n") -> None:
    """Prints plain lines, the further ones indented."""
    text = visible("\n  ".join(lines))
    console.print(
        text, style=style, end=end, markup=False, highlight=False, emoji=False, soft_wrap=True
    )


def say_text(text: str) -> None:
    """Print a text of several lines, and an empty line after it."""
    for line in [*text.split("\n"), ""]:
        say(line)


def say_error(message: str) -> None:
    """Prints an error on one line of stderr."""
    Console(stderr=True).print("error: ", style="red", end="")
    say_on_stderr(message)


def say_on_stderr(message: str) -> None:
    """Prints one line of stderr."""
    text = visible(" ".join(message.split()))
    Console(stderr=True).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
