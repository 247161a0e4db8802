"""Twenty-v0: find a number by questions, then say it.

## Description

The environment thinks of a number from 1 to 20 (`numbers`). The policy writes turns of two words:
"below 8" asks whether the number is below 8, and the environment writes "yes" or "no" behind it;
"is 5" says that it is 5, and the environment writes "right" or "wrong" and ends the text. Behind a
number without "below" or "is" in front of it, the environment writes "what". With the default of
T = 10 words of the policy's there is room for four questions before the guess: a guess at once is
right in 1 of 20 texts, that of the best player in 16 of 20. The reference is a bigram over the
words that asks and guesses at random (`task_seed`), and the policy starts from it.

The number is a function of the episode's seed, drawn uniformly, and no model reads it. In a text
that was forked, or that began with answers given at reset, it is drawn from the numbers that the
answers so far leave.

## Observation Space

`Dict(tokens=Box(0, 27, (21,), int64), length=Discrete(22), prompt_length=Discrete(22),
own_mask=MultiBinary(21))`: the prompt and the response so far, padded on the right, and a mask that
is 1 on the policy's words. P = 1 and T = 10 by default (`max_new_tokens`), and L = 21 has room for
an answer to every word. With `observation="features"` it is `Box(-inf, inf, (3031,), float32)`:
one-hot automaton state (2991), last token (29) and step (11), which is all that the optimum depends
on.

## Action Space

`Discrete(28)`: the next word, one of "<s>", "below", "is", "yes", "no", "right", "wrong", "what"
and the numbers. Only the environment's "yes", "no", "right" and "wrong" count as answers.

## Rewards

The score of a text is 1 if the guess is right, else 0. The default design is "terminal": the score
at the last word, and the KL term at every word. `infos["gold"]` is the score. The turn reward,
which `reward="turn"` pays, is for a question the information that its answer gives, log(numbers
that were possible / numbers that still are) / log(`numbers`), and for a guess its score.

The optimum is known exactly (`envs.unwrapped.oracle`): `oracle.q` is the value of each question, in
expectation over its answers. So `reward="oracle"` exists and an agent's regret is a number. With
the defaults and `kl_coef=0.01`, J = E[score] - 0.01 KL is 0.654 at the optimum (J*) and 0.046 for
the reference. Without the KL term the optimum is `best_score`, min(1, 2^questions / numbers).

## Starting State

The prompt is always "<s>", and the response is empty.

## Episode End

There is no stop token: a text ends with the answer to a guess, or when it has T words of the
policy's and the last of them has been answered. It is scored there. Both are terminations; with
`score_truncated=False` the second is a truncation without a score.

## Arguments

```python
envs = gym.make_vec("tokenenv/Twenty-v0", num_envs=64, numbers=16, reward="turn")
```

## Version History

* v0: initial version.
"""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from tokenenv.envs.automata.automata import (
    MAX_TOKENS,
    START,
    automaton_task,
    check_range,
    seeded,
)
from tokenenv.envs.automata.source import Source
from tokenenv.models.automaton import Automaton
from tokenenv.turns import Reply, TextSoFar
from tokenenv.types import Task

WORDS = (START, "below", "is", "yes", "no", "right", "wrong", "what")
"""The words before the numbers."""
BELOW, IS, YES, NO, RIGHT, WRONG, WHAT = range(1, len(WORDS))
ASKS, GUESSES, NOISE = 0.5, 0.4, 0.1
"""Of the reference: the probabilities that a turn begins with "below" and with "is", and the share
of any word, which keeps every word possible."""
KL_COEF = 0.01
"""Reward per nat. To name a number of 20 costs about three nats, and a text names up to five."""
REPLIES = ((YES,), (NO,), (RIGHT,), (WRONG,), (WHAT,))


class State(NamedTuple):
    """What a text says: which numbers are possible, and what the last words are."""

    phase: str
    """"ready", "below" and "is" before the policy's next word; "asked", "guessed" and "puzzled"
    before the environment's; "right" and "wrong" at the end."""
    low: int = 1
    """The least number that the answers leave."""
    high: int = 0
    """The largest one; 0 at the end, where it does not matter any more."""
    number: int = 0
    """Where the phase is "asked" or "guessed", the number that was named, or another one in its
    stead that is answered with the same probabilities."""

    @property
    def size(self) -> int:
        """How many numbers are possible."""
        return self.high - self.low + 1

    def possible(self, number: int) -> bool:
        """Whether the answers leave this number."""
        return self.low <= number <= self.high

    def within(self, phase: str, number: int = 0) -> "State":
        """Return the state in another phase, with the same numbers possible."""
        return State(phase, self.low, self.high, number)


