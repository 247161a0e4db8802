"""What a frozen model says of texts, computed once and kept."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenenv.fit.examples import Text

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

    def rows(self, texts: Sequence[Text], device: torch.device) -> Tensor:
        """Return the rows (K, ...) of texts that are here, one text after another."""
        return torch.cat([self._rows[text] for text in texts]).to(device)

    @torch.no_grad()
    def add(
        self,
        texts: Sequence[Text],
        compute: Callable[[Sequence[Text]], Tensor],
        groups: Sequence[Sequence[int]],
        what: str,
    ) -> None:
        """Compute the rows of texts, a group of them at a time, and keep them on the CPU.

        Args:
            texts: any number; those that are here already are computed again.
            compute: maps texts to their rows (K, ...), one text after another.
            groups: the numbers of the texts of each forward.
            what: the name of the rows, for the log.
        """
        num_rows = sum(len(text.response) + 1 for text in texts)
        for number, group in enumerate(groups):
            members = [texts[i] for i in group]
            found = compute(members)
            if number == 0:
                # Logged before the memory is taken.
                _report(what, num_rows * found[0].nbytes, len(texts))
                block = torch.empty(num_rows, *found.shape[1:], dtype=found.dtype)
                start = 0
            for text, rows in zip(members, found.split(_counts(members)), strict=True):
                kept = block[start : start + len(rows)]
                self._rows[text] = kept.copy_(rows)
                start += len(rows)


def _counts(texts: Sequence[Text]) -> list[int]:
    return [len(text.response) + 1 for text in texts]


def _report(what: str, size: int, num_texts: int) -> None:
    level = logging.WARNING if size >= LARGE else logging.INFO
    logger.log(level, "%s of %d texts take %.1f MiB", what, num_texts, size / 2**20)
