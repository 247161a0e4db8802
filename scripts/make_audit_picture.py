"""Makes docs/audit.png again, and prints what docs/audit.md quotes: the audit of a token reward with
a positive mean on Reviews-v0, and of the bundled one."""

from pathlib import Path

import torch
from rich.console import Console

from tokenenv.audit import audit
from tokenenv.rewards import RewardTerm
from tokenenv.rewards.seen import Transitions

FILE = Path(__file__).parents[1] / "docs" / "audit.png"


class Talk(RewardTerm):
    """Pays 1 for each token."""

    name = "talk"

    def reward(self, batch: Transitions) -> torch.Tensor:
        """(K,): ones."""
        return torch.ones_like(batch.tokens, dtype=torch.float32)


def main() -> None:
    """Audits both, and draws the first."""
    torch.set_num_threads(1)
    for reward in ({"score": "token", "talk": (Talk(), 0.1)}, "token"):
        found = audit("tokenenv/Reviews-v0", reward=reward)
        for table in found.tables():
            Console(width=150).print(table)
        print(*(verdict.sentence for verdict in found.verdicts), sep="\n")
        if reward != "token":
            found.picture().savefig(FILE, dpi=120)


if __name__ == "__main__":
    main()
