"""The `tokenenv` command: train, plan, evaluate, show, sample, fit, audit, bench, report, envs,
rewards and version."""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from tokenenv.agents.config import AgentConfig, check_called
from tokenenv.cli.audit import Audit
from tokenenv.cli.bench import Bench
from tokenenv.cli.console import say_error, say_on_stderr
from tokenenv.cli.envs import Envs
from tokenenv.cli.evaluate import Evaluate
from tokenenv.cli.fit import Fit
from tokenenv.cli.help import join_lines
from tokenenv.cli.names import algorithm_of
from tokenenv.cli.numbers import NUMBERS
from tokenenv.cli.plan import Plan
from tokenenv.cli.report import Report
from tokenenv.cli.rewards import Rewards
from tokenenv.cli.sample import Sample
from tokenenv.cli.show import Show
from tokenenv.cli.train import Train, load_config, save_config
from tokenenv.cli.version import Version
from tokenenv.errors import RankFailed, TokenEnvError
from tokenenv.safety.trust import NAMED

ABOUT = """Train language models token by token, in Gymnasium environments that pay every token, and
look at what they have learned.

To begin: tokenenv envs, then tokenenv train, then the commands that it prints. What each command
takes: tokenenv COMMAND --help."""
"""What `tokenenv` alone and `tokenenv --help` say first."""

__all__ = ["Train", "load_config", "main", "save_config"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. An error of ours is one line on stderr, without a traceback, and status 2."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack characters that texts have
    try:
        made = _train_default(args[1:] if args[0] in ("train", "plan") else [])
        # Entries that a default dict has would turn into flags of their own, so tyro is given
        # empty dicts, and the entries are added to what was typed afterwards.
        default = dataclasses.replace(
            made, options={}, agent=dataclasses.replace(made.agent, rollout_options={})
        )
        train: Any = Train[made.algorithm.config_class]  # type: ignore[name-defined]
        plan: Any = Plan[made.algorithm.config_class]  # type: ignore[name-defined]
        commands: Any = (
            Annotated[train, tyro.conf.subcommand("train", default=default)]
            | Annotated[plan, tyro.conf.subcommand("plan", default=Plan(**vars(default)))]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[Show, tyro.conf.subcommand("show")]
            | Annotated[Sample, tyro.conf.subcommand("sample")]
            | Annotated[Fit, tyro.conf.subcommand("fit")]
            | Annotated[Audit, tyro.conf.subcommand("audit")]
            | Annotated[Bench, tyro.conf.subcommand("bench")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Envs, tyro.conf.subcommand("envs")]
            | Annotated[Rewards, tyro.conf.subcommand("rewards")]
            | Annotated[Version, tyro.conf.subcommand("version")]
        )
        if {"-h", "--help"} & set(args):
            for shown in (
                Train,
                Plan,
                made.algorithm.config_class,
                Evaluate,
                Show,
                Sample,
                Fit,
                Audit,
                Bench,
                Report,
                Envs,
                Rewards,
            ):
                join_lines(shown)
        with NUMBERS:
            command: Any = tyro.cli(commands, args=args, prog="tokenenv", description=ABOUT)
        if isinstance(command, Train):
            command.options = made.options | command.options
            command.agent.rollout_options = (
                made.agent.rollout_options | command.agent.rollout_options
            )
        command.run()
    except BrokenPipeError:
        # The reader of the output, such as `head`, has seen enough. Python would complain again
        # when it flushes what is left at exit, so that goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RankFailed:  # the rank that failed says why
        sys.exit(2)
    except (TokenEnvError, OSError) as error:
        say_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:  # where nothing is to be saved
        say_on_stderr("stopped by SIGINT")
        sys.exit(130)


def said_in(flags: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the dotted names of what flags say of the entries that a file may not hold
    (`tokenenv.safety.trust`)."""
    names = {f"options.{key}" for key in flags["options"][::2]}
    names |= {f"agent.rollout_options.{key}" for key in flags["rollout_options"][::2]}
    return names | ({"agent.rollout"} if flags["rollout"] else set())


def _train_default(args: Sequence[str]) -> Train:
    """Return the values that the flags of `train` override.

    Three flags have to be read before tyro reads them all: `--config` and `--resume` name the file
    that holds the values, and `--algo` says which settings there are. The others are read here
    because a file may hold what they name only where the command line says it too.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    for name in NAMED:
        parser.add_argument(f"--{name}")
    parser.add_argument("--eval-prompts", "--eval_prompts")
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--agent.rollout", nargs="*", default=[], dest="rollout")
    parser.add_argument(
        "--agent.rollout-options",
        "--agent.rollout_options",
        nargs="*",
        default=[],
        dest="rollout_options",
    )
    given, others = parser.parse_known_args(args)
    path = given.config if given.resume is None else given.resume / "config.yaml"
    if path is not None:
        names = {name: getattr(given, name) for name in (*NAMED, "eval_prompts")}
        made = load_config(path, said_in(vars(given)), **names)
    else:
        algo = given.algo or Train.algo
        made = Train(algo=algo, agent=algorithm_of(algo).config_class())
    _check_settings(others, made.algorithm.config_class)
    return made


def _check_settings(flags: Sequence[str], kind: type[AgentConfig]) -> None:
    """Raise where a flag of the agent is what other libraries call one of its settings."""
    known = [field.name for field in dataclasses.fields(kind)]
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--agent.").replace("-", "_")
        if flag.startswith("--agent.") and name not in known:
            check_called(kind.__name__, name, known)
