"""The optimum of a proxy on an automaton task, by dynamic programming: for proxies that pay each
token by the step, the automaton's state, the last token and the token.

Shapes: T tokens, Q states, V tokens of the vocabulary, U = V + 1 last tokens (V: none yet).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenenv.agents.rollout.text import Text
from tokenenv.audit.optimum import Point
from tokenenv.audit.texts import CHUNK, Estimate, OnText, score, without_kl
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.types import EpisodeScores

MOST_TOKENS = 60_000_000
"""Tokens that are scored at most for the table of what the proxy pays."""
TRIES = 512
"""Texts on which it is tried whether a proxy is such a one, before and after the table is made."""
Pay = Callable[[EpisodeScores], np.ndarray]
"""Maps scored texts to the rewards (B, T) whose sum is the proxy."""
CLOSE = 1e-4
"""How far two rewards may be apart, relative to the largest, and still be one: they are
float32."""


@dataclass(frozen=True, slots=True)
class Level:
    """The states that can be reached in t tokens."""

    state: np.ndarray
    """(n,) int64: the automaton's."""
    last: np.ndarray
    """(n,) int64: the last token."""
    prefix: np.ndarray
    """(n, t) int64: a text that leads there."""


class Chain:
    """The optima of a proxy that is such a one, as a `tokenenv.audit.optimum.Family`.

    Args:
        envs: of an automaton task.
        pays: (T, Q, U, V) float64: what the proxy pays.
    """

    exact = True

    def __init__(self, envs: TokenVectorEnv, pays: np.ndarray) -> None:
        oracle = envs.oracle
        self.pays, self.automaton = pays, oracle.automaton
        self.logprob = np.log(oracle.reference.probs)[None]
        self.tokens = np.arange(self.automaton.vocab_size)

    def at(self, beta: float) -> Point:
        """Return the optimum at a beta above 0; infinity is the reference."""
        size = (self.automaton.num_states, len(self.tokens) + 1)
        soft, proxy, kl = (np.zeros(size) for _ in range(3))
        gold = np.repeat(self.automaton.payoff[:, None], size[1], axis=1)
        for pays in self.pays[::-1]:
            value = pays + self._after(soft)
            logits = self.logprob + (0.0 if math.isinf(beta) else value / beta)
            top = logits.max(2, keepdims=True)
            total = np.exp(logits - top).sum(2, keepdims=True)
            logpi = logits - top - np.log(total)
            pi = np.exp(logpi)
            soft = np.zeros(size) if math.isinf(beta) else beta * (top + np.log(total))[..., 0]
            proxy = (pi * (pays + self._after(proxy))).sum(2)
            gold = (pi * self._after(gold)).sum(2)
            kl = (pi * (logpi - self.logprob + self._after(kl))).sum(2)
        found = (float(table[0, -1]) for table in (kl, proxy, gold))
        distance, earned, true = found
        return Point(max(distance, 0.0), Estimate(earned, 0.0), Estimate(true, 0.0), beta)

    def best(self, by: str) -> list[int]:
        """Return the text with the largest "proxy" or "gold"."""
        size = (self.automaton.num_states, len(self.tokens) + 1)
        value, choices = np.zeros(size), []
        if by == "gold":
            value = np.repeat(self.automaton.payoff[:, None], size[1], axis=1)
        for pays in self.pays[::-1]:
            each = (pays if by == "proxy" else 0.0) + self._after(value) + np.zeros_like(pays)
            choices.append(each.argmax(2))
            value = each.max(2)
        state, last, out = 0, len(self.tokens), []
        for choice in choices[::-1]:
            token = int(choice[state, last])
            out.append(token)
            state, last = int(self.automaton.transitions[state, token]), token
        return out

    def _after(self, values: np.ndarray) -> np.ndarray:
        """Return the values (Q, 1, V) of the states that each token leads to, from (Q, U)."""
        return values[self.automaton.transitions, self.tokens][:, None]


