"""Single tokens as text."""

from collections.abc import Iterable
from typing import Any


class TokenPieces:
    """Shows tokens one by one, as what each adds to a text.

    The pieces of a text, joined, are the text, except for a character that several tokens make up.
    A space before a word belongs to the word. Special tokens are shown by name. Without a tokenizer
    a token is shown as its id.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        if tokenizer is not None:
            special = set(tokenizer.all_special_ids)
            self._first = next(i for i in range(len(tokenizer)) if i not in special)
            self._skip = len(tokenizer.decode([self._first]))

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """Return one piece for each id."""
        return [self._piece(int(i)) for i in ids]

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode(token)
        return self._pieces[token]

    def _decode(self, token: int) -> str:
        if self._tokenizer is None:
            return f" {token}"
        # Decoded behind another token, because many tokenizers decode the first word of a text
        # without its space.
        return self._tokenizer.decode([self._first, token])[self._skip :]
