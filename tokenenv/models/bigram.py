"""A bigram language model: the probabilities of the next token in a table, looked up by the last
token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument
from tokenenv.types import Slots

from .batching import last_states, table_entries


class Bigram(nn.Module):
    """A bigram language model (a `TokenModel`): p(next token | last token) as a table.

    A state is the number of a row of the table, (K,) int64: the token that was read last, or V
    after the first token of a text, whatever it is. So the first token is a prompt that says
    nothing, and the beginning of a text is told from the same token later on.

    Args:
        probs: (V + 1, V) float64, positive, each row summing to 1. The last row is the beginning.
        device: where tokens are taken and states returned.

    Raises:
        InvalidArgument: `probs` is no such table. Zeros are refused, because the KL term would pay
            the log of them, which is -inf.
    """

    logprobs: Tensor
    """(V + 1, V) float32, in nats."""

    def __init__(self, probs: np.ndarray, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.probs = np.asarray(probs, dtype=np.float64)
        if self.probs.ndim != 2 or self.probs.shape[0] != self.probs.shape[1] + 1:
            raise InvalidArgument(f"probs of shape {self.probs.shape}; allowed: (V + 1, V).")
        if not (self.probs > 0).all() or np.abs(self.probs.sum(1) - 1).max() > 1e-9:
            raise InvalidArgument("probs must be positive and each of its rows sum to 1.")
        # The logarithm is taken in float64 and rounded once.
        logprobs = torch.from_numpy(np.log(self.probs)).float().to(device)
        self.register_buffer("logprobs", logprobs, persistent=False)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.probs.shape[1]

    @property
    def device(self) -> torch.device:
        """The device where tokens are taken and states returned."""
        return self.logprobs.device

    def slots(self, num_slots: int, max_length: int) -> "BigramSlots":
        """Make slots for running texts, of any number and length."""
        return BigramSlots(self)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts: right-padded `tokens` (B, L) to states (B, L) int64, in which state t
        has read tokens 0..t."""
        states = self.ids(tokens)
        states[:, 0] = self.vocab_size
        return states

    def head(self, states: Tensor) -> Tensor:
        """Return the log-probs (K, V) float32 of the next token after `states` (K,)."""
        return self.logprobs[states]

    def logprob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return log p(token | state), (K,) float32 in nats, without making all (K, V) of them."""
        return table_entries(self.logprobs, states, tokens)

    def ids(self, tokens: Tensor) -> Tensor:
        """Return a copy of token ids on the device. Ids beyond V are read as the last one: an index
        out of range ends a CUDA process."""
        return tokens.to(self.device, non_blocking=True).clamp(0, self.vocab_size - 1)


class BigramSlots:
    """Slots for running texts (a `SlotModel`). Nothing has to be kept of a text: its state is the
    token that was just read."""

    def __init__(self, model: Bigram) -> None:
        self.model = model

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the state (n,) after each of the right-padded `tokens` (n, <=L)."""
        return last_states(self.states(tokens, lengths), lengths)

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Return the states (N,) after one more token (N,) in each slot. The states of slots that
        are not active mean nothing."""
        return self.model.ids(tokens)

    def extend(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the states (n, K) after each of the right-padded `tokens` (n, K). Those to the
        right of a row's last token mean nothing."""
        return self.model.ids(tokens)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Do nothing: there is nothing to copy."""

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read whole texts; see `Bigram.states`."""
        return self.model.states(tokens, lengths)
