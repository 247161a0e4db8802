"""What the command line would be told to make an env again: its id, its reward and its options, in
words and numbers.

Some parts of an env that Python made have no words: a model object, a lambda, a data set. For each
of them there is a sentence instead, which says what it was and how it can be named.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import yaml

from tokenenv.env.identity import plain
from tokenenv.plugins import Names, name_of
from tokenenv.rewards.designs import DESIGNS
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.term import RewardTerm

NOT_OPTIONS = ("num_envs", "vectorization_mode", "render_mode")
"""Keywords of `gym.make_vec` that are no options of the env, or change no text."""
MOST = 1000
"""The most entries of a list that is kept with the options. Longer ones belong into a file."""


class NoName(Exception):
    """Raised for what has no words. Its message says what it is."""


class AsTyped(NamedTuple):
    """An env as the command line would be told of it."""

    values: dict[str, Any]
    """`env`, `reward` and `gold`, each a text or None, and `options`, a mapping of plain values."""
    no_name: dict[str, str]
    """For each part without words, by dotted name ("reward", "options.model"): a sentence."""


def as_typed(envs: Any) -> AsTyped:
    """Return the words for a `TokenVectorEnv`."""
    no_name: dict[str, str] = {}
    given = {} if envs.spec is None else dict(envs.spec.kwargs)

    def words(name: str, say: Any, value: Any) -> Any:
        try:
            return say(value)
        except NoName as error:
            no_name[name] = _sentence(name, str(error))
            return None

    values = {
        "env": words("env", _id, envs.spec),
        "reward": words("reward", _reward, given.pop("reward", None)),
        "gold": words("gold", _reward, given.pop("gold", None)),
    }
    task = given.pop("task", None)
    if envs.spec is not None and task != gym.registry[envs.spec.id].kwargs["task"]:
        given["task"] = words("options.task", _function, task)
    if "respond" in given:
        given["respond"] = words("options.respond", _function, given["respond"])
    if "watch" in given:
        given["watch"] = words("options.watch", _reward, given["watch"])
    options = {
        name: words(f"options.{name}", _plain, value)
        for name, value in given.items()
        if name not in NOT_OPTIONS
    }
    known = {name: value for name, value in options.items() if value is not None}
    return AsTyped({**values, "options": known | resolved(envs)}, no_name)


def resolved(envs: Any) -> dict[str, Any]:
    """Return the value of every option that all envs have, defaults included, so that a run can be
    made again after a default has changed."""
    known = {name: value for name, value in envs.identity["options"].items() if value is not None}
    if known["kl"] == "none":
        del known["kl_coef"]
    # The prompts' file may change before a run goes on: its spaces must not.
    if envs.token_spec.max_prompt_tokens_from != "task":
        known["max_prompt_tokens"] = envs.token_spec.max_prompt_tokens
    return known


def _sentence(name: str, what: str) -> str:
    """What a part is that has no words, and the flag that names one."""
    part, _, key = name.rpartition(".")
    kind = "module:Name" if name in ("reward", "options.watch") else "module:function"
    if name == "env":
        flag = "--env module:id, where importing the module registers the id"
    elif part == "options" and key not in ("task", "watch", "respond"):
        flag = f"--options {key} " + ("FILE" if key == "prompts" else "NAME_OR_FOLDER")
    else:
        flag = f"--options {key} {kind}" if part else f"--{name} {kind}"
    return f"{what}, which has no name on the command line; name one: {flag}"


def _id(spec: Any) -> str:
    """The id, with the module that registers it where it is neither bundled nor a plugin's."""
    if spec is None:
        raise NoName("an env that gym.make_vec did not make")
    source = gym.registry[spec.id].kwargs["task"]
    source = source if isinstance(source, str) else name_of(source)
    plugins = [plugin.name for plugin in Names("env", "tokenenv.envs", ()).plugins()]
    if spec.id in plugins or str(source).startswith("tokenenv.envs."):
        return spec.id
    if source is None:
        raise NoName(f"{spec.id}, whose task is no function of a module")
    # A module that makes a task registers its id too, as the docs do it.
    return f"{source.partition(':')[0]}:{spec.id}"


def _function(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    name = name_of(value)
    if name is None:
        raise NoName(_described(value))
    return name


def _reward(value: Any) -> str | None:
    """A reward's name, or a mapping of names as YAML on one line."""
    if not isinstance(value, Mapping):
        return None if value is None else _design(value)
    text = yaml.safe_dump(
        _mapping(value), default_flow_style=True, sort_keys=False, width=float("inf")
    )
    return text.strip()


def _mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    def part(found: Any) -> Any:
        if isinstance(found, tuple):
            return [part(found[0]), _plain(found[1])]
        return _mapping(found) if isinstance(found, Mapping) else _design(found)

    return {name: part(found) for name, found in value.items()}


def _design(value: Any) -> str:
    """The name of one design: a bundled one's or a plugin's, or that of a rule's function."""
    if isinstance(value, str):
        return value
    if not isinstance(value, RewardTerm):
        return str(_function(value))
    if type(value) is Rule and plain(value) == plain(Rule(value.function)):
        return str(_function(value.function))
    for name in DESIGNS:
        made: Any = DESIGNS[name]
        if type(value) is made and plain(value) == plain(made()):
            return name
    raise NoName(_described(value))


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) and len(value) <= MOST:
        return [_plain(one) for one in value]
    raise NoName(_described(value))


def _described(value: Any) -> str:
    """What a part is that has no words."""
    kind = type(value).__name__
    if isinstance(value, RewardTerm):
        function = getattr(value, "function", None)
        return f"a {kind}" + (f" of {_described(function)} with options" if function else " object")
    if isinstance(value, Sequence):
        return f"a {kind} of {len(value)}"
    if hasattr(value, "__qualname__"):
        return f"the {kind} {value.__qualname__}"
    source = getattr(value, "name_or_path", None)
    return f"a {kind} object" + (f" (from {source!r})" if source else "")
