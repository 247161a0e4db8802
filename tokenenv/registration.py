"""The registered ids: bundled ones, those of installed plugins, and a user's own.

A new bundled task is a file in `envs/tasks/` and one line here.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import gymnasium as gym

from tokenenv.errors import InvalidArgument
from tokenenv.plugins import Names
from tokenenv.types import Task

TASKS = {
    "tokenenv/Arithmetic-v0": "tokenenv.envs.tasks.arithmetic:task",
    "tokenenv/Brackets-v0": "tokenenv.envs.tasks.brackets:task",
    "tokenenv/Calculator-v0": "tokenenv.envs.tasks.calculator:task",
    "tokenenv/ChatGen-v0": "tokenenv.envs.chatgen:task",
    "tokenenv/DelayedKey-v0": "tokenenv.envs.tasks.delayed_key:task",
    "tokenenv/Negation-v0": "tokenenv.envs.tasks.negation:task",
    "tokenenv/Dialogue-v0": "tokenenv.envs.tasks.dialogue:task",
    "tokenenv/PlantedPhrase-v0": "tokenenv.envs.tasks.planted_phrase:task",
    "tokenenv/PyDocs-v0": "tokenenv.envs.tasks.pydocs:task",
    "tokenenv/Reviews-v0": "tokenenv.envs.tasks.reviews:task",
    "tokenenv/TextGen-v0": "tokenenv.envs.textgen:task",
    "tokenenv/Twenty-v0": "tokenenv.envs.tasks.twenty:task",
}
"""The bundled ids, and the function that makes each one's task."""

ENV_NAMES = Names("env", "tokenenv.envs", TASKS)
"""The bundled ids and those of installed plugins."""


def register(env_id: str, task: str | Callable[..., Task]) -> None:
    """Register an id of your own, so that `gym.make_vec(env_id, num_envs=N)` and
    `gym.make(env_id)` make its env.

    Args:
        env_id: Gymnasium's form, such as "my/Reverse-v0".
        task: a function that returns a `tokenenv.Task`, or "module:function", which is imported
            when an env is made. The function's keyword arguments are the env's further options.

    Raises:
        InvalidArgument: the id is a bundled one, or has another form.
    """
    if env_id in TASKS:
        raise InvalidArgument(f"env_id={env_id!r} is bundled with tokenenv-rl; take another id.")
    _register(env_id, task)


def register_envs() -> None:
    """Register every bundled id, and every id of an installed plugin, with Gymnasium. Calling it
    again changes nothing, and no plugin is imported."""
    for env_id, task in TASKS.items():
        if env_id not in gym.registry:
            _register(env_id, task)
    for plugin in ENV_NAMES.plugins():
        if plugin.name in gym.registry:
            continue
        # A broken plugin must not stop `import tokenenv`: its id says why when it is made, and an
        # id that Gymnasium does not take is left out here and listed by `tokenenv envs`.
        fails = None if plugin.refused is None else functools.partial(_fail, plugin.refused)
        try:
            _register(plugin.name, fails or plugin.value)
        except InvalidArgument:
            continue


def token_ids() -> list[str]:
    """The registered ids that make token environments: bundled ones, plugins' and others'."""
    return sorted(env_id for env_id, spec in gym.registry.items() if _is_token_env(spec))


def task_source(env_id: str) -> str | Callable[..., Task]:
    """What makes the task of one of `token_ids`: a function, or "module:function"."""
    return gym.registry[env_id].kwargs["task"]


def _is_token_env(spec: Any) -> bool:
    """Whether the env is made from a task. The vector env may be a subclass of the user's own."""
    return "task" in spec.kwargs and spec.vector_entry_point is not None


def _register(env_id: str, task: str | Callable[..., Task]) -> None:
    try:
        gym.register(
            env_id,
            entry_point="tokenenv.env.single_env:TokenEnv",
            vector_entry_point="tokenenv.env.vector_env:TokenVectorEnv",
            kwargs={"task": task},
        )
    except gym.error.Error as error:
        raise InvalidArgument(
            f"env_id={env_id!r} is no id that Gymnasium takes: {error}"
        ) from error


def _fail(message: str) -> NoReturn:
    raise InvalidArgument(message)
