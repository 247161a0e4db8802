"""`tokenenv version`."""

from dataclasses import dataclass

from tokenenv import __version__
from tokenenv.cli.console import console


@dataclass(kw_only=True)
class Version:
    """Print the version."""

    def run(self) -> None:
        """Prints the version."""
        console.print(__version__)
