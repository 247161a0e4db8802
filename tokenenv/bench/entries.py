"""What stands where in a grid: the names of its entries, and an error that says where one belongs.

A name in the wrong place looks most like some other name that is allowed there. So it is looked up
here first, and only what belongs nowhere is taken for a slip of the keyboard.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from tokenenv.agents import ALGORITHMS
from tokenenv.env.config import EnvConfig
from tokenenv.errors import InvalidArgument, check_choice

SETTINGS = ("env", "reward", "gold", "algo", "num_envs", "total_tokens", "options", "agent")
"""What a cell is made of, as the config.yaml of a run calls it."""
SEED_OPTIONS = "seed_options"
"""Beside the settings: the options of the environment that are given the cell's seed."""
AXES = {"envs": "env", "designs": "reward", "algorithms": "algo", "rows": None}
"""The tables of a grid, each with the setting that a single word in it gives."""
TOP = ("name", "about", "seeds", "points", "texts", "baseline", "always", *AXES)
"""What stands at the top of a grid alone."""
OPTIONS, AGENT = "the options of the environment", "the settings of the algorithm"


def check_entry(what: str, name: Any, allowed: Collection[str]) -> None:
    """Raise `InvalidArgument` unless `name` is one of the `allowed` entries. Where it belongs to
    another place of a grid, the message says to which; `what` begins it, such as "rows.a: the
    setting"."""
    if name not in allowed:
        check_place(what, name)
        check_choice(what, name, allowed)


def check_place(what: str, name: Any, here: str = "") -> None:
    """Raise `InvalidArgument` where `name`, which is unknown `here`, belongs to another place of a
    grid."""
    for names, place, form in _places(name):
        if name in names and place != here:
            raise InvalidArgument(f"{what}={name!r} does not belong here but to {place}: {form}.")


def _places(name: Any) -> Iterator[tuple[Collection[str], str, str]]:
    """Yield the entries of each place of a grid, what the place is called, and how `name` is
    written there."""
    yield ("goal",), "an environment", "envs: {LABEL: {env: ID, goal: {share: 0.8}}}"
    yield ("only",), "a design, an algorithm or a row", "rows: {LABEL: {only: [ENVIRONMENT]}}"
    yield ("seed",), "the top of the grid", "seeds: [0, 1, 2]"
    yield TOP, "the top of the grid", f"{name}: VALUE"
    yield (*SETTINGS, SEED_OPTIONS), "the settings beside options and agent", f"{name}: VALUE"
    # Two settings have both: what is said of an environment holds for all algorithms.
    yield {one.name for one in fields(EnvConfig)}, OPTIONS, f"options: {{{name}: VALUE}}"
    configs = [kind.config_class for kind in ALGORITHMS.values()]
    yield {one.name for kind in configs for one in fields(kind)}, AGENT, f"agent: {{{name}: VALUE}}"
