"""Reading a run's config.yaml, which `tokenenv.agents.run.run_config` writes.

It holds plain values. Each is checked when it is read, and what a file may not say is refused.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenenv.agents import ALGORITHM_NAMES
from tokenenv.cli.console import say_on_stderr
from tokenenv.errors import CheckpointError, InvalidArgument, check_choice
from tokenenv.registration import token_ids
from tokenenv.rewards.designs import DESIGN_NAMES
from tokenenv.safety.trust import NAMED, check_from_file
from tokenenv.safety.values import fit, from_yaml, typed

MAY_LACK = ("gold", "options.watch", "policy")
"""Parts that a run may go on without, where they have no name. A policy is one of them: its
checkpoint fits the default policy, or is refused (`fitting`)."""


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around loading the checkpoint of a run with this config: where it does not fit because the
    run had a policy of its own, the error says so."""
    try:
        yield
    except CheckpointError as error:
        sentence = read_values(path).get("no_name", {}).get("policy")
        if sentence is None:
            raise
        raise CheckpointError(f"{error} The run trained {sentence}.") from error


def read_values(path: Path) -> dict[str, Any]:
    """Return the mapping that a config holds. Raise `InvalidArgument` naming the file where there
    is none."""
    if not path.is_file():
        raise InvalidArgument(
            f"config={str(path)!r} is not a file; a run folder holds a config.yaml."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"config={str(path)!r} cannot be read: {error}.") from error
    values = from_yaml(text, f"config={str(path)!r}")
    if not isinstance(values, dict):
        raise InvalidArgument(f"config={str(path)!r} holds no mapping of options.")
    return values


def named_again(values: Mapping[str, Any], path: Path, said: Collection[str]) -> dict[str, Any]:
    """Return the values of a run that Python made, without its sentences on the parts that have no
    name.

    Raises:
        InvalidArgument: such a part is not in `said`, the dotted names of what the command line
            says; the message is the part's sentence.
    """
    left = {key: value for key, value in values.items() if key != "no_name"}
    for name, sentence in mapping(values.get("no_name", {}), path, "no_name").items():
        if name not in said and name not in MAY_LACK:
            raise InvalidArgument(f"{path}: {name} is {sentence}.")
        if name not in said and name != "policy":
            say_on_stderr(f"{path}: {name} is {sentence}; it is left out")
    return left


def fields_from(
    cls: type, values: Mapping[str, Any], path: Path, left_out: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a dataclass from a file's values: every field but those `left_out`,
    each of its type.

    Raises:
        InvalidArgument: a field is unknown, missing or of another type; names the file and the
            field.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name not in left_out]
    for key in values:
        check_choice(f"{path}: the field", key, names)
    for name in names:
        if name not in values:
            raise InvalidArgument(f"{path} lacks the field {name!r}; was it cut?")
    found = {name: fit(f"{path}: {name}", values[name], hints[name]) for name in names}
    for name in names:
        if typing.get_origin(hints[name]) is dict:
            mapping(found[name], path, name)
    return found


def mapping(value: Any, path: Path, name: str) -> dict[str, Any]:
    """Return `value` if it is a mapping whose keys are texts, else raise `InvalidArgument`."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidArgument(f"{path}: {name}={value!r:.80} is no mapping of names to values.")
    return value


def check_names(values: Mapping[str, Any], path: Path, said: Collection[str] = ()) -> None:
    """Raise where a config asks of the env for more than a file may (`tokenenv.safety.trust`), or
    names what is neither bundled nor an installed plugin's.

    `said` holds the dotted names of what the command line says too.
    """
    check_from_file(env_entries(values), path, said)
    for name, known in (("env", token_ids()), ("algo", ALGORITHM_NAMES)):
        if name not in said:
            check_choice(f"{path}: {name}", values[name], known)
    options = {f"options.{key}": values["options"].get(key) for key in ("reward", "watch")}
    rewards = {"reward": values["reward"]} | options
    for name, reward in rewards.items():
        if name not in said:
            for design in _designs(typed(reward) if isinstance(reward, str) else reward):
                check_choice(f"{path}: {name}", design, DESIGN_NAMES)


def check_rollout(values: Mapping[str, Any], path: Path, said: Collection[str] = ()) -> None:
    """Raise where a config asks of what writes the texts for more than a file may."""
    check_from_file(agent_entries(values, said), path, said)


def env_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's config says of the env and of names, by dotted name."""
    options = {f"options.{key}": value for key, value in values["options"].items()}
    return {name: values[name] for name in (*NAMED, "eval_prompts")} | options


def agent_entries(values: Mapping[str, Any], said: Collection[str] = ()) -> dict[str, Any]:
    """What a run's config says of what writes the texts, by dotted name."""
    agent = values["agent"]
    found = {"agent.rollout": agent["rollout"]}
    # The options of an engine do nothing where the env steps.
    if agent["rollout"] != "step" or "agent.rollout" in said:
        options = agent["rollout_options"]
        found |= {f"agent.rollout_options.{key}": value for key, value in options.items()}
    return found


def _designs(reward: Any) -> Iterator[Any]:
    """The names in a `reward=` of plain values: a name, or a mapping of names to names or to
    [name, weight] pairs."""
    if isinstance(reward, Mapping):
        for part in reward.values():
            yield from _designs(part[0] if isinstance(part, list) and len(part) == 2 else part)
    elif reward is not None:
        yield reward
