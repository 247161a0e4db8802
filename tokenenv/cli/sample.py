"""`tokenenv sample`: data for `tokenenv fit` from an environment."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from tokenenv.agents import AgentConfig
from tokenenv.cli.console import counting, say
from tokenenv.cli.help import OPTIONS, shown_as
from tokenenv.cli.train import GOLD, Train, check_count
from tokenenv.fit.data import DATA
from tokenenv.fit.sample import SampleConfig, add_values, draw
from tokenenv.fit.sample_folder import facts_of, write_folder
from tokenenv.models.saving import check_folder
from tokenenv.safety.shown import without_secrets

ENV = tyro.conf.arg(
    metavar="ID|MODULE:ID",
    help="What writes and scores: an id that `tokenenv envs` lists, or module:id, where importing "
    "your module registers the id.",
)


@dataclass(kw_only=True)
class Sample(SampleConfig):
    """Make data for `tokenenv fit` from an environment: texts of its reference, or of a policy,
    compared by its gold score or by its own score. docs/fit.md says what for."""

    env: Annotated[str, ENV] = "tokenenv/Reviews-v0"
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The folder to write: data.jsonl, the tokenizer, and a README.md that says what they are."""
    texts_per_prompt: Annotated[int | None, shown_as("INT")] = None
    beta: Annotated[float | None, shown_as("FLOAT")] = None
    policy: Annotated[str | None, shown_as("RUN_DIR|MODEL")] = None
    """What writes the texts: a run folder, or a language model's folder or hub id; by default the
    reference."""
    gold: Annotated[str | None, GOLD] = None
    num_envs: int = 64
    """Texts that are written side by side."""
    options: Annotated[dict[str, str], OPTIONS] = field(default_factory=dict)
    """Options of the env, as names and values: --options split test. `tokenenv envs ID` lists
    those of an id."""

    def run(self) -> None:
        """Sample, write the folder, and say what is in it."""
        check_count("num_envs", self.num_envs)
        check_folder(self.out)  # before anything is sampled
        config = SampleConfig(**{f.name: getattr(self, f.name) for f in fields(SampleConfig)})
        made = Train(
            env=self.env,
            gold=self.gold,
            num_envs=self.num_envs,
            options=self.options,
            algo="reference",
            agent=AgentConfig(),
        )
        envs = made.make_envs()
        with counting("sampled", "examples") as on_text:
            found = draw(envs, config, policy=self.policy, on_text=on_text)
        if self.kind == "values":
            with counting("values from", "continuations") as on_text:
                found.rows = add_values(envs, found.rows, config, on_text)
        write_folder(
            found,
            config,
            self.out,
            tokenizer=envs.token_spec.tokenizer,
            env=self.env,
            options=without_secrets(self.options),
            policy=self.policy or "the reference",
        )
        say(
            f"wrote {self.out / DATA}:",
            *(f"{name}: {value}" for name, value in facts_of(found, config).items()),
        )