def task(
    *,
    max_new_tokens: int = 10,
    numbers: int = 20,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Make the task: a text scores 1 if its guess is right.

    Args:
        max_new_tokens: T, the words of a text that are the policy's, 2 to 128. A question takes two
            of them, and so does the guess.
        numbers: the environment thinks of one from 1 to this, 2 to 40.
        task_seed: the seed from which the reference is drawn, 0 or more.
        device: where the models are put.

    Raises:
        InvalidArgument: an option is out of range.
    """
    check_range("max_new_tokens", max_new_tokens, 2, MAX_TOKENS)
    check_range("numbers", numbers, 2, 40)
    source = Thinker(numbers, device)
    words = [*WORDS, *(str(number) for number in range(1, numbers + 1))]
    probs = reference_probs(numbers, seeded(task_seed))
    made = automaton_task(words, probs, source.automaton, max_new_tokens, source)
    return replace(made, kl_coef=KL_COEF)


def best_score(max_new_tokens: int, numbers: int) -> float:
    """Return the largest probability of a right guess, which questions that halve the possible
    numbers reach: each question at most doubles the number of guesses that differ."""
    questions = max_new_tokens // 2 - 1
    return min(1.0, 2**questions / numbers)


def reference_probs(numbers: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the reference p(next | last), (V + 1, V) float64: turns that begin at random, and behind
    "below" and "is" numbers of which it prefers some."""
    size = len(WORDS) + numbers
    probs = np.full((size + 1, size), NOISE / size)
    probs[:, BELOW] += ASKS
    probs[:, IS] += GUESSES
    for verb in (BELOW, IS):
        preferred = 0.5 * rng.dirichlet(np.ones(numbers)) + 0.5 / numbers
        probs[verb] = NOISE / size
        probs[verb, len(WORDS) :] += (1 - NOISE) * preferred
    return probs


class Thinker(Source):
    """What thinks of a number and answers. A `Source`, which has the probability of each answer as
    somebody sees it who knows the text alone; an episode's own seed decides which one is given.

    Args:
        numbers: it thinks of one from 1 to this.
        device: of the automaton.
    """

    def __init__(self, numbers: int, device: str) -> None:
        self.numbers = numbers
        self.states, transitions = _automaton(numbers)
        payoff = np.array([float(state.phase == "right") for state in self.states])
        automaton = Automaton(transitions, payoff, device)
        probs = np.array([reply_probs(state) for state in self.states])
        ended = np.array([state.size == 0 for state in self.states])
        ends_turn = range(len(WORDS), len(WORDS) + numbers)
        super().__init__(automaton, REPLIES, probs, ends_turn, ended)

    def respond(self, text: TextSoFar) -> Reply:
        """Answer a turn that ends with a number (`Task.respond`)."""
        state = self.states[self._read(0, text.response)]
        if state.phase == "asked":
            answer = YES if self.secret(text.seed, state) < state.number else NO
            left = after(state, answer).size
            return Reply([answer], reward=math.log(state.size / left) / math.log(self.numbers))
        if state.phase == "guessed":
            hit = self.secret(text.seed, state) == number_of(text.turn[-1])
            return Reply([RIGHT if hit else WRONG], reward=float(hit), ends=True)
        return Reply([WHAT])

    def secret(self, seed: int, state: State) -> int:
        """Return the number of the episode with this seed: the first of all numbers, in an order
        drawn from the seed, that the answers so far leave.

        It stays the same within an episode, whose answers never exclude it. Where a text goes on
        with another seed, it is drawn anew, and uniformly, from the numbers that are left.
        """
        order = 1 + np.random.default_rng(seed).permutation(self.numbers)
        return next(int(number) for number in order if state.possible(number))


def after(state: State, token: int) -> State:
    """Return the state after one more word, whoever wrote it."""
    if state.phase in ("right", "wrong"):
        return state
    if state.phase == "asked" and token in (YES, NO):
        return _told(state, token == YES)
    if state.phase == "guessed" and token in (RIGHT, WRONG):
        return State("right" if token == RIGHT else "wrong")
    if token in (BELOW, IS):
        return state.within(WORDS[token])
    number = number_of(token)
    return _named(state, number) if number > 0 else state.within("ready")


def number_of(token: int) -> int:
    """Return the number that a word is; 0 or less where it is none."""
    return token - len(WORDS) + 1


def reply_probs(state: State) -> list[float]:
    """Return the probability of each of `REPLIES`, where every number that is possible is equally
    likely."""
    if state.phase == "asked":
        below = (state.number - state.low) / state.size
        return [below, 1 - below, 0, 0, 0]
    if state.phase == "guessed":
        right = float(state.possible(state.number)) / state.size
        return [0, 0, right, 1 - right, 0]
    return [0, 0, 0, 0, 1]


def _told(state: State, below: bool) -> State:
    """Return the state after an answer. One that contradicts those before it changes nothing: the
    environment gives none, but a text from elsewhere may hold it."""
    cut = state._replace(phase="ready", number=0)
    told = cut._replace(high=state.number - 1) if below else cut._replace(low=state.number)
    return told if told.size > 0 else cut


def _named(state: State, number: int) -> State:
    """Return the state after a number: a question, a guess, or neither."""
    if state.phase == "below":
        return state.within("asked", min(max(number, state.low), state.high + 1))
    if state.phase == "is":
        return state.within("guessed", state.low if state.possible(number) else 0)
    return state.within("puzzled")


@cache
def _automaton(numbers: int) -> tuple[list[State], np.ndarray]:
    """Return all states, the start first, and the number of the state that follows each of them and
    each word, (Q, V) int64."""
    states = [State("ready", 1, numbers), State("right"), State("wrong")]
    number = {state: i for i, state in enumerate(states)}
    rows = []
    # The list of states grows while it is read: it is the queue of a breadth-first search.
    for state in states:
        row = [after(state, token) for token in range(len(WORDS) + numbers)]
        for one in row:
            if one not in number:
                number[one] = len(states)
                states.append(one)
        rows.append([number[one] for one in row])
    return states, np.array(rows)
