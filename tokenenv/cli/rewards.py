"""`tokenenv rewards`: the reward designs."""

from dataclasses import dataclass

from rich.table import Table

from tokenenv.cli.console import console
from tokenenv.rewards.designs import DESIGNS, make_terms


@dataclass(kw_only=True)
class Rewards:
    """List the reward designs: when they pay, what they need, what they preserve (docs/rewards.md
    explains each)."""

    def run(self) -> None:
        """Prints the table."""
        table = Table("name", "kind", "needs", "keeps return", "keeps gradient")
        for name in DESIGNS:
            terms = list(make_terms(name).values())
            needs = sorted({need for term in terms for need in term.needs})
            kept = (
                all(term.preserves_return for term in terms),
                all(term.preserves_gradient for term in terms),
            )
            answers = ("yes" if each else "no" for each in kept)
            table.add_row(name, terms[-1].kind, ", ".join(needs), *answers)
        console.print(table)
        console.print(
            "A function of your own is a reward too: reward=f, with f(prompt, response) a number; "
            "Rule(f, delta=True) pays it token by token (docs/your-reward.md)."
        )
