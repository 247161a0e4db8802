"""N rows without keys and values: every state is computed from the row's whole text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batching import hidden_states, in_micro_batches, upload


class TextSlots:
    """The fallback for models that cannot be cached per row; same methods as `KVSlots`."""

    def __init__(self, trunk: Any, num_slots: int, max_length: int, max_batch_tokens: int):
        self.trunk = trunk
        self.max_batch_tokens = max_batch_tokens
        self.tokens = torch.zeros(num_slots, max_length, dtype=torch.int64, device=trunk.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return self.tokens.nbytes

    def prefill(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Puts `tokens` (B, L) at positions 0..L-1 of `slots` (B,); returns all states (B, L,
        H)."""
        self.tokens[slots, : tokens.shape[1]] = tokens
        states = hidden_states(self.trunk, tokens, [tokens.shape[1]] * len(tokens))
        self.blank = torch.zeros_like(states[0, :1])
        return states

    def append(self, tokens: Tensor, positions: np.ndarray, moving: np.ndarray) -> Tensor:
        """Puts `tokens` (N,) at `positions` (N,) where `moving`; returns states (N, H), zero
        elsewhere."""
        states = self.blank.repeat(len(tokens), 1)
        if moving.any():
            rows = np.flatnonzero(moving)
            at = upload(rows, tokens.device)
            self.tokens[at, upload(positions[rows], tokens.device)] = tokens[at]
            states[at] = self._last_states(rows, positions[rows] + 1)
        return states

    def _last_states(self, rows: np.ndarray, lengths: np.ndarray) -> Tensor:
        def forward(group: np.ndarray, width: int) -> Tensor:
            texts = self.tokens[upload(rows[group], self.tokens.device), :width]
            return hidden_states(self.trunk, texts, lengths[group])

        return in_micro_batches(forward, lengths, self.max_batch_tokens)

    def fork(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copies the first `width` tokens of rows `sources` onto rows `targets`."""
        self.tokens[targets, :width] = self.tokens[sources, :width]
