"""Names from outside the package: "module:Name", and what installed plugins add to the bundled
names.

A plugin is any installed distribution with an entry point in one of three groups: `tokenenv.envs`,
`tokenenv.rewards` or `tokenenv.agents` (docs/plugins.md). Its metadata is read when a name is
looked up. Its code is imported only when the name is used.
"""

import difflib
import functools
import importlib
import importlib.metadata
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenenv.errors import InvalidArgument, check_choice

NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
"""The form "module:Name", dots on both sides allowed."""
OWN_FOLDER = f"{Path(__file__).parent}{os.sep}"
"""The folder of this package. It ends in a separator: a plugin's may begin with the same name."""


def load_name(name: str, label: str) -> Any:
    """Return the object that "module:Name" names. This imports the module, so it runs code.

    Only names that the user typed, that the user's own code gives, or that an installed plugin
    brings come here: a name in a file does not (`tokenenv.safety.trust`).

    Args:
        name: "module:Name".
        label: the beginning of an error's sentence, such as "reward='my_rewards:Novelty'".

    Raises:
        InvalidArgument: the name has another form, there is no such module or attribute, or the
            import raised something.
    """
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"{label} is not of the form module:Name.")
    module, _, attributes = name.partition(":")
    found: Any = import_module(module, label)
    for attribute in attributes.split("."):
        found = _attribute(found, attribute, label)
    return found


def name_of(found: Any) -> str | None:
    """The "module:Name" under which `load_name` finds a function or a class; None where there is
    none, as for a lambda, a function within a function, or an object.

    What a script defines is named by the script's file: `train.py` is the module "train".
    """
    module, attributes = (getattr(found, key, None) for key in ("__module__", "__qualname__"))
    holder: Any = sys.modules.get(module) if isinstance(module, str) else None
    name = f"{_script() if module == '__main__' else module}:{attributes}"
    if holder is None or not NAME.fullmatch(name):
        return None
    for attribute in str(attributes).split("."):
        holder = getattr(holder, attribute, None)
    # A decorator may have left something else under the name of what it wraps.
    return name if holder is found else None


def _script() -> str:
    """What the program that was started is called where it is imported as a module; "" where it
    has no file."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec is not None else Path(file or "").stem


def import_module(module: str, label: str) -> ModuleType:
    """Import a module. Whatever its code raises becomes one sentence that says where."""
    try:
        return importlib.import_module(module)
    # A script without a main guard may end in sys.exit(), which is no Exception.
    except (Exception, SystemExit) as error:
        # A missing module is the named one or a package above it; any other one is missing from
        # the code of a module that was found.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise InvalidArgument(
                f"{label}: there is no module {error.name!r} in the current directory or among "
                f"the installed packages."
            ) from error
        raise InvalidArgument(f"{label}: importing {module!r} raised {said(error)}.") from error


def said(error: BaseException) -> str:
    """What an error of other people's code says, on one line, with the place that raised it."""
    text = " ".join(str(error).split())[:200]
    # The frames of this package and of Python's import say nothing about the other people's code.
    places = [
        f"{frame.filename}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen", OWN_FOLDER))
    ]
    # The text of a syntax error names its place, where no code has run.
    where = f" ({places[-1]})" if places and not isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _attribute(owner: Any, name: str, label: str) -> Any:
    what = getattr(owner, "__name__", type(owner).__name__)
    try:
        return getattr(owner, name)
    except AttributeError:
        pass
    # A module may import on demand what it names (`__getattr__`), so looking is running code.
    except (Exception, SystemExit) as error:
        raise InvalidArgument(f"{label}: {what!r}.{name} raised {said(error)}.") from error
    public = [known for known in dir(owner) if not known.startswith("_")]
    near = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise InvalidArgument(f"{label}: {what!r} has no {name!r}.{hint}")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A name that an installed distribution adds."""

    name: str
    """An env's id, a design's name or an algorithm's name."""
    value: str
    """"module:Name", what is imported when the name is used."""
    distribution: str
    """The distribution's name and version."""
    refused: str | None = None
    """Why the name cannot be used, as a sentence, or None."""

    @property
    def label(self) -> str:
        """The beginning of an error's sentence."""
        return f"{self.name!r} of the plugin {self.distribution}"

    def load(self) -> Any:
        """Import the plugin. Raises `InvalidArgument` naming it where that fails."""
        if self.refused is not None:
            raise InvalidArgument(self.refused)
        return load_name(self.value, self.label)


@functools.cache
def _entry_points(group: str) -> importlib.metadata.EntryPoints:
    """The entry points of a group. Reading them takes milliseconds, so they are read once."""
    return importlib.metadata.entry_points(group=group)


class Names:
    """The names of one kind: the bundled ones, and those that installed plugins add.

    A bundled name stays what it is, and a name that two plugins give is nobody's: the plugins are
    then listed as refused.

    Args:
        argument: what errors call a name: "env", "reward" or "algo".
        group: the group of entry points.
        bundled: the names that the package has itself.
    """

    def __init__(self, argument: str, group: str, bundled: Collection[str]) -> None:
        self.argument = argument
        self.group = group
        self.bundled = bundled

    def __iter__(self) -> Iterator[str]:
        yield from self.bundled
        yield from (plugin.name for plugin in self.plugins() if plugin.refused is None)

    def plugins(self) -> list[Plugin]:
        """Every plugin of the group, in the order of names, refused ones included."""
        entries = [
            (entry.name, entry.value, f"{entry.dist.name} {entry.dist.version}")
            for entry in _entry_points(self.group)
            if entry.dist is not None
        ]
        owners = Counter(name for name, _, _ in entries)
        found = []
        for name, value, distribution in sorted(entries):
            givers = sorted(other for known, _, other in entries if known == name)
            refused = None
            if name in self.bundled:
                refused = (
                    f"{self.argument}={name!r} is bundled with tokenenv-rl, which keeps it; the "
                    f"plugin {distribution} has to call its own something else."
                )
            elif owners[name] > 1:
                refused = (
                    f"{self.argument}={name!r} is given by {' and by '.join(givers)}; uninstall "
                    f"all but one of them."
                )
            elif ":" in name or not NAME.fullmatch(value):
                refused = (
                    f"{self.argument}={name!r} of the plugin {distribution} is no entry point "
                    f"that can be used: a name has no colon, and {value!r} must be module:Name."
                )
            found.append(Plugin(name, value, distribution, refused))
        return found

    def find(self, name: object) -> Plugin | None:
        """The plugin that gives a name, or None for a bundled one. Imports nothing.

        Raises:
            InvalidArgument: nobody gives the name, or two plugins do.
        """
        if isinstance(name, str) and name in self.bundled:
            return None
        for plugin in self.plugins():
            if plugin.name == name:
                if plugin.refused is not None:
                    raise InvalidArgument(plugin.refused)
                return plugin
        check_choice(self.argument, name, self)
        raise AssertionError("check_choice lets only known names pass")

    def added(self) -> str:
        """A sentence for `--help` about the names that plugins add, or ""."""
        usable = [plugin for plugin in self.plugins() if plugin.refused is None]
        names = ", ".join(f"{plugin.name} ({plugin.distribution})" for plugin in usable)
        return f" Installed plugins add {names}." if names else ""
