"""Texts that an environment writes into: what it is asked, and what it answers.

A response is made of *segments*: tokens that the policy emitted, and tokens that the environment
wrote after them. The policy's tokens between two such writings are a *turn*.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Consecutive response tokens that have one author."""

    own: bool
    """Whether the policy emitted them. A prefix that `reset` was given counts as the policy's, but
    for the tokens that it was told are not."""
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the environment does after a token of the policy's."""

    tokens: Sequence[int] | str = ()
    """What it writes behind the text: token ids, or a text for the task's tokenizer (which adds no
    special tokens). It may be empty."""
    reward: float = 0.0
    """The task's own reward for the turn, which `reward="turn"` pays. Finite."""
    ends: bool = False
    """Whether the text ends here, by the task's own decision: it is then terminated. Without it a
    text that has been answered goes on, also after a stop token."""


@dataclass(frozen=True, slots=True)
class TextSoFar:
    """A text that has just been given a token by the policy."""

    prompt: list[int]
    """Token ids."""
    segments: list[Segment]
    """The response in segments, the last of which is the policy's."""
    tokenizer: Any = None
    """The task's tokenizer; None where tokens have no text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to the prompt, by name."""
    seed: int = 0
    """A number of this episode's own."""

    @property
    def response(self) -> list[int]:
        """The response's token ids, whoever wrote them."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def turn(self) -> list[int]:
        """The policy's tokens since the environment wrote last."""
        return self.segments[-1].tokens

    @property
    def turns_before(self) -> int:
        """How many turns of the policy's came before this one."""
        return sum(segment.own for segment in self.segments) - 1

    def rng(self) -> np.random.Generator:
        """Return a generator that is a function of the episode's seed and of the length of the
        response: asked again about the same text, the environment draws the same numbers."""
        length = sum(len(segment.tokens) for segment in self.segments)
        return np.random.default_rng([self.seed, length])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


Respond = Callable[[TextSoFar], Reply | None]
"""What a task's environment is: it is asked after tokens of the policy's, and returns None where it
has nothing to say. It must be a function of what it is given."""


def segments_of(response: Sequence[int] | np.ndarray, own: np.ndarray | None) -> list[Segment]:
    """Return a response (R,) in segments, by the mask `own` (R,) bool of the policy's tokens; None
    is the policy's alone."""
    ids = np.asarray(response, dtype=np.int64)
    if not len(ids):
        return []
    if own is None:
        return [Segment(True, ids.tolist())]
    mask = np.asarray(own, dtype=bool)
    starts = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    return [
        Segment(bool(mask[start]), ids[start:end].tolist())
        for start, end in itertools.pairwise(starts)
    ]


def readable(segments: Sequence[Segment], texts: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return segments as a rule of the user's reads them: {"own": bool, "text": str} each, with
    their `texts`; where tokens have no text (None), {"own": bool, "tokens": [...]}."""
    if texts is None:
        return [{"own": own, "tokens": list(tokens)} for own, tokens in segments]
    return [{"own": s.own, "text": text} for s, text in zip(segments, texts, strict=True)]


def turn_numbers(positions: np.ndarray) -> np.ndarray:
    """Return the number of the turn, from 0, of each token of the policy's, from their places in
    the text (..., T) int64: a turn goes on while places follow one another."""
    steps = np.diff(positions, axis=-1) != 1
    first = np.zeros((*positions.shape[:-1], min(1, positions.shape[-1])), dtype=np.int64)
    return np.concatenate([first, steps.cumsum(-1)], -1)
