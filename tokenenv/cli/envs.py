"""`tokenenv envs`: the registered ids."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import tyro
from rich.table import Column, Table
from rich.text import Text

from tokenenv.cli.console import console, say, say_text
from tokenenv.cli.names import env_id_of
from tokenenv.env.build import load_task
from tokenenv.env.config import EnvConfig
from tokenenv.errors import InvalidArgument
from tokenenv.registration import ENV_NAMES, task_source, token_ids
from tokenenv.safety.shown import visible

Source = str | Callable[..., Any]
"""A task's function, or "module:function"."""


@dataclass(kw_only=True)
class Envs:
    """List the environments that can be trained on: bundled ones, those of installed plugins, and
    your own. With an id, say what it is and which options it has."""

    env: tyro.conf.Positional[str | None] = None
    """An id of the list, or module:id for one of your own."""

    def run(self) -> None:
        """Print the table, or all about one id."""
        if self.env is None:
            console.print(listing())
            say("one of them with its options: tokenenv envs ID")
            say("train on one: tokenenv train --env ID --options NAME VALUE")
            say("your own: docs/plugins.md")
        else:
            describe(env_id_of(self.env))


def listing() -> Table:
    """Every id with what it is, what it needs and who brings it. A plugin that cannot be imported
    is listed with its error."""
    plugins = ENV_NAMES.plugins()
    brought = {plugin.name: plugin.distribution for plugin in plugins if plugin.refused is None}
    rows = [(env_id, *_about(env_id), brought.get(env_id, "")) for env_id in token_ids()]
    rows += [
        (plugin.name, "", plugin.refused or "Gymnasium does not take this id", plugin.distribution)
        for plugin in plugins
        if plugin.refused is not None or plugin.name not in token_ids()
    ]
    return table(("id", "what it is", "options it needs", "plugin"), sorted(set(rows)))


def _about(env_id: str) -> tuple[str, str]:
    source = task_source(env_id)
    try:
        return first_line(source) + note(source), ", ".join(needed_options(source))
    except InvalidArgument as error:
        return str(error), ""


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A table of plain texts. The first column keeps its width, and a column without entries is
    left out."""
    kept = [
        number for number, _ in enumerate(columns) if number == 0 or any(r[number] for r in rows)
    ]
    made = Table(
        *(Column(columns[number], no_wrap=number == 0, overflow="fold") for number in kept)
    )
    for row in rows:
        made.add_row(*(Text(visible(row[number])) for number in kept))
    return made


def describe(env_id: str) -> None:
    """Print what an id is and its options, with their defaults."""
    source = task_source(env_id)
    task = _function(source)
    module = inspect.getmodule(task)
    texts = [inspect.getdoc(module), inspect.getdoc(task)]
    for text in dict.fromkeys(text for text in texts if text):
        say_text(text)
    rows = []
    for name, parameter in inspect.signature(task).parameters.items():
        needed = parameter.default is parameter.empty
        rows.append((name, "(needed)" if needed else _shown(parameter.default)))
    console.print(table(("its options", "default"), rows))
    names = ", ".join(field.name for field in fields(EnvConfig))
    say(f"options of every env (tokenenv.env.config.EnvConfig): {names}")
    say(f"train on it: tokenenv train --env {env_id} --options NAME VALUE")


def _shown(value: Any) -> str:
    """A default as it is typed."""
    return str(value) if isinstance(value, str | int | float | bool | None) else repr(value)


def task_options(source: Source) -> list[str]:
    """The names of a task's own options."""
    return list(inspect.signature(_function(source)).parameters)


def needed_options(source: Source) -> list[str]:
    """The names of the options without a default."""
    parameters = inspect.signature(_function(source)).parameters.items()
    return [name for name, parameter in parameters if parameter.default is parameter.empty]


def first_line(source: Source) -> str:
    """What a task's file says it is in its first line, or the function where the file says
    nothing."""
    task = _function(source)
    text = inspect.getdoc(inspect.getmodule(task)) or inspect.getdoc(task) or ""
    return text.split("\n", 1)[0].split(": ", 1)[-1]


def note(source: Source) -> str:
    """What a task's file adds about this machine."""
    about = getattr(inspect.getmodule(_function(source)), "note", None)
    return f" ({about()})" if about else ""


def _function(source: Source) -> Callable[..., Any]:
    return load_task(source) if isinstance(source, str) else source
