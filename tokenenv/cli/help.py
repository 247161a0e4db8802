"""How `--help` shows fields."""

import ast
import inspect
import itertools
import textwrap
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import tyro


def shown_as(metavar: str, help: str | None = None) -> Any:
    """The annotation of a field that may be left out: what stands for its value in `--help`, and
    no "(default: None)"."""
    return tyro.conf.arg(metavar=metavar, help=help, help_behavior_hint="")


PATH = shown_as("PATH")
OPTIONS = shown_as("[NAME VALUE ...]")


def join_lines(cls: type) -> None:
    """Hand tyro the docstring of each field of a dataclass as one paragraph: by itself it keeps the
    line breaks of the source, which then fall anywhere in the terminal's lines."""
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            for name, text in docstrings(base).items():
                # That of `cls`, which may give the field of a base another type or default.
                field: Any = next(one for one in fields(cls) if one.name == name)
                metadata = {**field.metadata, "help": " ".join(text.split())}
                field.metadata = MappingProxyType(metadata)


def docstrings(cls: type) -> dict[str, str]:
    """The docstrings below the fields that a class defines itself, by the field's name."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class without a file, typed into an interpreter
        return {}
    body = ast.parse(textwrap.dedent(source)).body[0].body  # type: ignore[attr-defined]
    names = {field.name for field in fields(cls)}
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and field.target.id in names
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
