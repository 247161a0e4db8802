"""N slots without keys and values: each state is computed from the slot's whole text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batching import hidden_states, in_micro_batches, in_order, micro_batches, upload


class TextSlots:
    """N slots of token ids: the slow way to run a `CachedLM`, for models that cannot be cached per
    slot. It has the methods of `KVSlots`."""

    def __init__(self, trunk: Any, num_slots: int, max_length: int, max_batch_tokens: int):
        self.trunk = trunk
        self.max_batch_tokens = max_batch_tokens
        self.tokens = torch.zeros(num_slots, max_length, dtype=torch.int64, device=trunk.device)

    @property
    def nbytes(self) -> int:
        """The bytes of the stored token ids."""
        return self.tokens.nbytes

    def prefill(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Put `tokens` (B, L) at places 0..L-1 of `slots` (B,), and return all states (B, L, H)."""
        self.tokens[slots, : tokens.shape[1]] = tokens
        states = hidden_states(self.trunk, tokens, [tokens.shape[1]] * len(tokens))
        # Only a forward tells the size and dtype of a state, and `append` may have to return states
        # without one.
        self.blank = torch.zeros_like(states[0, :1])
        return states

    def append(self, tokens: Tensor, positions: np.ndarray, moving: np.ndarray) -> Tensor:
        """Put `tokens` (N,) at `positions` (N,) of the slots that are `moving` (N,), and return the
        states (N, H), zero in the other slots."""
        states = self.blank.repeat(len(tokens), 1)
        if moving.any():
            slots = np.flatnonzero(moving)
            at = upload(slots, tokens.device)
            self.tokens[at, upload(positions[slots], tokens.device)] = tokens[at]
            states[at] = self._last_states(slots, positions[slots] + 1)
        return states

    def _last_states(self, slots: np.ndarray, lengths: np.ndarray) -> Tensor:
        def forward(group: np.ndarray, width: int) -> Tensor:
            texts = self.tokens[upload(slots[group], self.tokens.device), :width]
            return hidden_states(self.trunk, texts, lengths[group])

        return in_micro_batches(forward, lengths, self.max_batch_tokens)

    def extend(
        self, slots: Tensor, tokens: Tensor, starts: np.ndarray, lengths: np.ndarray
    ) -> Tensor:
        """Put right-padded `tokens` (B, K) behind the first `starts` (B,) tokens of `slots` (B,),
        `lengths` (B,) of them. Return the states (B, K, H) after each; those to the right of a
        row's last token mean nothing."""
        new, ends = np.arange(tokens.shape[1]), starts + lengths
        places = np.minimum(starts[:, None] + new, ends[:, None] - 1)
        stored = np.nonzero(new < lengths[:, None])
        row, column, at = (upload(i, tokens.device) for i in (*stored, places[stored]))
        self.tokens[slots[row], at] = tokens[row, column]

        def states(group: np.ndarray) -> Tensor:
            texts = self.tokens[slots[upload(group, tokens.device)], : int(ends[group].max())]
            where = upload(places[group], tokens.device)[:, :, None]
            found = hidden_states(self.trunk, texts, ends[group])
            return found.gather(1, where.expand(-1, -1, found.shape[-1]))

        groups = micro_batches(ends, self.max_batch_tokens)
        return in_order([states(group) for group in groups], groups)

    def fork(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` tokens of slots `sources` onto slots `targets`, (n,) each."""
        self.tokens[targets, :width] = self.tokens[sources, :width]
