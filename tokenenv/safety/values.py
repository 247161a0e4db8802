"""Values as people type them, on the command line and in YAML files, as the type that each option
wants.

They are read by YAML 1.2's core schema. PyYAML alone reads YAML 1.1, for which `1e-3` is a word,
`no` is false and `1:30` is 90. As in Python, digits may also be grouped (`1_000`), and `inf` and
`nan` need no point before them.
"""

import re
import types
import typing
from collections.abc import Callable
from typing import Any

import yaml

from tokenenv.errors import InvalidArgument

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INT = rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = (
    rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?{_DIGITS})?"
    r"|[-+]?\.?(?:inf|Inf|INF)|\.?(?:nan|NaN|NAN)"
)
SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(_INT),
    "float": re.compile(_FLOAT),
}
"""The scalars that are more than a word, by YAML's tag. The first pattern that fits the whole of a
word decides."""


def scalar(text: str) -> Any:
    """Return what a plain word stands for: None, a bool, a number, or itself."""
    kind = next((kind for kind, form in SCALARS.items() if form.fullmatch(text)), "str")
    try:
        return _CONSTRUCT[kind](text)
    # Python refuses numbers of very many digits.
    except ValueError:
        return text


def typed(text: str) -> Any:
    """Return what was typed as one argument: a scalar, or a list or mapping in YAML's brackets."""
    if not text.startswith(("[", "{")):
        return scalar(text)
    # A word may begin with a bracket too, such as [INST.
    try:
        return from_yaml(text)
    except InvalidArgument:
        return text


def from_yaml(text: str, name: str = "text") -> Any:
    """Return what a YAML document holds: plain values, lists and mappings.

    Args:
        text: the document.
        name: its name in errors.

    Raises:
        InvalidArgument: it is no YAML, or has tags, aliases (with which a small file could stand
            for a huge value) or a key twice.
    """
    # `_Loader` is a SafeLoader, which makes no objects of a file's choosing.
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidArgument(f"{name} cannot be read as YAML: {reason}.") from error


def to_yaml(values: Any) -> str:
    """Return a YAML document that `from_yaml` reads as the same values. Words that look like
    numbers are quoted in it."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def fit(name: str, value: Any, wanted: Any) -> Any:
    """Return a value, typed or read from a file, as the type that an option wants.

    A number is returned where a number is wanted, and the word that was typed where a word is,
    whatever it looks like.

    Args:
        name: of the option, for errors.
        value: a string as it was typed, or what a file holds.
        wanted: a type hint.

    Raises:
        InvalidArgument: the value is of none of the types.
    """
    # Words may be read in several ways, so the order decides: None, bool, number, list or mapping,
    # and the word itself at last.
    kinds = _kinds(wanted)
    others = kinds - _SCALAR
    found = typed(value) if isinstance(value, str) else value
    if found is None and (type(None) in kinds or Any in kinds):
        return None
    if isinstance(found, bool):
        if bool in kinds:
            return found
    elif isinstance(found, int | float):
        if int in kinds and (isinstance(found, int) or found.is_integer()):
            return int(found)
        if float in kinds:
            return _float(name, found)
        if others and not kinds & {str, Any}:
            return found
    elif isinstance(found, list | dict) and others:
        return found
    if (str in kinds or others) and not isinstance(found, list | dict | None):
        return value if isinstance(value, str) else scalar_text(value)
    if isinstance(value, str) and str in kinds:
        return value
    names = sorted(getattr(kind, "__name__", str(kind)) for kind in kinds)
    allowed = " or ".join(names).replace("NoneType", "null")
    raise InvalidArgument(f"{name}={value!r:.80} is not allowed; it must be of type {allowed}.")


def scalar_text(value: Any) -> str:
    """Return a bool or a number as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise InvalidArgument(f"{name} is a number of too many digits.") from error


def _kinds(wanted: Any) -> set[Any]:
    """Return the types of which a value with a type hint may be."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(wanted) for kind in _kinds(part)}
    if origin is typing.Annotated:
        return _kinds(typing.get_args(wanted)[0])
    if origin is typing.Literal:
        return {type(choice) for choice in typing.get_args(wanted)}
    return {origin or wanted}


_SCALAR = {str, int, float, bool, type(None)}


def _whole(text: str) -> int:
    prefix = text.lower()[:2]
    return int(text, {"0o": 8, "0x": 16}.get(prefix, 10))


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_CONSTRUCT: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": _whole,
    "float": _real,
    "str": str,
}


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's core schema, and nothing by reference."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {None: yaml.SafeLoader.construct_undefined}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super(yaml.SafeLoader, self).construct_mapping(node, deep=True)
        if len(found) < len(node.value):
            raise yaml.YAMLError("a key stands in a mapping twice")
        return found


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else than a word."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _scalar_of(construct: Any) -> Any:
    return lambda loader, node: construct(loader.construct_scalar(node))


def _sequence(loader: _Loader, node: Any) -> Any:
    return loader.construct_sequence(node, deep=True)


def _mapping(loader: _Loader, node: Any) -> Any:
    return loader.construct_mapping(node)


for _kind, _form in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form.pattern})\\Z"), None
        )
for _kind, _construct in _CONSTRUCT.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar_of(_construct))
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
