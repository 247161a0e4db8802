"""Reading a grid from a file, which is YAML or TOML.

A file is data, as a run folder is (`tokenenv.safety.trust`): it names a module only where the
command line allows it.
"""

import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenenv.bench.entries import AXES, SEED_OPTIONS, SETTINGS, TOP, check_entry
from tokenenv.bench.grid import Grid
from tokenenv.errors import InvalidArgument
from tokenenv.plugins import NAME
from tokenenv.safety.trust import check_from_file
from tokenenv.safety.values import from_yaml, typed

SUITE = Path("benchmarks") / "suite"
"""Where `--suite NAME` looks for a folder NAME."""
FILES = ("grid.yaml", "grid.toml")
"""What the grid of a suite's folder is called."""


def read_grid(path: Path, modules: Collection[str] = (), **changes: Any) -> Grid:
    """Return the grid that a file holds.

    Args:
        path: a YAML file, or a TOML file whose name ends in .toml.
        modules: those that the file may name, as in "my_rewards:brief". Using such a name imports
            the module.
        **changes: fields that go before those of the file; None leaves the file's.

    Raises:
        InvalidArgument: the message names the file, and the entry or the line.
    """
    values = _values(path)
    for name in values:
        check_entry(f"{path}: the entry", name, (*TOP, *SETTINGS, SEED_OPTIONS))
    for name, settings in _parts(values):
        _check_trust(f"{path}: {name}" if name else str(path), settings, modules)
    given = {name: value for name, value in values.items() if name in TOP}
    settings = {name: value for name, value in values.items() if name not in TOP}
    given = {"name": path.resolve().parent.name if path.name in FILES else path.stem} | given
    try:
        said = {name: value for name, value in changes.items() if value is not None}
        return Grid(**{**given, "settings": settings, **said})
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error


def suite_file(name: str) -> Path:
    """Return the grid's file of a suite: a folder, or the name of one in `SUITE`, below the
    current directory or the repository that this package lies in.

    Raises:
        InvalidArgument: there is no such folder, or no grid in it.
    """
    here = [Path(), Path(__file__).resolve().parents[2]]
    folders = [Path(name), *(place / SUITE / name for place in here)]
    for folder in folders:
        for file in FILES:
            if (folder / file).is_file():
                return folder / file
    found = sorted(
        {path.parent.name for place in here for path in (place / SUITE).glob("*/grid.*")}
    )
    listed = f" There are: {', '.join(found)}." if found else ""
    raise InvalidArgument(
        f"suite={name!r} is neither a folder with a {FILES[0]} nor one in {SUITE}.{listed}"
    )


def _values(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgument(f"{str(path)!r} cannot be read: {reason}.") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InvalidArgument(f"{path} cannot be read as TOML: {error}.") from error
    values = from_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InvalidArgument(f"{path} holds no mapping of names to values.")
    return values


def _parts(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every place of a file where settings stand, with its name."""
    yield "", values
    yield "always", values.get("always", {})
    for axis, word in AXES.items():
        entries = values.get(axis)
        for label, entry in entries.items() if isinstance(entries, Mapping) else ():
            whole = not isinstance(entry, Mapping) or not set(entry) & set(SETTINGS)
            yield f"{axis}.{label}", {word: entry} if word is not None and whole else entry


def _check_trust(where: str, settings: Mapping[str, Any], modules: Collection[str]) -> None:
    """Raise where settings of a file name a module that is not allowed, or ask for more than a
    file may."""
    if not isinstance(settings, Mapping):
        return  # which the grid refuses
    options, agent = (
        part if isinstance(part := settings.get(name), Mapping) else {}
        for name in ("options", "agent")
    )
    entries = {name: settings.get(name) for name in ("env", "reward", "gold", "algo")}
    entries |= {f"options.{name}": value for name, value in options.items()}
    entries |= {"agent.rollout": agent.get("rollout")}
    more = agent.get("rollout_options")
    entries |= {
        f"agent.rollout_options.{name}": value
        for name, value in (more.items() if isinstance(more, Mapping) else ())
    }
    for name, value in entries.items():
        for module in sorted(set(modules_named(name, value)) - set(modules)):
            raise InvalidArgument(
                f"{where}: {name}={value!r:.80} imports the module {module!r}, which no file can "
                f"ask for; if you trust it, allow it: --modules {module}"
            )
    allowed = {name: value for name, value in entries.items() if not modules_named(name, value)}
    check_from_file(allowed, where)


def modules_named(name: str, value: Any) -> list[str]:
    """Return the modules that an entry names."""
    if name == "env" and isinstance(value, str) and ":" in value:
        return [value.rpartition(":")[0]]
    value = typed(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return [module for part in value.values() for module in modules_named("", part)]
    if isinstance(value, list | tuple):
        return [module for part in value for module in modules_named("", part)]
    named = isinstance(value, str) and NAME.fullmatch(value)
    return [value.partition(":")[0]] if named else []
