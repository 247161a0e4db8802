"""Names as they are typed on the command line: "module:Name" beside bundled and plugins' names.

Importing a module runs its code. These functions are therefore called with what the user typed, or
with what `tokenenv.cli.config_file.check_run` has let pass, which names no module.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import gymnasium as gym

from tokenenv.agents import Agent, agent_class, algorithm
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.plugins import import_module, load_name
from tokenenv.registration import ENV_NAMES, token_ids
from tokenenv.rewards.designs import DESIGN_NAMES, RewardSpec, reward_from
from tokenenv.rewards.rule import Rule
from tokenenv.safety.values import typed


def make_importable() -> None:
    """Put the current directory on the path of imports, as `python -m` does."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def env_id_of(name: str) -> str:
    """Return the registered id that `--env` names, after importing the module of "module:id", which
    registers it.

    Raises:
        InvalidArgument: there is no such module, its import raises something, or the id is not
            registered or makes no token environment.
    """
    module, colon, env_id = name.rpartition(":")
    label = f"env={name!r}"
    if not colon:
        known = token_ids()
        if env_id in gym.registry and env_id not in known:
            raise InvalidArgument(f"{label} is registered, but makes no token environment.")
        check_choice("env", env_id, known)
        if any(plugin.name == env_id for plugin in ENV_NAMES.plugins()):
            ENV_NAMES.find(env_id)  # raises where the plugin is refused
        return env_id
    make_importable()
    before = set(token_ids())
    import_module(_module_name(module, label), label)
    known = token_ids()
    if env_id not in known:
        # The ids that the import has added are the likeliest ones; where an earlier import has
        # added them already, all ids are named.
        check_choice(f"after importing {module!r}: env", env_id, set(known) - before or known)
    return env_id


def algorithm_of(name: str) -> type[Agent]:
    """Return the agent's class that `--algo` names: bundled, a plugin's, or "module:Name"."""
    if ":" not in name:
        return algorithm(name)
    make_importable()
    label = f"algo={name!r}"
    return agent_class(load_name(name, label), label)


def reward_of(reward: Any, argument: str = "reward") -> Any:
    """Return what `reward=` and `watch=` take, from what was typed.

    Args:
        reward: a design's name, "module:Name", or a mapping in YAML's brackets, such as
            "{dense: [token, 0.3], end: terminal}", whose values are either one or a pair of one
            and its weight. Whatever is no text or mapping is returned as it is.
        argument: the argument that an error names.
    """
    value = typed(reward) if isinstance(reward, str) else reward
    if isinstance(value, Mapping):
        return {name: _part(part, argument) for name, part in value.items()}
    return _named_reward(value, argument) if isinstance(value, str) else reward


def _part(part: Any, argument: str) -> Any:
    """A value of a mapping: a list of two is a reward and its weight."""
    if isinstance(part, list):
        return (reward_of(part[0], argument), *part[1:]) if part else ()
    return reward_of(part, argument)


def _named_reward(name: str, argument: str) -> RewardSpec:
    if ":" not in name:
        _check_design(name, argument)
        return name
    make_importable()
    label = f"{argument}={name!r}"
    return reward_from(load_name(name, label), label)


def _check_design(name: str, argument: str) -> None:
    """Raise where nobody gives the name, before a model is loaded for it."""
    try:
        check_choice(argument, name, DESIGN_NAMES)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error} A function of yours is module:function.") from None


def gold_of(name: str) -> Any:
    """Return the function, or the `Rule` of one, that `--gold` names."""
    make_importable()
    label = f"gold={name!r}"
    found = load_name(name, label)
    if isinstance(found, type) or not (callable(found) or isinstance(found, Rule)):
        raise InvalidArgument(f"{label} must be a function of (prompt, response).")
    return found


def _module_name(module: str, label: str) -> str:
    """The part before the colon, if it can be the name of a module."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise InvalidArgument(f"{label} is not of the form module:id.")
    return module
