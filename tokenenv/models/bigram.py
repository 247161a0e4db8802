"""A bigram language model: next-token probabilities in a table, looked up by the last token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument
from tokenenv.types import Slots

from .batching import last_states


class Bigram(nn.Module):
    """p(next token | last token) as a table (a `TokenModel`).

    A state is a row of the table, (K,) int64: the token read last, or V after a text's first token,
    whatever it is. So the first token is a prompt that says nothing, and V tells the beginning from
    the same token later on.

    Args:
        probs: (V + 1, V) float64, positive, rows summing to 1; the last row is the beginning.
        device: where tokens are taken and states returned.

    Raises:
        InvalidArgument: `probs` is no such table. Zeros are refused: a token would be paid log 0.
    """

    logprobs: Tensor
    """(V + 1, V) float32."""

    def __init__(self, probs: np.ndarray, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.probs = np.asarray(probs, dtype=np.float64)
        if self.probs.ndim != 2 or self.probs.shape[0] != self.probs.shape[1] + 1:
            raise InvalidArgument(f"probs of shape {self.probs.shape}; allowed: (V + 1, V).")
        if not (self.probs > 0).all() or np.abs(self.probs.sum(1) - 1).max() > 1e-9:
            raise InvalidArgument("probs must be positive and each of its rows sum to 1.")
        logprobs = torch.from_numpy(np.log(self.probs)).float().to(device)
        self.register_buffer("logprobs", logprobs, persistent=False)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.probs.shape[1]

    @property
    def device(self) -> torch.device:
        """Where tokens are taken and states returned."""
        return self.logprobs.device

    def slots(self, num_slots: int, max_length: int) -> "BigramSlots":
        """Running texts, of any number and length."""
        return BigramSlots(self)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Right-padded `tokens` (B, L) to states (B, L) int64, in which state t has read token
        t."""
        states = self.ids(tokens)
        states[:, 0] = self.vocab_size
        return states

    def head(self, states: Tensor) -> Tensor:
        """States (K,) to log-probabilities (K, V) float32."""
        return self.logprobs[states]

    def logprob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """log p(token | state), (K,) float32, without making (K, V) of them."""
        return self.logprobs[states, tokens]

    def ids(self, tokens: Tensor) -> Tensor:
        """A copy on the device; ids beyond V are read as the last: out of range would end a CUDA
        process."""
        return tokens.to(self.device, non_blocking=True).clamp(0, self.vocab_size - 1)


class BigramSlots:
    """Running texts (a `SlotModel`). Nothing has to be kept of them: a state is the token just
    read."""

    def __init__(self, model: Bigram) -> None:
        self.model = model

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """The states (n,) after right-padded `tokens` (n, <=L)."""
        return last_states(self.states(tokens, lengths), lengths)

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """The states (N,) after one more token (N,) each; those of rows that are not active mean
        nothing."""
        return self.model.ids(tokens)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Nothing to copy."""

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """As the model's."""
        return self.model.states(tokens, lengths)
