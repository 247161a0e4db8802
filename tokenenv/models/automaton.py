"""A finite automaton that reads tokens, and scores a text by the state that it ends in."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.types import Slots

from .batching import last_states, table_entries, upload

StateT = TypeVar("StateT", bound=Hashable)


class Automaton:
    """A finite automaton of Q states, as a scorer's trunk (a `TokenModel` without a language
    model's head).

    The first state is the start. The automaton is in it after the first token of a text, whatever
    that token is: the prompt of these tasks is one token that says nothing. From there on it reads
    the response.

    Args:
        transitions: (Q, V) int64, the state that follows a state and a token.
        payoff: (Q,) float64, the score of a text that ends in a state.
        device: where tokens are taken and states, (K,) int64, returned.

    Raises:
        InvalidArgument: the shapes do not fit, or a transition leads out of the Q states.
    """

    def __init__(
        self, transitions: np.ndarray, payoff: np.ndarray, device: str | torch.device = "cpu"
    ) -> None:
        self.transitions = np.asarray(transitions, dtype=np.int64)
        self.payoff = np.asarray(payoff, dtype=np.float64)
        if self.transitions.ndim != 2 or self.payoff.shape != self.transitions.shape[:1]:
            raise InvalidArgument(
                f"{self.transitions.shape} transitions, {self.payoff.shape} payoffs; allowed: "
                "(Q, V), (Q,)."
            )
        if not ((self.transitions >= 0) & (self.transitions < len(self.payoff))).all():
            raise InvalidArgument(f"transitions lead out of the states 0..{len(self.payoff) - 1}.")
        self.device = torch.device(device)
        self._transitions = torch.from_numpy(self.transitions).to(self.device)
        self._payoff = torch.from_numpy(self.payoff).float().to(self.device)

    @property
    def num_states(self) -> int:
        """Q, the number of states."""
        return self.transitions.shape[0]

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.transitions.shape[1]

    def slots(self, num_slots: int, max_length: int) -> "StateSlots":
        """Make N slots for running texts of any length."""
        return StateSlots(self, num_slots)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts: right-padded `tokens` (B, L) to states (B, L) int64, in which state t
        has read tokens 0..t."""
        states = torch.zeros(tokens.shape, dtype=torch.int64, device=self.device)
        for t in range(1, tokens.shape[1]):
            states[:, t] = self.after(states[:, t - 1], tokens[:, t])
        return states

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states (K,) that follow K states and tokens, (K,) each. Ids beyond V are read
        as the last one: an index out of range ends a CUDA process."""
        tokens = tokens.to(self.device, non_blocking=True).clamp(0, self.vocab_size - 1)
        return table_entries(self._transitions, states, tokens)

    def score(self, states: Tensor) -> Tensor:
        """Return the scores (K,) float32 of texts that end in `states` (K,). This is the head of
        the scorer whose trunk this automaton is."""
        return self._payoff.index_select(0, states)

    def read(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read whole texts on the host: right-padded `tokens` (N, L) of `lengths` (N,) to the last
        state of each, (N,) int64."""
        states = np.zeros(len(tokens), dtype=np.int64)
        for t in range(1, int(lengths.max(initial=1))):
            states = np.where(t < lengths, self.transitions[states, tokens[:, t]], states)
        return states


class Machine(Protocol):
    """A model whose state after a token follows from the state before it and the token alone."""

    device: torch.device
    """Where tokens are taken and states returned."""

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts: right-padded `tokens` (B, L) to states (B, L, ...)."""
        ...

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states (K, ...) that follow `states` (K, ...) and `tokens` (K,)."""
        ...


class StateSlots:
    """N slots of a `Machine` (a `SlotModel`): each keeps the state of its text, and nothing
    else."""

    def __init__(self, model: Machine, num_slots: int) -> None:
        self.model = model
        # A forward of one token shows the shape and dtype of a state.
        blank = torch.zeros(num_slots, 1, dtype=torch.int64, device=model.device)
        self._states = model.states(blank, [1] * num_slots)[:, 0]

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restart `slots` (n,) with right-padded `tokens` (n, <=L), and return the state (n, ...)
        after each text."""
        states = last_states(self.states(tokens, lengths), lengths)
        self._states[self._upload(slots)] = states
        return states

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Add one token (N,) to each slot that is `active` (N,) bool (None: to all), and return a
        copy of the states (N, ...)."""
        after = self.model.after(self._states, tokens)
        if active is not None and not np.all(active):
            mask = upload(np.asarray(active, dtype=bool), self.model.device)
            # States may have more than one dimension: the mask is spread over the others.
            after = torch.where(mask.view(-1, *[1] * (after.ndim - 1)), after, self._states)
        self._states = after
        return after.clone()

    def extend(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Add right-padded `tokens` (n, K), `lengths` (n,) of them, to the texts of `slots` (n,),
        and return the states (n, K, ...) after each. Those to the right of a row's last token mean
        nothing."""
        at = self._upload(slots)
        states, after = self._states[at], []
        for column in tokens.unbind(1):
            states = self.model.after(states, column)
            after.append(states)
        found = torch.stack(after, 1)
        self._states[at] = last_states(found, lengths)
        return found

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy slot sources[i] onto slot targets[i]. All sources are read before any target is
        written."""
        self._states[self._upload(targets)] = self._states[self._upload(sources)]

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read whole texts; see `Machine.states`."""
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
    """Make the automaton of all states that can be reached from a start.

    Args:
        start: the first state, any hashable value.
        step: maps a state and a token to the state that follows.
        payoff: maps a state to the score of a text that ends in it.
        vocab_size: V.
        device: of the automaton.
    """
    states, transitions = reachable(start, step, vocab_size)
    return Automaton(transitions, np.array([payoff(state) for state in states]), device)


def reachable(
    start: StateT, step: Callable[[StateT, int], StateT], vocab_size: int
) -> tuple[list[StateT], np.ndarray]:
    """Return all Q states that can be reached from a start, which is the first of them, and the
    number (Q, V) of the state that follows a state and a token; see `explore`."""
    number, states, rows = {start: 0}, [start], []
    # The list of states grows while it is read: it is the queue of a breadth-first search.
    for state in states:
        row = [step(state, token) for token in range(vocab_size)]
        for after in row:
            if after not in number:
                number[after] = len(states)
                states.append(after)
        rows.append([number[after] for after in row])
    return states, np.array(rows)
