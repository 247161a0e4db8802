"""A grid: what is compared with what, from a small file or from Python.

Settings are those of a run's config.yaml. A cell's are those of the whole grid, then those of its
environment, its design, its algorithm, its row: what comes later goes before.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenenv.agents.config import check_seed
from tokenenv.bench.cells import Cell, check_decided, check_together, merged, seeded, train_of
from tokenenv.bench.entries import AXES, SEED_OPTIONS, SETTINGS, check_entry
from tokenenv.errors import InvalidArgument, check_choice

GOALS = ("share", "gold", "score", "objective")
"""The columns of which a goal may be a bound."""
DEFAULT_GOAL = {"share": 0.8}
ALL = "(all)"
"""What tables call the environments together."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Environments x (designs x algorithms, and rows) x seeds.

    Each of the four tables maps a label to settings, or to the one word that names an environment,
    a design or an algorithm. Everything is checked when a grid is made.

    Raises:
        InvalidArgument: an entry is unknown or not allowed; the message names it.
    """

    name: str = "grid"
    """What the folder of the results is called."""
    about: str = ""
    """What is asked here, in a sentence for readers of the results."""
    seeds: Any = 3
    """A list of seeds, or how many there are: 3 is [0, 1, 2]."""
    points: int = 10
    """How many times a policy is evaluated after the start, evenly apart in tokens; 1 or more."""
    texts: int = 256
    """How many texts are sampled for an evaluation; 2 or more."""
    baseline: str | None = None
    """The row that others are compared with; None is the first one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all cells, which all others go before."""
    always: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all cells that go before every other one, as those of the command line do."""
    envs: Mapping[str, Any] = field(default_factory=dict)
    """Environments. An entry may also have a `goal`, such as {gold: 0.9}."""
    designs: Mapping[str, Any] = field(default_factory=dict)
    algorithms: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    """Rows of any settings, beside the designs x algorithms. An entry of the last three may have
    `only`, the labels of the environments that it is for."""

    def __post_init__(self) -> None:
        _check_words(self.name, self.about)
        for name, least in (("points", 1), ("texts", 2)):
            _check_whole(name, getattr(self, name), least)
        changes: dict[str, Any] = {"seeds": _seeds(self.seeds)}
        for name in ("settings", "always"):
            changes[name] = _entry(name, getattr(self, name), None, ())
        for axis, word in AXES.items():
            more = ("goal",) if axis == "envs" else ("only",)
            entries = _mapping(axis, getattr(self, axis)).items()
            changes[axis] = {
                _label(axis, label): _entry(f"{axis}.{label}", entry, word, more)
                for label, entry in entries
            }
            if len(changes[axis]) < len(entries):  # 3 and "3" are one label
                raise InvalidArgument(f"{axis} has two entries with the same label.")
        for name, value in changes.items():
            object.__setattr__(self, name, value)
        self._check_labels()
        self._check_settings()

    def cells(self) -> list[Cell]:
        """Return the cells: environment by environment, row by row, seed by seed."""
        return [
            Cell(task, row, seed, seeded(settings, seed), self.points, self.texts)
            for task, row, settings in self._places()
            for seed in self.seeds
        ]

    def places(self) -> list[tuple[str, str]]:
        """Return the labels of environment and row of the cells, in their order, without seeds."""
        return [(task, row) for task, row, _ in self._places()]

    def row_labels(self) -> list[str]:
        """Return the labels of all rows, in their order."""
        return list(dict.fromkeys(row for _, row in self.places()))

    def goal(self, task: str) -> tuple[str, float]:
        """Return the column, and its least value, at which an environment counts as learnt: by
        default 0.8 of the way from the reference to the exact optimum."""
        (goal,) = self.envs.get(task, {}).get("goal", DEFAULT_GOAL).items()
        return goal

    def as_values(self) -> dict[str, Any]:
        """Return what a file of this grid says."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        settings = values.pop("settings")
        return {name: value for name, value in (values | settings).items() if value not in ({}, "")}

    def _places(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield an environment's label, a row's label, and the settings that all cells there
        have."""
        envs = self.envs or {str(self.settings.get("env", "default")): {}}
        for task, env in envs.items():
            for row, parts in self._rows():
                if all(task in part.get("only", envs) for part in parts):
                    yield task, row, merged([self.settings, env, *parts, self.always])

    def _rows(self) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
        """Yield the rows: the product of designs and algorithms, then the rows by name."""
        axes = [axis for axis in (self.designs, self.algorithms) if axis]
        if axes or not self.rows:
            for chosen in itertools.product(*(axis.items() for axis in axes)):
                labels = [label for label, _ in chosen]
                # An axis of one entry would only make every label longer.
                said = [one for one, axis in zip(labels, axes, strict=True) if len(axis) > 1]
                yield ", ".join(said or labels) or "default", [part for _, part in chosen]
        yield from ((label, [part]) for label, part in self.rows.items())

    def _check_settings(self) -> None:
        """Raise where the settings of an environment and a row are not allowed. Their cells differ
        in the seed alone, so one of them is checked, however many there are."""
        for task, row, settings in self._places():
            try:
                check_decided(settings, self.seeds)
                check_together(train_of(seeded(settings, self.seeds[0])))
            except InvalidArgument as error:
                raise InvalidArgument(f"{task} / {row}: {error}") from error

    def _check_labels(self) -> None:
        labels = [row for row, _ in self._rows()]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise InvalidArgument(f"two rows are called {sorted(twice)[0]!r}; labels must differ.")
        if self.baseline is not None:
            check_choice("baseline", self.baseline, labels)
        for axis in ("designs", "algorithms", "rows"):
            for label, entry in getattr(self, axis).items():
                for task in entry.get("only", ()):
                    check_choice(f"{axis}.{label}.only", task, self.envs)
                if entry.get("only") == []:
                    raise InvalidArgument(f"{axis}.{label}.only must name an environment.")


