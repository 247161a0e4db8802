"""One reward design that fades into another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.term import RewardTerm

Part = str | RewardTerm | Callable[[str, str], Any]
"""What may fade: a design's name, a term, or a function that is taken as a `Rule`."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """A schedule whose weight goes from `first` to `last` in a straight line. The line begins when
    the env has seen `start` tokens and takes `tokens` more."""

    first: float
    last: float
    start: int
    tokens: int

    def __call__(self, tokens_seen: int) -> float:
        """The weight after so many tokens."""
        done = min(max((tokens_seen - self.start) / self.tokens, 0.0), 1.0)
        return self.first + done * (self.last - self.first)


def progressive(
    first: Part = "terminal",
    second: Part = "delta",
    *,
    tokens: int = 100_000,
    start: int = 0,
) -> dict[str, tuple[Part, Ramp]]:
    """One design that fades into another: a mapping for `reward=` with `first` at a weight that
    falls from 1 to 0, and `second` at one that rises from 0 to 1.

    An episode's weights are read when it begins, so each is paid one mixture throughout. If both
    designs preserve the return, as terminal and delta do, the mixture does too. The optimum then
    never moves; what changes is how early the signal arrives. Any other pair passes from one
    optimum to the other.

    Published evidence points both ways. Fading dense rewards out leaves the outcome alone in charge
    at the end (Atom-Searcher 2025); paying more of the score densely did better throughout (Chan et
    al. 2024, arXiv 2402.00782). Swap the arguments for the other direction.

    Args:
        first: a design's name, a term or a function, paid alone up to `start`.
        second: likewise, paid alone from `start + tokens` on.
        tokens: the length of the passage, in tokens that the env has seen; 1 or more.
        start: tokens seen before the passage begins; 0 or more.
    """
    for argument, value, least in (("tokens", tokens, 1), ("start", start, 0)):
        if value < least:
            raise InvalidArgument(f"{argument}={value} is not allowed; it must be {least} or more.")
    names = [_name(first), _name(second)]
    if names[0] == names[1]:
        raise InvalidArgument(
            f"first and second are both called {names[0]!r}; give one of the terms another name."
        )
    return {
        names[0]: (first, Ramp(1.0, 0.0, start, tokens)),
        names[1]: (second, Ramp(0.0, 1.0, start, tokens)),
    }


def _name(design: Part) -> str:
    if isinstance(design, str):
        return design
    name = design.name if isinstance(design, RewardTerm) else Rule.name
    return name or type(design).__name__.lower()
