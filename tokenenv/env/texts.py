"""N running texts: prompt and response tokens, on the host and on the device."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tokenenv.rewards.term import FinishedTexts, RunningTexts
from tokenenv.types import Slots


class TextBuffer:
    """Right-padded tokens (N, L) with each row's lengths.

    The host's arrays are the truth: the host sees every token once, when it is checked, so no later
    step has to copy texts back. On a CPU the device's tensor is the same memory; elsewhere it is
    kept up beside it.
    """

    def __init__(
        self, num_rows: int, max_length: int, pad_token_id: int, device: torch.device
    ) -> None:
        self.tokens = np.full((num_rows, max_length), pad_token_id, dtype=np.int64)
        self.length = np.zeros(num_rows, dtype=np.int64)
        self.prompt_length = np.zeros(num_rows, dtype=np.int64)
        self.prefix_length = np.zeros(num_rows, dtype=np.int64)
        self.device = device
        self._pad = pad_token_id
        self._mirror = None if device.type == "cpu" else torch.from_numpy(self.tokens).to(device)

    @property
    def response_length(self) -> np.ndarray:
        """(N,) int64: response tokens so far, a prefix included."""
        return self.length - self.prompt_length

    def append(self, tokens: np.ndarray, active: np.ndarray) -> None:
        """Adds tokens (N,) to the rows where `active` (N,)."""
        rows = np.flatnonzero(active)
        position = self.length[rows]
        self.tokens[rows, position] = tokens[rows]
        self.length[rows] += 1
        if self._mirror is not None:
            self._mirror[self.upload(rows), self.upload(position)] = self.upload(tokens[rows])

    def restart(
        self, slots: Slots, prompts: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]]
    ) -> None:
        """Begins new texts in `slots`; a prefix is the beginning of the response and earns
        nothing."""
        rows = np.asarray(slots)
        self.prompt_length[rows] = list(map(len, prompts))
        self.prefix_length[rows] = list(map(len, prefixes))
        self.length[rows] = self.prompt_length[rows] + self.prefix_length[rows]
        fresh = np.full((len(rows), self.tokens.shape[1]), self._pad, dtype=np.int64)
        given = chain.from_iterable(chain.from_iterable(zip(prompts, prefixes, strict=True)))
        fresh[np.arange(fresh.shape[1]) < self.length[rows, None]] = np.fromiter(given, np.int64)
        self.tokens[rows] = fresh
        self._refresh(slots)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copies rows."""
        for array in (self.tokens, self.length, self.prompt_length, self.prefix_length):
            array[targets] = array[sources]
        self._refresh(targets)

    def save(self, slots: Slots) -> dict[str, np.ndarray]:
        """Copies of `slots`' rows, by name."""
        names = ("tokens", "length", "prompt_length", "prefix_length")
        return {name: getattr(self, name)[slots].copy() for name in names}

    def load(self, slots: Slots, rows: dict[str, np.ndarray]) -> None:
        """Puts saved rows into `slots`."""
        for name, values in rows.items():
            getattr(self, name)[slots] = values
        self._refresh(slots)

    def rows(self, slots: Slots) -> tuple[Tensor, list[int]]:
        """The tokens of `slots` (n, longest) on the device, and their lengths."""
        lengths = self.length[slots]
        return self.upload(self.tokens[slots, : lengths.max()]), lengths.tolist()

    def finished(self, slots: np.ndarray, score: Tensor | None, tokenizer: object) -> FinishedTexts:
        """The texts of `slots` as reward terms see them."""
        ids = self.tokens[slots]
        return FinishedTexts(
            tokens=self.upload(ids),
            length=self.length[slots],
            prompt_length=self.prompt_length[slots],
            prefix_length=self.prefix_length[slots],
            score=score,
            ids=ids,
            tokenizer=tokenizer,
        )

    def running(self, slots: Slots, tokenizer: object) -> RunningTexts:
        """The texts of `slots` as they stand. Lengths are copied, tokens are not: later ones are
        written behind these."""
        rows = np.asarray(slots)
        lengths = self.prompt_length[rows], self.length[rows]
        return RunningTexts(self.tokens, rows, *lengths, tokenizer)

    def device_tokens(self) -> Tensor:
        """A fresh copy of the tokens (N, L) on the device."""
        return self.upload(self.tokens) if self._mirror is None else self._mirror.clone()

    def upload(self, array: np.ndarray) -> Tensor:
        """A copy of a host array on the device, which is not waited for."""
        if self.device.type == "cpu":
            return torch.from_numpy(array.copy())
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def _refresh(self, slots: Slots) -> None:
        if self._mirror is not None:
            rows = np.asarray(slots)
            self._mirror[self.upload(rows)] = self.upload(self.tokens[rows])
