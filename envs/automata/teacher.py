"""The optimal policy of an automaton task as a language model, for `reward="distill"` to imitate.

Shapes: K texts, T tokens of the policy's, Q states of the automaton, V words.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.envs.automata.source import Source
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import StateSlots, reachable
from tokenenv.models.prefix_scores import sum_dtype


class OptimalPolicy:
    """pi* of score - beta KL(pi || pi_ref), as a `TokenModel`: log pi*(a | s) = log pi_ref(a | u)
    + (Q*(s, a) - V*(s)) / beta, from the oracle's tables.

    A state is (K, 4) int64: the automaton's state, the last word (V at the beginning), how many
    words are the policy's so far, and whose word is read next. The last two are found in the text
    alone: where a source answers, a reply follows each word that ends a turn. A prefix may end a
    turn that nobody has answered; there `at_step` puts the right number in.

    Nothing is computed before the model is read.

    Args:
        oracle: knows the optimum.
        beta: reward per nat, 0 or more. At 0 only the best tokens have a probability.

    Raises:
        InvalidArgument: when it is read, where a reply begins with another one, so that a text does
            not say where it ends.
    """

    def __init__(self, oracle: AutomatonOracle, beta: float) -> None:
        self.oracle, self.beta = oracle, beta
        self.vocab_size, self.device = oracle.vocab_size, oracle.automaton.device

    def at_beta(self, beta: float) -> "OptimalPolicy":
        """Return the optimal policy for another beta."""
        return OptimalPolicy(self.oracle, beta)

    def at_step(self, states: Tensor, step: Tensor) -> Tensor:
        """Return the states (K, 4) with `step` (K,) for the number of the policy's words so far."""
        return torch.stack([states[:, 0], states[:, 1], step, states[:, 3]], 1)

    def slots(self, num_slots: int, max_length: int) -> StateSlots:
        """Make N slots for running texts of any length."""
        return StateSlots(self, num_slots)

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts: right-padded `tokens` (B, L) to states (B, L, 4), in which state t has
        read tokens 0..t."""
        zeros = torch.zeros(len(tokens), dtype=torch.int64, device=self.device)
        states = [torch.stack([zeros, zeros + self.vocab_size, zeros, zeros], 1)]
        for column in tokens[:, 1:].unbind(1):
            states.append(self.after(states[-1], column))
        return torch.stack(states, 1)

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states (K, 4) that follow K states and tokens (K,)."""
        state, _, step, turn = states.unbind(1)
        follows, own = self._turns
        tokens = tokens.to(self.device, non_blocking=True).clamp(0, self.vocab_size - 1)
        moved = self.oracle.automaton.after(state, tokens)
        return torch.stack([moved, tokens, step + own[turn, tokens], follows[turn, tokens]], 1)

    def head(self, states: Tensor) -> Tensor:
        """Return log pi* (K, V) float32 after `states` (K, 4). After the last word, which no other
        follows, it means nothing."""
        tilt, norm, reference = self._tables
        step, state, last = self._places(states)
        return (reference[last] + tilt[step, state] - norm[step, state, last][:, None]).float()

    def logprob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return log pi*(token | state), (K,) float32 in nats."""
        tilt, norm, reference = self._tables
        step, state, last = self._places(states)
        tilted = reference[last, tokens] + tilt[step, state, tokens]
        return (tilted - norm[step, state, last]).float()

    def _places(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, last, step, _ = states.unbind(1)
        return step.clamp(max=self.oracle.max_new_tokens - 1), state, last

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Q* - max Q*) / beta (T, Q, V), the logarithm of what normalises it (T, Q, V + 1), and
        log pi_ref (V + 1, V)."""
        values, probs = self.oracle.token_values(self.beta), self.oracle.reference.probs
        gap = values - values.max(2, keepdims=True)
        # The best token's tilt is 0, so the sum is positive however small beta is.
        tilt = np.where(gap == 0, 0.0, -np.inf) if self.beta == 0 else gap / self.beta
        tables = tilt, np.log(np.exp(tilt) @ probs.T), np.log(probs)
        dtype = sum_dtype(self.device)
        tilt, norm, reference = (torch.from_numpy(one).to(dtype).to(self.device) for one in tables)
        return tilt, norm, reference

    @cached_property
    def _turns(self) -> tuple[Tensor, Tensor]:
        follows, own = turns_of(self.oracle.source, self.vocab_size)
        return follows.to(self.device), own.to(self.device)


def turns_of(source: Source | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return how a text is read in turns: what follows, (M, V) int64, where a word is read in one
    of M places of a turn or a reply, and whether that word is the policy's, (M, V) int64, 0 or 1.
    Place 0 is the policy's turn.

    Raises:
        InvalidArgument: a reply begins with another one.
    """
    if source is None:
        return torch.zeros(1, vocab_size, dtype=torch.int64), torch.ones(1, vocab_size).long()
    replies = set(source.replies)
    begun = {reply[:n] for reply in replies for n in range(1, len(reply))}
    if begun & replies:
        raise InvalidArgument(
            f"a reply begins with another one, {sorted(begun & replies)[0]}: a text does not say "
            "where it ends, so there is no teacher of this task; give teacher=."
        )

    def step(place: tuple[int, ...] | None, word: int) -> tuple[int, ...] | None:
        """Return the reply so far after a word, or None in the policy's turn."""
        if is_own(place, word):
            return () if word in source.turn_end_token_ids else None
        assert place is not None
        return None if (*place, word) in replies else (*place, word)

    def is_own(place: tuple[int, ...] | None, word: int) -> bool:
        return place is None or (*place, word) not in begun | replies

    places, follows = reachable(None, step, vocab_size)
    own = [[is_own(place, word) for word in range(vocab_size)] for place in places]
    return torch.from_numpy(follows), torch.tensor(own).long()