def find_chain(envs: TokenVectorEnv, seed: int, on_text: OnText) -> Chain | None:
    """Return the chain of the env's proxy; None where the task is none of an automaton, or where
    the proxy pays by more than the state: this is tried on texts that meet in a state, and again on
    other texts when the table is made."""
    oracle = envs.oracle
    if not isinstance(oracle, AutomatonOracle) or oracle.source is not None:
        return None
    if envs.token_spec.stop_token_ids or envs.token_spec.max_new_tokens != oracle.max_new_tokens:
        return None
    levels = _levels(oracle)
    tokens = sum(len(level.state) for level in levels) * oracle.vocab_size * oracle.max_new_tokens
    if tokens > MOST_TOKENS:
        return None
    for pay in (as_paid, as_placed):
        rng = np.random.default_rng([seed, 3])
        if _forgets(envs, pay, levels, rng):
            chain = Chain(envs, _table(envs, pay, levels, on_text))
            if _holds(envs, pay, chain, rng):
                return chain
    return None


def _levels(oracle: AutomatonOracle) -> list[Level]:
    """Return the states that can be reached in 0, 1, ..., T - 1 tokens."""
    count, transitions = oracle.vocab_size, oracle.automaton.transitions
    levels = [Level(np.array([0]), np.array([count]), np.zeros((1, 0), dtype=np.int64))]
    for _ in range(oracle.max_new_tokens - 1):
        before = levels[-1]
        row, token = (grid.ravel() for grid in np.indices((len(before.state), count)))
        state = transitions[before.state[row], token]
        _, first = np.unique(state * count + token, return_index=True)
        row, token = row[first], token[first]
        prefix = np.concatenate([before.prefix[row], token[:, None]], axis=1)
        levels.append(Level(state[first], token, prefix))
    return levels


def _forgets(envs: TokenVectorEnv, pay: Pay, levels: list[Level], rng: np.random.Generator) -> bool:
    """Return whether texts that meet in a state are paid alike from there on."""
    texts = _random_texts(envs, rng)
    states, length = _states(envs.oracle, texts), texts.shape[1]
    if length == 1:
        return True
    place = rng.integers(1, length, size=len(texts))
    others = texts.copy()
    for row, t in enumerate(place):
        level = levels[t]
        same = (level.state == states[row, t]) & (level.last == texts[row, t - 1])
        others[row, :t] = level.prefix[np.flatnonzero(same)[0]]
    one, other = (pay(score(envs, made(envs, some))) for some in (texts, others))
    later = np.arange(length) >= place[:, None]
    return _close(one[later], other[later])


def _table(envs: TokenVectorEnv, pay: Pay, levels: list[Level], on_text: OnText) -> np.ndarray:
    """Return what the proxy pays (T, Q, U, V), from texts that go through every entry that can be
    reached.

    A text for each entry would do. Here a text goes on, after the entry that it is for, through
    entries that no text has been through, so that a few times fewer are scored.
    """
    oracle = envs.oracle
    length, count = oracle.max_new_tokens, oracle.vocab_size
    pays = np.full((length, oracle.automaton.num_states, count + 1, count), np.nan)
    asked, done = sum(len(level.state) for level in levels) * count, 0
    for t, level in enumerate(levels):
        row, token = np.nonzero(np.isnan(pays[t, level.state, level.last]))
        for start in range(0, len(row), CHUNK):
            some = slice(start, start + CHUNK)
            texts = np.zeros((len(row[some]), length), dtype=np.int64)
            texts[:, :t], texts[:, t] = level.prefix[row[some]], token[some]
            _go_on(oracle, texts, t + 1, pays)
            found, states = pay(score(envs, made(envs, texts))), _states(oracle, texts)
            last = _last(oracle, texts)
            for s in range(t, length):
                pays[s, states[:, s], last[:, s], texts[:, s]] = found[:, s]
            done = int(np.isfinite(pays).sum())
            on_text(done, asked)
    return np.nan_to_num(pays)


