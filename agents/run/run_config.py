"""The config.yaml of a run folder: what `tokenenv train --resume` and `tokenenv evaluate` make the
run again from.

A run of the command line says what was typed. A run of Python says what its agent and its env say
of themselves. Parts without a name, such as a model object, stand under `no_name`, each with a
sentence on how it can be named.
"""

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenenv.agents.rollout.env_rows import method
from tokenenv.agents.run.files import replace_file
from tokenenv.plugins import Names, name_of
from tokenenv.safety.shown import without_secrets
from tokenenv.safety.values import from_yaml, to_yaml

if TYPE_CHECKING:
    from tokenenv.agents.agent import Agent

CONFIG = "config.yaml"
OF_THE_ENV = ("env", "reward", "gold", "options", "eval_prompts", "no_name")
"""The entries that a run keeps when Python goes on with it. They describe the same env, and perhaps
in words that Python does not know."""
CHECKPOINT_EVERY = 10
"""Updates between checkpoints where the command line goes on with a run of Python."""


def write_config(
    agent: "Agent", total_tokens: float, checkpoint_every: int | None, *, new: bool
) -> None:
    """Write the config of a run of `total_tokens` tokens into the agent's `run_dir`."""
    path = Path(str(agent.run_dir)) / CONFIG
    values = agent.run_config
    if values is None:
        values = config_of(agent, total_tokens, checkpoint_every)
        values |= {} if new else _kept(path, values)
    record = made_with(agent.envs)
    record["made_with"]["lr"] = agent.config.lr
    write_values(path, values, record)


def write_values(path: Path, values: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write the values without keys and passwords, and then a `record`. The file appears whole or
    not at all."""
    text = to_yaml({**without_secrets(values), **record})
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def config_of(agent: "Agent", total_tokens: float, checkpoint_every: int | None) -> dict[str, Any]:
    """Return what the command line would be told to make this run again."""
    env, no_name = _env_of(agent)
    algo = _algo_of(type(agent))
    if algo is None:
        no_name["algo"] = (
            f"{type(agent).__name__}, which has no name on the command line; name one: --algo "
            f"module:Name"
        )
    if agent.own_policy:
        no_name["policy"] = (
            "a policy of one's own, which the command line cannot make; in Python, load takes it "
            "as policy="
        )
    return {
        **env,
        "algo": algo,
        "num_envs": agent.num_envs,
        "total_tokens": math.ceil(total_tokens),
        "checkpoint_every": checkpoint_every or CHECKPOINT_EVERY,
        "eval_prompts": None,
        "agent": asdict(agent.config) | ({"lr": None} if agent.chose_lr else {}),
        **({"no_name": no_name} if no_name else {}),
    }


def made_with(envs: Any) -> dict[str, Any]:
    """Return a record of what a run was made with, for people: the versions of the packages that
    compute, and the env's `identity`; a run's has its learning rate too. Nothing is read from
    it."""
    import tokenenv  # imported here, because the package imports this module

    packages = ("gymnasium", "numpy", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    identity = method(envs, "identity") or {}
    return {
        "made_with": {
            "versions": {
                "python": platform.python_version(),
                "tokenenv": tokenenv.__version__,
                **versions,
            },
            "env": {key: value for key, value in identity.items() if key != "options"},
        }
    }


def _env_of(agent: "Agent") -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of the env, and the sentences for its parts without a name."""
    typed = getattr(agent.core, "as_typed", None)
    values: dict[str, Any] = {"env": None, "reward": None, "gold": None, "options": {}}
    values, no_name = (values, {}) if typed is None else (dict(typed.values), dict(typed.no_name))
    if typed is None or agent.envs is not agent.core:
        no_name["env"] = (
            f"a {type(agent.envs).__name__}, which the command line cannot make; in Python, load "
            f"takes it as envs"
        )
    return values, no_name


def _algo_of(kind: type["Agent"]) -> str | None:
    """Return the name of an algorithm: a bundled one's, a plugin's or "module:Name"."""
    name = name_of(kind)
    if "algo" in vars(kind):
        return kind.algo
    plugins = Names("algo", "tokenenv.agents", ()).plugins()
    return next((plugin.name for plugin in plugins if plugin.value == name), name)


def _kept(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config at `path` says of the env, and, where it leaves the learning rate
    open, the agent of `values` without one; nothing where there is no such file."""
    known = from_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    if not isinstance(known, dict):
        return {}
    kept = {key: known[key] for key in OF_THE_ENV if key in known}
    agent = known.get("agent")
    left_open = isinstance(agent, dict) and "lr" in agent and agent["lr"] is None
    return kept | ({"agent": values["agent"] | {"lr": None}} if left_open else {})
