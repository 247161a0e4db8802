"""`tokenenv audit`: what optimising a reward does, before anyone trains on it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tokenenv.agents.config import check_seed
from tokenenv.audit import Audit as Found
from tokenenv.audit import audit
from tokenenv.audit.run import LEAST_TEXTS
from tokenenv.cli.console import console, counting, say
from tokenenv.cli.help import OPTIONS, shown_as
from tokenenv.cli.names import env_id_of
from tokenenv.cli.train import check_count, env_keywords
from tokenenv.errors import InvalidArgument


@dataclass(kw_only=True)
class Audit:
    """Say what optimising a reward does, from texts of the reference: gold along the KL, the best
    texts, policies that read nothing, the price of length, and what the reward keeps of the score.

    docs/audit.md explains each figure.
    """

    env: str = "tokenenv/Reviews-v0"
    """The environment's id; module:id imports the module first."""
    reward: Annotated[str | None, shown_as("NAME|MODULE:NAME")] = None
    """The reward, as `tokenenv train --reward` takes it; by default the task's own."""
    gold: Annotated[str | None, shown_as("MODULE:FUNCTION")] = None
    """What you really want of a text, for envs with the option gold."""
    options: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Options of the env: --options reward_model PATH kl_coef 0.1."""
    num_texts: int = 4096
    """Texts of the reference that are sampled."""
    seed: int = 0
    """Seed of the prompts and of the sampling."""
    out: Annotated[Path | None, shown_as("FOLDER")] = None
    """Where audit.md, audit.json and audit.png are written; by default nowhere."""

    def run(self) -> None:
        """Print the tables and the sentences, and write the folder."""
        check_seed(self.seed)
        check_count("num_texts", self.num_texts, LEAST_TEXTS)
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise InvalidArgument(f"out={str(self.out)!r} is a file; it must be a folder.")
        env_id = env_id_of(self.env)
        with counting("audit") as on_text:
            found = audit(
                env_id,
                num_texts=self.num_texts,
                seed=self.seed,
                on_text=on_text,
                **env_keywords(env_id, self.options, {"reward": self.reward, "gold": self.gold}),
            )
        show(found)
        if self.out is not None:
            found.save(self.out)
            say(f"written: {self.out / 'audit.md'}, audit.json, audit.png")


def show(found: Found) -> None:
    """Print the tables, and then the sentences, of which those that warn are marked."""
    for table in found.tables():
        console.print(table)
    say("")
    for verdict in found.verdicts:
        say(
            f"{'!' if verdict.warns else '-'} {verdict.sentence}",
            style="bold" if verdict.warns else None,
        )
