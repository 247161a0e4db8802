"""Texts of an automaton task that run on: all of them, or as they are drawn.

Shapes: K texts, V words, L words of the longest text that is possible, n continuations.
"""

from dataclasses import dataclass

import numpy as np

from tokenenv.envs.automata.source import NO_REPLY, Source, drawn
from tokenenv.models.automaton import Automaton


@dataclass(frozen=True, slots=True)
class Running:
    """K texts with the same number of words of the policy's, and their states."""

    tokens: np.ndarray
    """(K, L) int64, right-padded, the prompt included."""
    own: np.ndarray
    """(K, L) bool: the words of the policy's."""
    length: np.ndarray
    """(K,) int64."""
    state: np.ndarray
    """(K,) the automaton's states."""
    last: np.ndarray
    """(K,) the last word; V at the beginning."""
    mass: np.ndarray
    """(K,) the probability of each."""


@dataclass(frozen=True, slots=True)
class Moves:
    """n continuations of running texts: one word of the policy's, and what is written behind it."""

    row: np.ndarray
    """(n,) the number of the text that goes on."""
    token: np.ndarray
    """(n,) the policy's word."""
    reply: np.ndarray
    """(n,) the number of the reply, or `NO_REPLY`."""
    state: np.ndarray
    """(n,) the automaton's states after them."""
    mass: np.ndarray
    """(n,) the probability of each."""

    def at(self, index: np.ndarray) -> "Moves":
        """Return the continuations `index`."""
        arrays = (self.row, self.token, self.reply, self.state, self.mass)
        return Moves(*(array[index] for array in arrays))


class Game:
    """How the texts of an automaton task go on. `source` writes into them; None: the policy alone
    writes."""

    def __init__(self, automaton: Automaton, source: Source | None, max_length: int) -> None:
        self.automaton, self.source, self.max_length = automaton, source, max_length

    def beginnings(self, count: int) -> Running:
        """Return `count` texts without a response, equally likely."""
        blank = np.zeros((count, self.max_length), dtype=np.int64)
        length, state = np.ones(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        last = np.full(count, self.automaton.vocab_size)
        return Running(blank, blank > 0, length, state, last, np.full(count, 1 / count))

    def all_next(self, texts: Running, probs: np.ndarray) -> Running:
        """Return one text for every (automaton state, last word) that comes next, with its
        probability, where the policy has `probs` (K, V).

        Texts that meet in the same combination have the same future, so one of them stands for all.
        """
        flow = texts.mass[:, None] * probs
        row, token = np.nonzero(flow)
        state = self.automaton.transitions[texts.state[row], token]
        nothing = np.full(len(row), NO_REPLY)
        moves = self._all_replies(Moves(row, token, nothing, state, flow[row, token]))
        place = moves.state * self.automaton.vocab_size + self._last(moves)
        mass = np.bincount(place, moves.mass)
        chosen = np.zeros(len(mass), dtype=np.int64)
        chosen[place] = np.arange(len(place))
        reached = np.flatnonzero(mass)
        return self._moved(texts, moves.at(chosen[reached]), mass[reached])

    def drawn_next(self, texts: Running, probs: np.ndarray, rng: np.random.Generator) -> Running:
        """Return every text with one more word drawn from `probs` (K, V), and with the reply that
        is drawn then."""
        token = drawn(probs, rng)
        state = self.automaton.transitions[texts.state, token]
        reply = np.full(len(token), NO_REPLY)
        asked = self._asked(token)
        if self.source is not None and len(asked):
            reply[asked] = self.source.draw(state[asked], rng)
            state[asked] = self.source.after[state[asked], reply[asked]]
        row = np.arange(len(token))
        return self._moved(texts, Moves(row, token, reply, state, texts.mass), texts.mass)

    def _asked(self, token: np.ndarray) -> np.ndarray:
        """Return the places of the words after which the source writes."""
        ends = () if self.source is None else self.source.turn_end_token_ids
        return np.flatnonzero(np.isin(token, ends))

    def _all_replies(self, moves: Moves) -> Moves:
        """Return every continuation with every reply that is possible behind it."""
        asked = self._asked(moves.token)
        if self.source is None or not len(asked):
            return moves
        probs = self.source.probs[moves.state[asked]]
        index, reply = np.nonzero(probs)
        more = moves.at(asked[index])
        after, mass = self.source.after[more.state, reply], more.mass * probs[index, reply]
        answered = Moves(more.row, more.token, reply, after, mass)
        rest = moves.at(np.setdiff1d(np.arange(len(moves.row)), asked))
        names = Moves.__slots__
        both = ((getattr(rest, name), getattr(answered, name)) for name in names)
        return Moves(*map(np.concatenate, both))

    def _last(self, moves: Moves) -> np.ndarray:
        """Return the last word (n,) after each continuation."""
        if self.source is None:
            return moves.token
        return np.where(moves.reply == NO_REPLY, moves.token, self.source.last[moves.reply])

    def _moved(self, texts: Running, moves: Moves, mass: np.ndarray) -> Running:
        """Return the texts after the continuations."""
        rows = np.arange(len(moves.row))
        tokens, own = texts.tokens[moves.row], texts.own[moves.row]
        length = texts.length[moves.row]
        tokens[rows, length], own[rows, length] = moves.token, True
        length += 1
        if self.source is not None:
            written = np.where(moves.reply == NO_REPLY, 0, self.source.lengths[moves.reply])
            for place in range(self.source.width):
                longer = np.flatnonzero(written > place)
                tokens[longer, length[longer]] = self.source.tokens[moves.reply[longer], place]
                length[longer] += 1
        return Running(tokens, own, length, moves.state, self._last(moves), mass)
