"""Dialogue-v0 small enough to look at every text, by reading words: no automaton, no tables.

A text is a list of words with its author each. What is computed here is exact, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tokenenv.envs.tasks import dialogue

NUM_MOODS = 2
SMALL: dict[str, Any] = {"max_new_tokens": 3, "num_moods": NUM_MOODS, "vocab_size": 8}
"""Options of a dialogue with few enough texts."""
NOISES = {"deterministic": 0.0, "stochastic": 0.3}


class Said(NamedTuple):
    """A response: words, and whether each is the policy's."""

    words: tuple[str, ...] = ()
    own: tuple[bool, ...] = ()

    def plus(self, word: str, reply: tuple[str, ...] = ()) -> "Said":
        """The response with one more word of the policy's, and what is written behind it."""
        own = (True, *[False] * len(reply))
        return Said((*self.words, word, *reply), (*self.own, *own))


def mood(said: Said) -> int:
    """The number of the last mood that the other has written, from 1."""
    written = [w for w, own in zip(*said, strict=True) if not own and w.startswith("mood")]
    return int(written[-1].removeprefix("mood")) if written else 1


def replies(said: Said, noise: float, num_moods: int = NUM_MOODS) -> dict[tuple[str, ...], float]:
    """The probability of every reply to a response that ends with a word of the policy's."""
    if said.words[-1] != ".":
        return {(): 1.0}
    written = [i for i, own in enumerate(said.own) if not own]
    turn = said.words[written[-1] + 1 if written else 0 :]
    now = mood(said)
    wanted = now + 1 if f"kind{now}" in turn else now - 1
    wanted = min(max(wanted, 1), num_moods)
    found = {}
    for m in range(1, num_moods + 1):
        prob = noise / num_moods + (1 - noise) * (m == wanted)
        if prob > 0:
            found[(f"mood{m}",) if m == now else ("oh", f"mood{m}")] = prob
    return found


def score(said: Said, num_moods: int = NUM_MOODS) -> float:
    return (mood(said) - 1) / (num_moods - 1)


def turn_rewards(said: Said, num_moods: int = NUM_MOODS) -> list[float]:
    """What each of the policy's words earns: how much the answer to it changed the mood."""
    scores = [
        score(Said(said.words[:i], said.own[:i]), num_moods) for i in range(len(said.own) + 1)
    ]
    ends = [i for i, own in enumerate((*said.own, True)) if own][1:]
    return [scores[end] - scores[start] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass
class Small:
    """A small dialogue."""

    task: Any
    noise: float
    options: dict[str, Any]
    """Of the task."""

    @property
    def oracle(self) -> Any:
        return self.task.oracle

    @property
    def words(self) -> list[str]:
        return [self.task.tokenizer.decode([i]) for i in range(self.V)]

    @property
    def V(self) -> int:
        return self.task.reference.vocab_size

    @property
    def T(self) -> int:
        return self.task.max_new_tokens

    def ids(self, said: Said) -> list[int]:
        return list(self.task.tokenizer.convert_tokens_to_ids(list(said.words)))

    def reference(self, said: Said) -> np.ndarray:
        """p(next word) (V,), by the last word, whoever wrote it."""
        return self.task.reference.probs[self.ids(said)[-1] if said.words else self.V]

    def after(self, said: Said, word: str) -> dict[Said, float]:
        """The responses in which the policy acts next after a word, with their probabilities."""
        found = replies(said.plus(word), self.noise)
        return {said.plus(word, reply): prob for reply, prob in found.items()}

    def beginnings(self, steps: int) -> dict[Said, float]:
        """Every response with so many words of the policy's, and the probability of the answers in
        it."""
        if steps == 0:
            return {Said(): 1.0}
        return {
            then: before * chance
            for said, before in self.beginnings(steps - 1).items()
            for word in self.words
            for then, chance in self.after(said, word).items()
        }

    def values(self, beta: float) -> Callable[[Said], float]:
        """V* of a response: soft over the policy's words, an expectation over the others."""

        @cache
        def value(said: Said) -> float:
            if sum(said.own) == self.T:
                return score(said)
            q = self.q(said, value)
            if beta == 0:
                return float(q.max())
            return beta * math.log(float(self.reference(said) @ np.exp(q / beta)))

        return value

    def q(self, said: Said, value: Callable[[Said], float]) -> np.ndarray:
        """(V,) the expectation of `value` after each word."""
        return np.array(
            [sum(p * value(then) for then, p in self.after(said, w).items()) for w in self.words]
        )

    def objective(
        self, policy: Callable[[Said], np.ndarray], beta: float
    ) -> tuple[float, float, float]:
        """J, E[score] and KL of any policy, by all texts."""

        def total(said: Said) -> np.ndarray:
            if sum(said.own) == self.T:
                return np.array([score(said), 0.0])
            probs, found = policy(said), np.zeros(2)
            for word, prob, ref in zip(self.words, probs, self.reference(said), strict=True):
                if prob > 0:
                    found[1] += prob * math.log(prob / ref)
                    for then, chance in self.after(said, word).items():
                        found += prob * chance * total(then)
            return found

        mean, kl = total(Said())
        return float(mean - beta * kl), float(mean), float(kl)

    def observed(self, some: list[Said]) -> dict[str, np.ndarray]:
        """As the env observes them: after the prompt <s>, padded."""
        width = self.oracle.max_length
        obs = {key: np.zeros((len(some), width), np.int64) for key in ("tokens", "own_mask")}
        for row, said in enumerate(some):
            span = slice(1, 1 + len(said.words))
            obs["tokens"][row, span], obs["own_mask"][row, span] = self.ids(said), said.own
        length = np.array([1 + len(said.words) for said in some])
        return obs | {"length": length, "prompt_length": np.ones(len(some), np.int64)}

    def said(self, obs: dict[str, np.ndarray], row: int) -> Said:
        """The response of an observed text."""
        span = slice(1, obs["length"][row])
        words = self.task.tokenizer.convert_ids_to_tokens(obs["tokens"][row, span].tolist())
        return Said(tuple(words), tuple(map(bool, obs["own_mask"][row, span])))


@cache
def small(kind: str, **options: Any) -> Small:
    """The small dialogue, "deterministic" or "stochastic"."""
    chosen = SMALL | {"noise": NOISES[kind]} | options
    return Small(dialogue.task(**chosen), NOISES[kind], chosen)
