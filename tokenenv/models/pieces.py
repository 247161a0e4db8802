"""Single tokens as text."""

from collections.abc import Iterable
from typing import Any


class TokenPieces:
    """What each token adds to a text: joined, they are the text (a character that several tokens
    make up aside).

    A space before a word belongs to it; special tokens are shown by name; without a tokenizer a
    token is its id.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        if tokenizer is not None:
            special = set(tokenizer.all_special_ids)
            self._first = next(i for i in range(len(tokenizer)) if i not in special)
            self._skip = len(tokenizer.decode([self._first]))

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """One piece for each id."""
        return [self._piece(int(i)) for i in ids]

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode(token)
        return self._pieces[token]

    def _decode(self, token: int) -> str:
        if self._tokenizer is None:
            return f" {token}"
        # After another token, as the first word of a text is decoded without its space.
        return self._tokenizer.decode([self._first, token])[self._skip :]
