"""`tokenenv envs`: the registered ids."""

import inspect
from dataclasses import dataclass

from rich.table import Column, Table

from tokenenv.cli.console import console
from tokenenv.env.build import load_task
from tokenenv.registration import TASKS


@dataclass(kw_only=True)
class Envs:
    """List the registered ids."""

    def run(self) -> None:
        """Prints the table."""
        table = Table(Column("id", min_width=max(map(len, TASKS))), "what", "options of its own")
        for env_id, source in sorted(TASKS.items()):
            table.add_row(
                env_id, first_line(source) + note(source), ", ".join(task_options(source))
            )
        console.print(table)
        console.print("options of every env: the fields of tokenenv.env.config.EnvConfig")


def task_options(source: str) -> list[str]:
    """The names of a task's own options."""
    return list(inspect.signature(load_task(source)).parameters)


def first_line(source: str) -> str:
    """What a task's file says it is."""
    module = inspect.getmodule(load_task(source))
    return (inspect.getdoc(module) or "").split("\n", 1)[0].split(": ", 1)[-1]


def note(source: str) -> str:
    """What a task's file adds about this machine."""
    module = inspect.getmodule(load_task(source))
    about = getattr(module, "note", None)
    return f" ({about()})" if about else ""
