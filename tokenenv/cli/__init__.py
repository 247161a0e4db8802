"""The `tokenenv` command: train, evaluate, show, envs, rewards, version."""

import argparse
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from tokenenv.agents import ALGORITHMS
from tokenenv.cli.console import say_error, say_on_stderr
from tokenenv.cli.envs import Envs
from tokenenv.cli.evaluate import Evaluate
from tokenenv.cli.numbers import NUMBERS
from tokenenv.cli.rewards import Rewards
from tokenenv.cli.show import Show
from tokenenv.cli.train import Train, load_config, save_config
from tokenenv.cli.version import Version
from tokenenv.errors import InvalidArgument, TokenEnvError

__all__ = ["Train", "load_config", "main", "save_config"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; an error of ours is one line, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack characters that texts have
    try:
        made = _train_default(args)
        # Empty dicts: for entries that a default has, flags would need other names.
        default = dataclasses.replace(
            made, options={}, agent=dataclasses.replace(made.agent, rollout_options={})
        )
        train: Any = train_type(default.algo)
        commands: Any = (
            Annotated[train, tyro.conf.subcommand("train", default=default)]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[Show, tyro.conf.subcommand("show")]
            | Annotated[Envs, tyro.conf.subcommand("envs")]
            | Annotated[Rewards, tyro.conf.subcommand("rewards")]
            | Annotated[Version, tyro.conf.subcommand("version")]
        )
        with NUMBERS:
            command: Any = tyro.cli(commands, args=args, prog="tokenenv", description=__doc__)
        if isinstance(command, Train):  # what the config's dicts hold and the flags do not
            command.options = made.options | command.options
            command.agent.rollout_options = (
                made.agent.rollout_options | command.agent.rollout_options
            )
        command.run()
    except (TokenEnvError, OSError) as error:
        say_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:  # where nothing is to be saved
        say_on_stderr("stopped by SIGINT")
        sys.exit(130)


def train_type(algo: str) -> Any:
    """`Train` with the settings of one algorithm, which tyro shows."""
    return Train[ALGORITHMS[algo].config_class]  # type: ignore[misc]


def said_in(flags: Mapping[str, Sequence[str]]) -> set[str]:
    """The dotted names of what flags say of what a file may not (`tokenenv.safety.trust`)."""
    names = {f"options.{key}" for key in flags["options"][::2]}
    names |= {f"agent.rollout_options.{key}" for key in flags["rollout_options"][::2]}
    return names | ({"agent.rollout"} if flags["rollout"] else set())


def _train_default(args: Sequence[str]) -> Train:
    """`--config PATH` and `--resume PATH` set the defaults that the other flags override; `--algo
    NAME` says which settings there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--algo")
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--agent.rollout", nargs="*", default=[], dest="rollout")
    parser.add_argument(
        "--agent.rollout-options",
        "--agent.rollout_options",
        nargs="*",
        default=[],
        dest="rollout_options",
    )
    given = parser.parse_known_args(args)[0]
    path = given.config if given.resume is None else given.resume / "config.yaml"
    made = Train() if path is None else load_config(path, said_in(vars(given)))
    if given.algo in (None, made.algo) or given.algo not in ALGORITHMS:
        return made
    if path is not None:
        raise InvalidArgument(f"--algo {given.algo} does not fit {path}, which is for {made.algo}.")
    return Train(algo=given.algo, agent=ALGORITHMS[given.algo].config_class())
