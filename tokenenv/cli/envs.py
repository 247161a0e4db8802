"""`tokenenv envs`: the registered ids."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro
from rich.table import Column, Table
from rich.text import Text

from tokenenv.cli.console import console, say, say_text
from tokenenv.cli.help import shown_as
from tokenenv.cli.names import env_id_of
from tokenenv.env.build import load_task
from tokenenv.env.config import EnvConfig
from tokenenv.errors import InvalidArgument
from tokenenv.plugins import Plugin
from tokenenv.registration import ENV_NAMES, task_source, token_ids
from tokenenv.safety.shown import visible

Source = str | Callable[..., Any]
"""A task's function, or "module:function"."""


@dataclass(kw_only=True)
class Envs:
    """List the environments that can be trained on: bundled ones, those of installed plugins, and
    your own. With an id, say what it is and which options it has."""

    env: Annotated[str | None, tyro.conf.Positional, shown_as("[ID]")] = None
    """An id of the list, or module:id for one of your own."""

    def run(self) -> None:
        """Print the table, or all about one id."""
        if self.env is None:
            console.print(listing())
            say("one of them with its options: tokenenv envs ID")
            say("train on one: tokenenv train --env ID --options NAME VALUE")
            say("your own: docs/plugins.md")
        else:
            describe(self.env)


def listing() -> Table:
    """Every id with what it is, who brings it and what it needs. A plugin that cannot be used is
    listed with its error."""
    known = token_ids()
    plugins = {plugin.name: plugin for plugin in ENV_NAMES.plugins() if plugin.refused is None}
    rows = [about(env_id, plugins.get(env_id)) for env_id in known]
    rows += [
        (plugin.name, f"cannot be used: {plugin.refused or 'Gymnasium does not take this id'}", "")
        for plugin in ENV_NAMES.plugins()
        if plugin.refused is not None or plugin.name not in known
    ]
    return table(("id", "what it is", "options it needs"), sorted(rows))


def about(env_id: str, plugin: Plugin | None) -> tuple[str, str, str]:
    """An id's line of the table."""
    source = task_source(env_id)
    try:
        what, needed = first_line(source) + note(source), ", ".join(needed_options(source))
    except InvalidArgument as error:
        what, needed = f"cannot be used: {error}", ""
    return env_id, what + from_plugin(plugin), needed


def from_plugin(plugin: Plugin | None) -> str:
    """Who brings a name, where it is not bundled."""
    return "" if plugin is None else f" (plugin {plugin.distribution})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain texts, whose first column is not folded."""
    # A word that is too long for its column is broken: it would be cut off otherwise.
    made = Table(*(Column(name, no_wrap=i == 0, overflow="fold") for i, name in enumerate(columns)))
    for row in rows:
        made.add_row(*(Text(visible(text)) for text in row))
    return made


def describe(name: str) -> None:
    """Print what an id, or module:id, is and which options it has, with their defaults."""
    source = task_source(env_id_of(name))
    task = _function(source)
    module = inspect.getmodule(task)
    texts = [inspect.getdoc(module), inspect.getdoc(task)]
    for text in dict.fromkeys(text for text in texts if text):
        say_text(text)
    rows = []
    for option, parameter in inspect.signature(task).parameters.items():
        needed = parameter.default is parameter.empty
        rows.append((option, "(needed)" if needed else _shown(parameter.default)))
    console.print(table(("its options", "default"), rows))
    names = ", ".join(field.name for field in fields(EnvConfig))
    say(f"options of every env (tokenenv.env.config.EnvConfig): {names}")
    say(f"train on it: tokenenv train --env {name} --options NAME VALUE")


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