def _check_words(name: Any, about: Any) -> None:
    """Raise where the name is not that of one folder. A file is data: the results of a stranger's
    grid stay where results are."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise InvalidArgument(f"name={name!r:.80} must be the name of a folder, not a path.")
    if not isinstance(about, str):
        raise InvalidArgument(f"about={about!r:.80} must be a sentence.")


def _label(axis: str, label: Any) -> str:
    """Return the label of an entry. An empty one would be lost in the tables, and `(all)` stands
    there for all environments."""
    if label is None or str(label).strip() in ("", ALL):
        raise InvalidArgument(f"{axis}: {label!r} cannot be a label.")
    return str(label)


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        _check_whole("seeds", seeds, 1)
        return list(range(seeds))
    if not isinstance(seeds, list | tuple) or not seeds:
        raise InvalidArgument(f"seeds={seeds!r} must be a list of seeds, or their number.")
    for seed in seeds:
        check_seed(seed)
    if len(set(seeds)) < len(seeds):
        raise InvalidArgument(f"seeds={list(seeds)} has a seed twice.")
    return list(seeds)


def _entry(name: str, entry: Any, word: str | None, more: Sequence[str]) -> dict[str, Any]:
    """Return the settings of an entry: a mapping, or the one word that stands for it."""
    if word is not None and not isinstance(entry, Mapping):
        entry = {word: entry}
    # A reward may be a mixture, whose names are its own: {good: token, end: terminal}.
    elif word == "reward" and not set(entry) & {*SETTINGS, SEED_OPTIONS, *more}:
        entry = {word: dict(entry)}
    found = _mapping(name, entry)
    for key in found:
        check_entry(f"{name}: the setting", key, (*SETTINGS, SEED_OPTIONS, *more))
    for key in ("options", "agent"):
        _mapping(f"{name}.{key}", found.get(key, {}))
    for key in (SEED_OPTIONS, "only"):
        if key in found and not isinstance(found[key], list | tuple):
            raise InvalidArgument(f"{name}.{key}={found[key]!r} must be a list.")
    if "goal" in found:
        _check_goal(f"{name}.goal", found["goal"])
    return found


def _check_goal(name: str, goal: Any) -> None:
    if not isinstance(goal, Mapping) or len(goal) != 1:
        raise InvalidArgument(f"{name}={goal!r} must have one entry, such as {{gold: 0.9}}.")
    ((column, bound),) = goal.items()
    check_choice(name, column, GOALS)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
        raise InvalidArgument(f"{name}.{column}={bound!r} must be a finite number.")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{name}={value!r:.80} must be a mapping of names to values.")
    return dict(value)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgument(f"{name}={value!r} must be a whole number, {least} or more.")
