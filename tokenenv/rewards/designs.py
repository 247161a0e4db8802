"""The named designs, and how a `reward=` argument becomes terms."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tokenenv.errors import InvalidArgument
from tokenenv.plugins import Names, said
from tokenenv.rewards.attention import Attention
from tokenenv.rewards.distill import Distill
from tokenenv.rewards.gradient import Gradient
from tokenenv.rewards.implicit import Implicit
from tokenenv.rewards.occlusion import Occlusion
from tokenenv.rewards.online import Prime
from tokenenv.rewards.process import Process
from tokenenv.rewards.progressive import progressive
from tokenenv.rewards.reward_sum import RESERVED, weight_now
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.segment import Segment
from tokenenv.rewards.shaping import Delta, Oracle, Shaping
from tokenenv.rewards.shapley import Shapley
from tokenenv.rewards.term import RewardTerm, Weight
from tokenenv.rewards.terminal import Terminal
from tokenenv.rewards.token import Token
from tokenenv.rewards.turn import Turn
from tokenenv.rewards.uniform import Uniform

Design = str | RewardTerm | Callable[..., Any]
"""A design's name, a term, or a function of prompt and response that is taken as a `Rule`."""
RewardSpec = Design | Mapping[str, "RewardSpec | tuple[RewardSpec, Weight]"]

DESIGNS: dict[str, Callable[[], RewardSpec]] = {
    "attention": Attention,
    "delta": Delta,
    "distill": Distill,
    "gradient": Gradient,
    "implicit": Implicit,
    "occlusion": Occlusion,
    "oracle": Oracle,
    "prime": Prime,
    "process": Process,
    "progressive": progressive,
    "segment": Segment,
    "shaping": Shaping,
    "shapley": Shapley,
    "terminal": Terminal,
    "token": Token,
    "turn": Turn,
    "uniform": Uniform,
}

DESIGN_NAMES = Names("reward", "tokenenv.rewards", DESIGNS)
"""The bundled names and those of installed plugins."""


def named_design(name: str) -> RewardSpec:
    """Return what a bundled name or an installed plugin's stands for; the plugin is imported.

    Raises:
        InvalidArgument: the name is unknown, or the plugin cannot be used.
    """
    plugin = DESIGN_NAMES.find(name)
    return DESIGNS[name]() if plugin is None else reward_from(plugin.load(), plugin.label)


def reward_from(found: object, label: str) -> RewardSpec:
    """Return what `reward=` takes, from an object that a module holds under a name.

    Args:
        found: a `RewardTerm` class, which is made without arguments; a `RewardTerm`; a function of
            (prompt, response), which becomes a `Rule`; or a mapping as `reward=` takes it.
        label: the beginning of an error's sentence.

    Raises:
        InvalidArgument: `found` is something else, or the class cannot be made.
    """
    if isinstance(found, type) and issubclass(found, RewardTerm):
        try:
            return found()
        except (Exception, SystemExit) as error:
            raise InvalidArgument(
                f"{label}: {found.__name__}() raised {said(error)}; a design that is named is made "
                f"without arguments."
            ) from error
    if isinstance(found, RewardTerm | Mapping):
        return found
    if callable(found) and not isinstance(found, type):
        try:
            return Rule(found)
        except InvalidArgument as error:
            raise InvalidArgument(f"{label}: {error}") from error
    what = found.__name__ if isinstance(found, type) else f"of type {type(found).__name__}"
    raise InvalidArgument(
        f"{label} is {what}; a reward is a RewardTerm class or object, a function of (prompt, "
        f"response), or a mapping of names to them."
    )


def make_terms(reward: RewardSpec) -> dict[str, RewardTerm]:
    """Return the terms of a `reward=` argument by name.

    `reward` is a design: a name of `DESIGNS`, a `RewardTerm`, or a function of (prompt, response)
    that returns a number and is taken as a `Rule`. Or it is a mapping of names to designs, or to
    (design, weight) pairs. A mapping within a mapping is a term of several parts, "name.part",
    whose weights are multiplied. A weight given beside a term replaces the term's own. The terms
    are shallow copies, so that one object may be given to several envs.
    """
    terms: dict[str, RewardTerm] = {}
    for term in _expand(reward, None, None):
        if term.name in terms:
            raise InvalidArgument(
                f"reward= has two terms called {term.name!r}; give a mapping with a name for each."
            )
        terms[term.name] = term
    return terms


def _expand(reward: object, name: str | None, weight: Weight | None) -> Iterator[RewardTerm]:
    if isinstance(reward, str):
        reward = named_design(reward)
    elif isinstance(reward, type):
        raise InvalidArgument(
            f"reward={reward.__name__} is a class; give an object of it, {reward.__name__}(...)."
        )
    elif callable(reward) and not isinstance(reward, RewardTerm):
        reward = Rule(reward)
    if isinstance(reward, RewardTerm):
        yield _named(copy.copy(reward), name, weight)
    elif isinstance(reward, Mapping):
        for part, value in reward.items():
            if not isinstance(part, str):  # YAML reads {1: token} as a number
                raise InvalidArgument(f"reward= has a term called {part!r}; a name must be a text.")
            design, share = _pair(part, value) if isinstance(value, tuple) else (value, None)
            yield from _expand(design, f"{name}.{part}" if name else part, _product(weight, share))
    else:
        raise InvalidArgument(
            f"reward={reward!r} must be a design's name, a RewardTerm, a function of prompt and "
            f"response, or a mapping of names to them."
        )


def _named(term: RewardTerm, name: str | None, weight: Weight | None) -> RewardTerm:
    term.name = name or term.name or type(term).__name__.lower()
    if term.name in RESERVED:
        raise InvalidArgument(
            f"the term name {term.name!r} is taken; use {RESERVED[term.name]} instead."
        )
    term.weight = term.weight if weight is None else weight
    _check_weight(term.name, term.weight)
    return term


def _pair(name: object, value: tuple[Any, ...]) -> tuple[Any, Weight]:
    if len(value) != 2:
        raise InvalidArgument(
            f"reward= has a tuple of {len(value)} at {name!r}; allowed: (design, weight)."
        )
    _check_weight(name, value[1])
    return value[0], value[1]


def _check_weight(name: object, weight: object) -> None:
    if callable(weight) or (isinstance(weight, Real) and math.isfinite(weight)):
        return
    raise InvalidArgument(
        f"the weight of {name!r} must be a finite number or a schedule of tokens seen, not "
        f"{weight!r}."
    )


@dataclass(frozen=True, slots=True)
class Product:
    """The product of two weights, as a schedule."""

    one: Weight
    other: Weight

    def __call__(self, tokens_seen: int) -> float:
        """The weight after so many tokens."""
        return weight_now(self.one, tokens_seen) * weight_now(self.other, tokens_seen)


def _product(one: Weight | None, other: Weight | None) -> Weight | None:
    return (
        (one if other is None else other) if one is None or other is None else Product(one, other)
    )
