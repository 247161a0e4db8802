"""`tokenenv fit`: a token-level reward model out of preferences, scores, labels or texts."""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from tokenenv import ranks
from tokenenv.agents.run.run_config import CONFIG
from tokenenv.cli.config_file import read_values
from tokenenv.cli.console import say, say_on_stderr
from tokenenv.cli.help import shown_as
from tokenenv.cli.signals import stopping
from tokenenv.errors import InvalidArgument
from tokenenv.fit import FitConfig, Fitted, fit
from tokenenv.fit.card import OPTION
from tokenenv.fit.checkpoint import CARD, check_folder
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.safety.trust import check_from_file, repeated
from tokenenv.safety.values import fit as as_type

SHOWN = (
    "loss",
    "accuracy",
    "calibration_error",
    "score_correlation",
    "reward_per_token",
    "seconds",
)
"""Measures that the command prints; the card has all of them."""
OBJECTIVE = tyro.conf.arg(
    metavar="NAME",
    help="What is learned, and in brackets the data that it takes:\n"
    + "\n".join(f"{name} ({one.kind}): {one.summary}." for name, one in OBJECTIVES.items()),
)


@dataclass(kw_only=True)
class Fit(FitConfig):
    """Train a token-level reward model from pairs, rankings, scores, labels or texts, and save it
    with a card. Environments load it by its path. From nothing to a trained policy:

    tokenenv sample --env tokenenv/Negation-v0 --kind ranking --num-examples 1024 --out pairs

    tokenenv fit --data pairs --objective bt-sum --out runs/rm

    tokenenv train --env tokenenv/Negation-v0 --reward token --options reward_model runs/rm

    From your own preferences, on a model of your own:

    tokenenv fit --data pairs.jsonl --model path/to/model --lora-rank 16 --out runs/rm

    On with a run that was stopped:

    tokenenv fit --resume --out runs/rm

    docs/fit.md says which columns the data has, and which objective is for what.
    """

    data: Annotated[str | None, shown_as("FILE|FOLDER")] = None
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    objective: Annotated[str, OBJECTIVE] = "bt-sum"
    model: Annotated[str, tyro.conf.arg(metavar="PATH|ID|new")] = "new"
    tokenizer: Annotated[str | None, shown_as("PATH|ID")] = None
    held_out: Annotated[str, tyro.conf.arg(metavar="SHARE|FILE")] = "0.1"
    reference: Annotated[str | None, shown_as("PATH|ID")] = None
    teacher: Annotated[str | None, shown_as("PATH|ID")] = None

    def __post_init__(self) -> None:
        """Check nothing yet: what is wrong is said in one line, by `config`."""

    def run(self) -> None:
        """Train, and say what the model is worth and how it is used."""
        config, stop = self.config(), Stop()
        with ranks.joined(), stopping(stop.request) as own:
            try:
                fitted = fit(config, progress=True, stop=stop)
            except KeyboardInterrupt:
                # Once steps are taken, all processes stop after the same one.
                received = (
                    [one for part in ranks.gathered(own) for one in part] if stop.asked else own
                )
                saved = f"; saved; go on with: {self.again()}" if stop.asked else ""
                say_on_stderr(f"stopped by {received[0].name}{saved}")
                sys.exit(128 + received[0])
            show(fitted, config)

    def config(self) -> FitConfig:
        """Return the settings: those that were typed and, of a run that goes on, its own."""
        values = {field.name: getattr(self, field.name) for field in fields(FitConfig)}
        if self.resume:
            check_folder(self.out, resume=True)
            values |= self._of_the_run()
        if values["data"] is None:
            raise InvalidArgument("--data is missing: the file or the folder of the examples.")
        # A share is a number, and everything else is the name of a file.
        values["held_out"] = as_type("held_out", values["held_out"], float | str)
        return FitConfig(**values)

    def _of_the_run(self) -> dict[str, Any]:
        """Return the settings that the run in `out` was begun with, and those that were typed,
        which are compared with its checkpoint later."""
        path, typed = self.out / CONFIG, self._typed()
        known = {field.name for field in fields(FitConfig)} - {"out", "resume"}
        saved = {name: value for name, value in read_values(path).items() if name in known}
        check_from_file(saved, path, typed)
        return saved | typed

    def _typed(self) -> dict[str, Any]:
        """Return the settings that are not the defaults."""
        given = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in given if value != field.default}

    def again(self) -> str:
        """Return the command that goes on with this run. It repeats what a file cannot ask for."""
        command = f"tokenenv fit --resume --out {shlex.quote(str(self.out))}"
        return f"{command} {repeated(self._typed())}".strip()


class Stop:
    """Whether a run was asked to stop. Once it takes steps it ends the one that it is at; before
    that there is nothing to save, and it ends at once."""

    def __init__(self) -> None:
        self.asked, self._wanted = False, False

    def __call__(self) -> bool:
        """Return whether to stop after this step."""
        self.asked = True
        return self._wanted

    def request(self) -> None:
        """Take the first signal."""
        self._wanted = True
        if not self.asked:
            raise KeyboardInterrupt


def show(fitted: Fitted, config: FitConfig) -> None:
    """Print the figures, what to know, and how the model is used."""
    objective, measures = OBJECTIVES[config.objective], fitted.measures
    known = {name: measures[name] for name in SHOWN if name in measures}
    if known:
        figures = [f"{name} {value:.4g}" for name, value in known.items()]
        say(f"held-out, epoch {measures['epoch']:.0f} of {measures['epochs']:.0f}:", *figures)
    for note in fitted.notes:
        say(f"note: {note}")
    option = OPTION[objective.readout]
    uses = (
        f"tokenenv train --env ENV --reward {objective.design} --options {option} {fitted.folder}",
        f"tokenenv audit --env ENV --reward {objective.design} --options {option} {fitted.folder}",
        f"tensorboard --logdir {fitted.folder}",
    )
    say(f"reward model: {fitted.folder}; its card: {fitted.folder / CARD}; use it:", *uses)
