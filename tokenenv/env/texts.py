"""N running texts, on the host and on the device: their tokens, and who wrote them."""

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.seen import RunningTexts, WholeTexts
from tokenenv.tables import Columns
from tokenenv.turns import TextSoFar, segments_of
from tokenenv.types import Slots

ARRAYS = ("tokens", "length", "prompt_length", "prefix_length")
"""The arrays of a `TextBuffer` that make up its texts."""
WITH_REPLIES = ("written", "seed")
"""Further arrays, where the environment writes into texts."""
EMPTY: Mapping[int, Any] = MappingProxyType({})


class TextBuffer:
    """The tokens (N, L) of the texts in N slots, right-padded, with their lengths.

    The host's arrays are the original. The host sees every token once, when it is checked, so no
    later step has to copy texts back from the device. On a GPU a copy of the tokens is kept there,
    and every change is made in both.
    """

    def __init__(
        self,
        num_rows: int,
        max_length: int,
        pad_token_id: int,
        device: torch.device,
        responds: bool = False,
    ) -> None:
        self.tokens = np.full((num_rows, max_length), pad_token_id, dtype=np.int64)
        self.length = np.zeros(num_rows, dtype=np.int64)
        self.prompt_length = np.zeros(num_rows, dtype=np.int64)
        self.prefix_length = np.zeros(num_rows, dtype=np.int64)
        self.columns = np.full(num_rows, {}, dtype=object)
        """(N,) of mappings: what belongs to the prompt of each text (`Task.columns`)."""
        self.written = np.zeros((num_rows, max_length), dtype=bool) if responds else None
        """(N, L): the tokens that the environment wrote, or that a prefix has in their place; None
        where it never writes."""
        self.seed = np.zeros(num_rows, dtype=np.int64)
        """(N,) a number of each text's own, for what the environment writes."""
        self._slots = np.arange(num_rows)
        self._arrays = (*ARRAYS, *(WITH_REPLIES if responds else ()))
        self.device = device
        self._pad = pad_token_id
        self._mirror = None if device.type == "cpu" else torch.from_numpy(self.tokens).to(device)

    @property
    def steps(self) -> np.ndarray:
        """(N,) int64: tokens of the policy's so far, a prefix included."""
        response = self.length - self.prompt_length
        return response if self.written is None else response - self.written.sum(1)

    @property
    def own_mask(self) -> np.ndarray:
        """(N, L) int8: 1 on the tokens that actions have emitted."""
        assert self.written is not None
        place = np.arange(self.tokens.shape[1])
        first = (self.prompt_length + self.prefix_length)[:, None]
        emitted = (place >= first) & (place < self.length[:, None]) & ~self.written
        return emitted.astype(np.int8)

    def append(self, tokens: np.ndarray, active: np.ndarray) -> None:
        """Add tokens (N,) of the policy's to the texts of the slots where `active` (N,)."""
        rows = self._slots if active.all() else np.flatnonzero(active)
        position = self.length[rows]
        # One number for each place is written to in two thirds of the time.
        self.tokens.reshape(-1)[rows * self.tokens.shape[1] + position] = tokens[rows]
        self.length += active
        if self._mirror is not None:
            self._mirror[self.upload(rows), self.upload(position)] = self.upload(tokens[rows])

    def write(self, slots: np.ndarray, replies: Sequence[Sequence[int]]) -> None:
        """Add what the environment writes, 1 or more tokens each, to the texts of `slots` (n,)."""
        assert self.written is not None
        for slot, ids in zip(slots, replies, strict=True):
            places = slice(self.length[slot], self.length[slot] + len(ids))
            self.tokens[slot, places], self.written[slot, places] = ids, True
            self.length[slot] = places.stop
        self._refresh(slots)

    def restart(
        self,
        slots: np.ndarray,
        prompts: Sequence[Sequence[int]],
        which: np.ndarray,
        columns: Sequence[Columns] = (),
        prefixes: Mapping[int, Sequence[int]] = EMPTY,
        prefix_own: Mapping[int, Sequence[bool]] = EMPTY,
        seeds: Sequence[int] = (),
    ) -> None:
        """Begin new texts in `slots` (n,).

        Args:
            slots: (n,) int64.
            prompts: m different ones.
            which: (n,) int64, the prompt of each text.
            columns: what belongs to each text's prompt; empty where nothing does.
            prefixes: the beginnings of responses, by slot; they are not own.
            prefix_own: where the environment writes, which tokens of a prefix count as the
                policy's, by slot; by default all.
            seeds: where the environment writes, a number of each text's own.
        """
        # Prompts are read once each, not once a text: all texts of a task may share one.
        lengths = np.asarray([len(ids) for ids in prompts])
        table = np.full((len(prompts), lengths.max()), self._pad, dtype=np.int64)
        for row, ids in zip(table, prompts, strict=True):
            row[: len(ids)] = ids
        self.tokens[slots] = self._pad
        self.tokens[slots, : table.shape[1]] = table[which]
        self.prompt_length[slots] = self.length[slots] = lengths[which]
        self.prefix_length[slots] = 0
        self.columns[slots] = list(columns) or {}
        if self.written is not None:
            self.seed[slots], self.written[slots] = seeds, False
        for slot, prefix in prefixes.items():
            self._put_prefix(slot, prefix, prefix_own.get(slot, ()))
        self._refresh(slots)

    def _put_prefix(self, slot: int, ids: Sequence[int], own: Sequence[bool]) -> None:
        start = self.prompt_length[slot]
        self.tokens[slot, start : start + len(ids)] = ids
        self.prefix_length[slot], self.length[slot] = len(ids), start + len(ids)
        if self.written is not None:
            self.written[slot, start : start + len(own)] = ~np.asarray(own, dtype=bool)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy the texts of `sources` onto the slots `targets`. What the environment will write
        into a copy is drawn anew, by a seed that both slots have a part in."""
        source, target = np.asarray(sources), np.asarray(targets)
        seeds = self.seed[target]
        if self.written is not None:
            pairs = zip(self.seed[source], seeds, source == target, strict=True)
            seeds = np.asarray([b if same else mix(a, b) for a, b, same in pairs], dtype=np.int64)
        for name in (*self._arrays, "columns"):
            array = getattr(self, name)
            array[target] = array[source]
        self.seed[target] = seeds
        self._refresh(targets)

    def save(self, slots: Slots) -> dict[str, Any]:
        """Return copies of the arrays of `slots`, by name, and of their columns."""
        arrays = {name: getattr(self, name)[slots].copy() for name in self._arrays}
        return arrays | {"columns": copy.deepcopy(self.columns[slots].tolist())}

    def load(self, slots: Slots, saved: dict[str, Any]) -> None:
        """Put saved texts into `slots`."""
        for name in self._arrays:
            getattr(self, name)[slots] = saved[name]
        for slot, columns in zip(slots, saved["columns"], strict=True):
            self.columns[slot] = copy.deepcopy(columns)
        self._refresh(slots)

    def whole(self, slots: Slots, width: int | None = None) -> WholeTexts:
        """Return the texts of `slots` (n,) as they stand, as copies, without what stands behind
        their first `width` tokens (None: L)."""
        rows = np.asarray(slots)
        ids = self.tokens[rows, :width]
        return WholeTexts(
            # On the CPU these are one copy, which nobody writes into.
            tokens=torch.from_numpy(ids).to(self.device, non_blocking=True),
            length=self.length[rows],
            prompt_length=self.prompt_length[rows],
            prefix_length=self.prefix_length[rows],
            ids=ids,
            columns=self.columns[rows].tolist(),
            written=self._written_in(rows),
        )

    def _written_in(self, rows: np.ndarray) -> np.ndarray | None:
        """What the environment wrote in the texts `rows`, (n, L); None where it is nothing."""
        if self.written is None or not self.written[rows].any():
            return None
        return self.written[rows]

    def so_far(self, slot: int, tokenizer: Any) -> TextSoFar:
        """Return the text of a slot as `Task.respond` is given it."""
        assert self.written is not None
        start, end = self.prompt_length[slot], self.length[slot]
        return TextSoFar(
            self.tokens[slot, :start].tolist(),
            segments_of(self.tokens[slot, start:end], ~self.written[slot, start:end]),
            tokenizer,
            self.columns[slot],
            int(self.seed[slot]),
        )

    def running(self, tokenizer: object) -> RunningTexts:
        """Return all N texts as they stand, for terms that read them on the host. Lengths are
        copied, tokens are not: later ones are written behind these."""
        lengths = self.prompt_length.copy(), self.length.copy()
        return RunningTexts(
            self.tokens, self._slots, *lengths, tokenizer, self.columns, self.written
        )

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


def mix(*numbers: int) -> int:
    """Return a seed, 0 or more, that is a function of other ones."""
    state = np.random.SeedSequence([int(number) for number in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


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
