"""What answers in an automaton task: a Markov source, which draws a reply by the automaton's state.

Shapes: Q states of the automaton, V words, R replies, W words of the longest one, K texts.
"""

from collections.abc import Sequence

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.turns import Reply, TextSoFar

NO_REPLY = -1
"""The number of the reply where nothing is written."""


class Source:
    """A source that writes one of R replies behind each word that ends a turn.

    The automaton reads the words of both authors, so its state may hold the source's own state and
    what the policy has said. The state after the word that ends a turn decides how likely each
    reply is. The turn's reward is the payoff after the reply minus the payoff before the turn.

    Args:
        automaton: reads the text.
        replies: R lists of one token id or more.
        probs: (Q, R) float64, each row summing to 1: p(reply | state).
        turn_end_token_ids: the ids that end a turn of the policy's.
        ended: (Q,) bool, the states in which a text has ended, which no word leads out of; None: no
            text ends before its last word.

    Raises:
        InvalidArgument: the shapes do not fit, or a row is no distribution.
    """

    def __init__(
        self,
        automaton: Automaton,
        replies: Sequence[Sequence[int]],
        probs: np.ndarray,
        turn_end_token_ids: Sequence[int],
        ended: np.ndarray | None = None,
    ) -> None:
        self.automaton, self.turn_end_token_ids = automaton, tuple(turn_end_token_ids)
        self.replies = tuple(tuple(reply) for reply in replies)
        self.probs = np.asarray(probs, dtype=np.float64)
        if not all(self.replies) or self.probs.shape != (automaton.num_states, len(self.replies)):
            raise InvalidArgument(
                f"probs of shape {self.probs.shape} for the replies {self.replies}; allowed: "
                f"({automaton.num_states}, {len(self.replies)}), and no empty reply."
            )
        if not (self.probs >= 0).all() or np.abs(self.probs.sum(1) - 1).max() > 1e-9:
            raise InvalidArgument("probs must be 0 or more and each of its rows sum to 1.")
        self.ended = np.zeros(automaton.num_states, dtype=bool) if ended is None else ended
        self.lengths = np.array([len(reply) for reply in self.replies])
        self.tokens = np.zeros((len(self.replies), self.width), dtype=np.int64)
        for row, reply in zip(self.tokens, self.replies, strict=True):
            row[: len(reply)] = reply
        self.last = np.array([reply[-1] for reply in self.replies])
        self.after = np.array(
            [[self._read(state, reply) for reply in self.replies] for state in range(len(probs))]
        )
        """(Q, R) int64: the automaton's state after each reply, from each state."""

    @property
    def width(self) -> int:
        """W, the words of the longest reply."""
        return int(self.lengths.max())

    def respond(self, text: TextSoFar) -> Reply:
        """Draw the reply to a text that ends with a turn of the policy's (`Task.respond`)."""
        before = self._read(0, text.response[: -len(text.turn)])
        state = self._read(before, text.turn)
        (reply,) = self.draw(np.array([state]), text.rng())
        gain = self.automaton.payoff[self.after[state, reply]] - self.automaton.payoff[before]
        return Reply(self.replies[reply], reward=float(gain))

    def draw(self, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the numbers (K,) of the replies in K states."""
        return drawn(self.probs[states], rng)

    def expected(self, values: np.ndarray) -> np.ndarray:
        """Return the expectation (Q,) over the replies from each state, of `values` (Q, V + 1) by
        the automaton's state and the last word after them."""
        return (self.probs * values[self.after, self.last]).sum(1)

    def _read(self, state: int, words: Sequence[int]) -> int:
        for word in words:
            state = self.automaton.transitions[state, word]
        return int(state)


def drawn(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a column (K,) of each row of `probs` (K, n)."""
    # Scaled by the sum, so that rounding cannot lead beyond the last column.
    cumulative = probs.cumsum(1)
    return (cumulative <= rng.random((len(probs), 1)) * cumulative[:, -1:]).sum(1)
