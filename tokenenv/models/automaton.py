"""A finite automaton that reads tokens and scores texts by the state they end in."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.types import Slots

from .batching import last_states, upload

StateT = TypeVar("StateT", bound=Hashable)


class Automaton:
    """Q states, of which the first is the start (a `TokenModel` without a language model's head: a
    scorer's trunk).

    It starts after the first token of a text, the prompt, whatever that is, and reads the response.

    Args:
        transitions: (Q, V) int64, the state after reading a token in a state.
        payoff: (Q,) float64, the score of a text that ends in a state.
        device: where tokens are taken and states, (K,) int64, returned.
    """

    def __init__(
        self, transitions: np.ndarray, payoff: np.ndarray, device: str | torch.device = "cpu"
    ) -> None:
        self.transitions = np.asarray(transitions, dtype=np.int64)
        self.payoff = np.asarray(payoff, dtype=np.float64)
        if self.transitions.ndim != 2 or self.payoff.shape != self.transitions.shape[:1]:
            raise InvalidArgument(
                f"{self.transitions.shape} transitions, {self.payoff.shape} payoffs; allowed: (Q, "
                f"V), (Q,)."
            )
        if not ((self.transitions >= 0) & (self.transitions < len(self.payoff))).all():
            raise InvalidArgument(f"transitions lead out of the states 0..{len(self.payoff) - 1}.")
        self.device = torch.device(device)
        self._transitions = torch.from_numpy(self.transitions).to(self.device)
        self._payoff = torch.from_numpy(self.payoff).float().to(self.device)

    @property
    def num_states(self) -> int:
        """Q."""
        return self.transitions.shape[0]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.transitions.shape[1]

    def slots(self, num_slots: int, max_length: int) -> "StateSlots":
        """N running texts of any length."""
        return StateSlots(self, num_slots)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Right-padded `tokens` (B, L) to states (B, L) int64, in which state t has read token
        t."""
        states = torch.zeros(tokens.shape, dtype=torch.int64, device=self.device)
        for t in range(1, tokens.shape[1]):
            states[:, t] = self.after(states[:, t - 1], tokens[:, t])
        return states

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states (K,) after one more token (K,); ids beyond V are read as the last."""
        return self._transitions[
            states, tokens.to(self.device, non_blocking=True).clamp(0, self.vocab_size - 1)
        ]

    def score(self, states: Tensor) -> Tensor:
        """States (K,) to scores (K,) float32 of texts that end there: a scorer's head."""
        return self._payoff[states]

    def read(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The states (N,) after right-padded texts (N, L) of these lengths (N,), on the host."""
        states = np.zeros(len(tokens), dtype=np.int64)
        for t in range(1, int(lengths.max(initial=1))):
            states = np.where(t < lengths, self.transitions[states, tokens[:, t]], states)
        return states


class Machine(Protocol):
    """A model whose state after a token follows from the state before it and the token."""

    device: torch.device

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Right-padded `tokens` (B, L) to states (B, L, ...)."""
        ...

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states (K, ...) after one more token (K,)."""
        ...


class StateSlots:
    """N running texts of a `Machine` (a `SlotModel`), a state each."""

    def __init__(self, model: Machine, num_slots: int) -> None:
        self.model = model
        self._states = model.states(
            torch.zeros(num_slots, 1, dtype=torch.int64, device=model.device), [1] * num_slots
        )[:, 0]

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restarts `slots` (n,) with right-padded `tokens` (n, <=L); returns the states (n, ...)
        after each."""
        states = last_states(self.states(tokens, lengths), lengths)
        self._states[self._upload(slots)] = states
        return states

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Adds one token to each row (N,), or only where `active` (N,) bool; returns a copy of the
        states (N, ...)."""
        after = self.model.after(self._states, tokens)
        if active is not None and not np.all(active):
            mask = upload(np.asarray(active, dtype=bool), self.model.device)
            after = torch.where(mask.view(-1, *[1] * (after.ndim - 1)), after, self._states)
        self._states = after
        return after.clone()

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copies row sources[i] onto row targets[i]; all sources are read before any target is
        written."""
        self._states[self._upload(targets)] = self._states[self._upload(sources)]

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """As the model's."""
        return self.model.states(tokens, lengths)

    def _upload(self, slots: Slots) -> Tensor:
        return upload(np.asarray(slots, dtype=np.int64), self.model.device)


def explore(
    start: StateT,
    step: Callable[[StateT, int], StateT],
    payoff: Callable[[StateT], float],
    vocab_size: int,
    device: Any = "cpu",
) -> Automaton:
    """The automaton of all states that can be reached from `start`, with `step(state, token)` the
    state that follows."""
    number, states, rows = {start: 0}, [start], []
    for state in states:  # grows while it is read
        row = [step(state, token) for token in range(vocab_size)]
        for after in row:
            if after not in number:
                number[after] = len(states)
                states.append(after)
        rows.append([number[after] for after in row])
    return Automaton(np.array(rows), np.array([payoff(state) for state in states]), device)
