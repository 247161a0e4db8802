"""What a check found: a sentence, a table for people, and plain values for programs."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenenv.conformance.gradients import Comparison


@dataclass(frozen=True)
class Report:
    """The outcome of one check of one function."""

    name: str
    kind: str
    """ "advantages", "returns" or "loss"."""
    rows: list[tuple[Comparison, str]]
    """Each world's comparison, and its outcome in a word or three."""
    verdict: str
    """The sentence: which assumption breaks the function, and what then happens."""

    @property
    def exact(self) -> bool:
        """Whether the function is exact wherever it can be."""
        return all(outcome != "off" for _, outcome in self.rows)

    @property
    def off(self) -> list[str]:
        """The worlds in which it is off."""
        return [one.world for one, outcome in self.rows if outcome == "off"]

    def table(self) -> Table:
        """Return the figures of all worlds."""
        table = Table(title=f"{self.name}: {self.verdict}", title_justify="left")
        for heading in ("world", "cosine", "error", "scale", "by own token", ""):
            table.add_column(heading)
        for one, outcome in self.rows:
            positions = " ".join(f"{share:.2f}" for share in one.positions)
            figures = f"{one.cosine:.4f}", f"{one.error:.1e}", f"{one.scale:.3g}"
            table.add_row(one.world, *figures, positions, outcome)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        worlds = [one.to_dict() | {"outcome": outcome} for one, outcome in self.rows]
        head = {"name": self.name, "kind": self.kind, "exact": self.exact}
        return head | {"verdict": self.verdict, "worlds": worlds}

    def __str__(self) -> str:
        return shown(self.table())


def shown(table: Table) -> str:
    """Return a table as plain text of 100 columns."""
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
