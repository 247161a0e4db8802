"""Where a run of so many tokens ends: in the middle of a batch, which learns from what has ended.

Texts that run are counted in the tokens seen, and only ended ones are learned from. So a run that
went on until its last batch were full would go beyond its end by up to that batch.
"""

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Protocol


class HasResponse(Protocol):
    """A text that has ended."""

    @property
    def response(self) -> Sized:
        """Its tokens."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a run, and whether the batch that is being collected reaches to it."""

    total: float = math.inf
    """Tokens seen at which a batch ends, however little has ended by then: one group at least."""
    is_last: bool = False
    """Whether the batch takes all that ends before `total`, however much that is."""

    @classmethod
    def of(cls, total: float, seen: int, batch_tokens: int) -> "Ending":
        """Return the ending for the batch that begins when `seen` tokens have been seen.

        It is the last one where less than one and a half batches are left. The last batch thus
        holds about half a batch to one and a half, where the run has a batch at all.
        """
        return cls(total, is_last=total - seen < 1.5 * batch_tokens)

    def is_open(self, num_tokens: int, ended: Sequence[HasResponse], seen: int) -> bool:
        """Return whether a batch of `num_tokens` goes on, with these texts and tokens seen.

        Once it is False it stays so, whatever is added: a batch that is interrupted and gone on
        with is the same batch.
        """
        if not ended:
            return True
        return self.left(num_tokens, ended, seen) > 0

    def left(self, num_tokens: int, ended: Sequence[HasResponse], seen: int) -> float:
        """Return how many tokens more end a batch of `num_tokens` that has a text; 0 or less where
        it has ended."""
        until_end = self.total - seen
        if self.is_last:
            return until_end
        return min(until_end, num_tokens - sum(len(text.response) for text in ended))


def no_listener(tokens_seen: int) -> None:
    """Do nothing with the tokens seen."""
