"""Named designs: what `reward="..."` may be, and how a `reward=` argument becomes terms."""

import copy
from collections.abc import Callable, Mapping

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.rewards.base import RewardTerm, Weight
from tokenenv.rewards.delta import Delta
from tokenenv.rewards.terminal import Terminal
from tokenenv.rewards.token import Token
from tokenenv.rewards.uniform import Uniform

DESIGNS: dict[str, Callable[[], RewardTerm]] = {
    "delta": Delta,
    "terminal": Terminal,
    "token": Token,
    "uniform": Uniform,
}

RESERVED = {"kl": "kl= and kl_coef=", "missing_eos": "missing_eos_penalty="}

Design = str | RewardTerm
RewardSpec = Design | Mapping[str, Design | tuple[Design, Weight]]


def make_terms(reward: RewardSpec) -> dict[str, RewardTerm]:
    """A design's name, a `RewardTerm`, or a mapping of names to terms or (term, weight) pairs, as named terms.

    The terms are shallow copies, so that one object may be given to several envs.
    """
    if isinstance(reward, Mapping):
        pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in reward.items()}
        return {name: _term(design, name, weight) for name, (design, weight) in pairs.items()}
    term = _term(reward, None, None)
    return {term.name: term}


def _term(design: object, name: str | None, weight: Weight | None) -> RewardTerm:
    if not isinstance(design, (str, RewardTerm)):
        raise InvalidArgument(f"reward={design!r} must be a design's name, a RewardTerm, or a mapping of names to them.")
    if isinstance(design, str):
        check_choice("reward", design, DESIGNS)
    term = DESIGNS[design]() if isinstance(design, str) else copy.copy(design)
    term.name = name or term.name or type(term).__name__.lower()
    if term.name in RESERVED:
        raise InvalidArgument(f"the term name {term.name!r} is taken; use {RESERVED[term.name]} instead.")
    term.weight = term.weight if weight is None else weight
    if not callable(term.weight) and not isinstance(term.weight, (int, float)):
        raise InvalidArgument(f"the weight of {term.name!r} must be a number or a schedule of tokens seen, not {weight!r}.")
    return term
