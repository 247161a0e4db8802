"""N running texts: prompt and response tokens, on the host and on the device."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.seen import RunningTexts, WholeTexts
from tokenenv.tables import Columns
from tokenenv.types import Slots

ARRAYS = ("tokens", "length", "prompt_length", "prefix_length")
"""The arrays of a `TextBuffer` that make up its texts."""


class TextBuffer:
    """The tokens (N, L) of the texts in N slots, right-padded, with their lengths.

    The host's arrays are the original. The host sees every token once, when it is checked, so no
    later step has to copy texts back from the device. On a GPU a copy of the tokens is kept there,
    and every change is made in both.
    """

    def __init__(
        self, num_rows: int, max_length: int, pad_token_id: int, device: torch.device
    ) -> None:
        self.tokens = np.full((num_rows, max_length), pad_token_id, dtype=np.int64)
        self.length = np.zeros(num_rows, dtype=np.int64)
        self.prompt_length = np.zeros(num_rows, dtype=np.int64)
        self.prefix_length = np.zeros(num_rows, dtype=np.int64)
        self.columns = np.full(num_rows, {}, dtype=object)
        """(N,) of mappings: what belongs to the prompt of each text (`Task.columns`)."""
        self.device = device
        self._pad = pad_token_id
        self._mirror = None if device.type == "cpu" else torch.from_numpy(self.tokens).to(device)

    @property
    def response_length(self) -> np.ndarray:
        """(N,) int64: response tokens so far, a prefix included."""
        return self.length - self.prompt_length

    def append(self, tokens: np.ndarray, active: np.ndarray) -> None:
        """Add tokens (N,) to the texts of the slots where `active` (N,)."""
        rows = np.flatnonzero(active)
        position = self.length[rows]
        self.tokens[rows, position] = tokens[rows]
        self.length[rows] += 1
        if self._mirror is not None:
            self._mirror[self.upload(rows), self.upload(position)] = self.upload(tokens[rows])

    def restart(
        self,
        slots: Slots,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]],
        columns: Sequence[Columns],
    ) -> None:
        """Begin new texts in `slots`; a prefix is the beginning of the response and is not own."""
        rows = np.asarray(slots)
        for row, one in zip(rows, columns, strict=True):
            self.columns[row] = one
        self.prompt_length[rows] = list(map(len, prompts))
        self.prefix_length[rows] = list(map(len, prefixes))
        self.length[rows] = self.prompt_length[rows] + self.prefix_length[rows]
        fresh = np.full((len(rows), self.tokens.shape[1]), self._pad, dtype=np.int64)
        given = chain.from_iterable(chain.from_iterable(zip(prompts, prefixes, strict=True)))
        fresh[np.arange(fresh.shape[1]) < self.length[rows, None]] = np.fromiter(given, np.int64)
        self.tokens[rows] = fresh
        self._refresh(slots)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy the texts of `sources` onto the slots `targets`."""
        for name in (*ARRAYS, "columns"):
            array = getattr(self, name)
            array[targets] = array[sources]
        self._refresh(targets)

    def save(self, slots: Slots) -> dict[str, Any]:
        """Return copies of the arrays of `slots`, by name, and of their columns."""
        arrays = {name: getattr(self, name)[slots].copy() for name in ARRAYS}
        return arrays | {"columns": copy.deepcopy(self.columns[slots].tolist())}

    def load(self, slots: Slots, saved: dict[str, Any]) -> None:
        """Put saved texts into `slots`."""
        for name in ARRAYS:
            getattr(self, name)[slots] = saved[name]
        for slot, columns in zip(slots, saved["columns"], strict=True):
            self.columns[slot] = copy.deepcopy(columns)
        self._refresh(slots)

    def whole(self, slots: Slots) -> WholeTexts:
        """Return the texts of `slots` (n,) as they stand, as copies."""
        rows = np.asarray(slots)
        ids = self.tokens[rows]
        return WholeTexts(
            tokens=self.upload(ids),
            length=self.length[rows],
            prompt_length=self.prompt_length[rows],
            prefix_length=self.prefix_length[rows],
            ids=ids,
            columns=self.columns[rows].tolist(),
        )

    def running(self, tokenizer: object) -> RunningTexts:
        """Return all N texts as they stand, for terms that read them on the host. Lengths are
        copied, tokens are not: later ones are written behind these."""
        slots = np.arange(len(self.tokens))
        lengths = self.prompt_length.copy(), self.length.copy()
        return RunningTexts(self.tokens, slots, *lengths, tokenizer, self.columns)

    def device_tokens(self) -> Tensor:
        """Return a fresh copy of the tokens (N, L) on the device."""
        return self.upload(self.tokens) if self._mirror is None else self._mirror.clone()

    def upload(self, array: np.ndarray) -> Tensor:
        """Return a copy of a host array on the device, without waiting for the device."""
        return to_device(array, self.device)

    def _refresh(self, slots: Slots) -> None:
        if self._mirror is not None:
            rows = np.asarray(slots)
            self._mirror[self.upload(rows)] = self.upload(self.tokens[rows])


def decode(observation: Any, tokenizer: Any) -> list[str]:
    """Return the texts, prompt and response, of a token observation, batched or of one text."""
    if tokenizer is None or not isinstance(observation, Mapping):
        raise InvalidArgument(
            "decode needs a token observation, and a task whose tokens have text."
        )
    tokens, lengths = (
        value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for value in (observation.get("tokens"), observation.get("length"))
    )
    whole = tokens.dtype.kind in "iu" and lengths.dtype.kind in "iu"
    if not whole or tokens.shape[:-1] != lengths.shape:
        raise InvalidArgument(
            "decode needs the tokens and length of an observation; these are no such arrays."
        )
    texts = zip(np.atleast_2d(tokens), np.atleast_1d(lengths), strict=True)
    rows = [row[:length].tolist() for row, length in texts]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of a host array on the device, without waiting for the device."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
