"""What the machines of arithmetic have in common: a question is read up to its "=", and then an
answer in digits, which ends with <eos>."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.automaton import StateSlots
from tokenenv.models.batching import upload

PAD, EOS, ZERO = 0, 1, 2
"""The ids of "<pad>", "<eos>" and the digit 0; the other digits follow it."""


class DigitMachine(ABC):
    """A machine that reads a question and the response, token by token. It is a `TokenModel`, the
    trunk of a scorer. A subclass says what a token does to the states (K, S) int64."""

    start: ClassVar[tuple[int, ...]]
    """The state (S,) before the first token."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._powers = 10 ** torch.arange(13, device=self.device)

    @abstractmethod
    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states (K, S) after one more token (K,) each."""

    def slots(self, num_slots: int, max_length: int) -> StateSlots:
        """Make N slots for running texts of any length."""
        return StateSlots(self, num_slots)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts: right-padded `tokens` (B, L) to states (B, L, S), in which state t has
        read tokens 0..t."""
        return torch.stack(list(self._walk(tokens)), dim=1)

    def _walk(self, tokens: Tensor) -> Iterator[Tensor]:
        state = upload(np.array(self.start), self.device).expand(len(tokens), len(self.start))
        for column in tokens.unbind(1):
            state = self.after(state, column)
            yield state

    def _expected(self, value: Tensor, place: Tensor) -> Tensor:
        """Return the right token (K,) at a place of the answer, or -1 beyond its end."""
        left = self._num_digits(value) - 1 - place
        digit = value // self._powers[left.clamp(0, len(self._powers) - 1)] % 10
        return torch.where(left >= 0, ZERO + digit, torch.where(left == -1, EOS, -1))

    def _num_digits(self, value: Tensor) -> Tensor:
        return (value[:, None] >= self._powers).sum(-1).clamp(min=1)