def _go_on(oracle: AutomatonOracle, texts: np.ndarray, start: int, pays: np.ndarray) -> None:
    """Fill in the tokens of `texts` (B, T) from place `start` on: in each state those that are not
    known there, as long as there are any, each in another text."""
    states = _states(oracle, texts[:, :start])[:, -1]
    for s in range(start, texts.shape[1]):
        place = states * (oracle.vocab_size + 1) + _last(oracle, texts)[:, s]
        order = np.argsort(place, kind="stable")
        ends = np.flatnonzero(np.diff(place[order], prepend=-1))
        rank = np.empty(len(place), dtype=np.int64)
        rank[order] = np.arange(len(place)) - np.repeat(ends, np.diff([*ends, len(place)]))
        entries = pays[s].reshape(-1, oracle.vocab_size)[place[order[ends]]]
        unknown_first = np.argsort(np.isfinite(entries), axis=1, kind="stable")
        which = np.repeat(np.arange(len(ends)), np.diff([*ends, len(place)]))
        texts[order, s] = unknown_first[which, rank[order] % oracle.vocab_size]
        states = oracle.automaton.transitions[states, texts[:, s]]


def _last(oracle: AutomatonOracle, texts: np.ndarray) -> np.ndarray:
    """Return the last token (B, T) before each token."""
    none = np.full((len(texts), 1), oracle.vocab_size)
    return np.concatenate([none, texts[:, :-1]], axis=1)


def _holds(envs: TokenVectorEnv, pay: Pay, chain: Chain, rng: np.random.Generator) -> bool:
    """Return whether other texts are paid what the table says, and gold is the automaton's
    payoff."""
    texts, oracle = _random_texts(envs, rng), envs.oracle
    states = _states(oracle, texts)
    places = states[:, :-1], _last(oracle, texts), texts
    said = chain.pays[np.arange(texts.shape[1]), *places]
    scores = score(envs, made(envs, texts))
    if scores.gold is None or not _close(scores.gold, oracle.automaton.payoff[states[:, -1]]):
        return False
    return _close(said, pay(scores))


def _random_texts(envs: TokenVectorEnv, rng: np.random.Generator) -> np.ndarray:
    """Return texts of the reference, and as many of uniform tokens, (2 TRIES, T) int64."""
    oracle = envs.oracle
    uniform = rng.integers(oracle.vocab_size, size=(TRIES, oracle.max_new_tokens))
    last, columns = np.full(TRIES, oracle.vocab_size), []
    for _ in range(oracle.max_new_tokens):
        below = oracle.reference.probs.cumsum(1)[last] < rng.random((TRIES, 1))
        last = below.sum(1).clip(max=oracle.vocab_size - 1)
        columns.append(last)
    return np.concatenate([uniform, np.stack(columns, 1)])


def _states(oracle: AutomatonOracle, texts: np.ndarray) -> np.ndarray:
    """Return the automaton's states (B, T + 1) before each token and at the end."""
    states = [np.zeros(len(texts), dtype=np.int64)]
    for column in texts.T:
        states.append(oracle.automaton.transitions[states[-1], column])
    return np.stack(states, 1)


def made(envs: TokenVectorEnv, tokens: np.ndarray) -> list[Text]:
    """Return responses (B, T) to the task's first prompt as finished texts."""
    prompt, own = list(map(int, envs.prompts[0])), [True] * tokens.shape[1]
    return [
        Text(0, 0, prompt, 0, {}, tokens=row, own=own, truncated=True) for row in tokens.tolist()
    ]


def as_paid(scores: EpisodeScores) -> np.ndarray:
    """Return what `step` pays for each token (B, T) float64, without the KL term."""
    return without_kl(scores.terms, scores.step_rewards)


def as_placed(scores: EpisodeScores) -> np.ndarray:
    """Return what each token is paid (B, T) float64, hindsight terms placed, without the KL
    term."""
    return without_kl(scores.token_reward_terms, scores.token_rewards)


def _close(one: Any, other: Any) -> bool:
    scale = max(1.0, float(np.abs(one).max(initial=0.0)))
    return float(np.abs(one - other).max(initial=0.0)) <= CLOSE * scale
