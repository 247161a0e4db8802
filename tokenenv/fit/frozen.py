"""What a frozen model says of texts, computed once and kept."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenenv.fit.examples import Text

Advance = Callable[[int], object]
"""Is told how many more texts were read."""
LARGE = 2**30
"""Bytes from which on what is kept is logged as a warning, which Python shows even where nobody has
set up logging."""

logger = logging.getLogger("tokenenv")


class Kept:
    """Rows of numbers for each of some texts, one for the prompt and one for each response token.

    Texts are told apart as objects: the same tokens in another `Text` are another text.
    """

    def __init__(self) -> None:
        self._rows: dict[Text, Tensor] = {}

    def has(self, texts: Sequence[Text]) -> bool:
        """Return whether the rows of all these texts are here."""
        return all(text in self._rows for text in texts)

    def missing(self, texts: Sequence[Text]) -> list[Text]:
        """Return the texts whose rows are not here, each once."""
        return [text for text in dict.fromkeys(texts) if text not in self._rows]

    def rows(self, texts: Sequence[Text]) -> Tensor:
        """Return the rows (K, ...) of texts that are here, one text after another, on the CPU."""
        return torch.cat([self._rows[text] for text in texts])

    @torch.no_grad()
    def add(
        self,
        texts: Sequence[Text],
        compute: Callable[[Sequence[Text]], Tensor],
        groups: Sequence[Sequence[int] | np.ndarray],
        what: str,
        advance: Advance | None = None,
    ) -> None:
        """Compute the rows of texts, a group of them at a time, and keep them on the CPU.

        Args:
            texts: any number, each once.
            compute: maps texts to their rows (K, ...), one text after another.
            groups: the numbers of the texts of each forward; each text is in one group.
            what: the name of the rows, for the log.
            advance: is called with the number of texts of each group.
        """
        num_rows = sum(map(_count, texts))
        block, start = torch.empty(0), 0
        for number, group in enumerate(groups):
            members = [texts[i] for i in group]
            found = compute(members)
            if number == 0:
                _report(what, num_rows * found[0].nbytes, len(texts))
                # One piece of memory, so that what was said is all that is taken.
                block = torch.empty(num_rows, *found.shape[1:], dtype=found.dtype)
            for text, rows in zip(members, found.split([*map(_count, members)]), strict=True):
                self._rows[text] = block[start : start + len(rows)].copy_(rows)
                start += len(rows)
            if advance is not None:
                advance(len(members))


def _count(text: Text) -> int:
    return len(text.response) + 1


def _report(what: str, size: int, num_texts: int) -> None:
    """Log what is going to be taken."""
    level = logging.WARNING if size >= LARGE else logging.INFO
    logger.log(level, "%s: %d texts will take %.1f MiB of memory", what, num_texts, size / 2**20)
