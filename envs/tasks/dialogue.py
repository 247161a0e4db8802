"""Dialogue-v0: raise the mood of somebody who answers.

## Description

The policy talks to somebody who has a mood, from the worst, "mood1", to the best. A turn of the
policy's ends with its word ".", and the other then answers with a mood. What pleases depends on the
mood: in "mood2" it is the word "kind2". A turn that has the word which pleases raises the mood by
one, any other turn lowers it by one, and with probability `noise` the answer is any of the moods,
whatever has been said. Where the mood changes, the other says "oh" first, so that one or two words
are written. So the policy must read the answers, and say something pleasing before it ends a turn;
it may also keep silent, since a text need not end with an answer. The reference is a random bigram
over the words (`task_seed`), and the policy starts from it.

## Observation Space

TODO

## Action Space

`Discrete(32)`: the policy's next word (`vocab_size`).

## Rewards

TODO

## Starting State

The prompt is always "<s>", and the response is empty. The mood is the worst.

## Episode End

There is no stop token: a text ends when the policy has written T words and the last one, where it
ends a turn, has been answered. It is scored there. That is a termination; with
`score_truncated=False` it is a truncation without a score.

## Arguments

```python
envs = gym.make_vec("tokenenv/Dialogue-v0", num_envs=64, max_new_tokens=32, noise=0.0)
```

## Version History

* v0: initial version.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenenv.envs.automata.automata import (
    automaton_task,
    check_range,
    random_table,
    seeded,
    vocabulary,
)
from tokenenv.envs.automata.source import Source
from tokenenv.envs.tasks.delayed_key import with_mass
from tokenenv.models.automaton import Automaton, reachable
from tokenenv.types import Task

MAX_TOKENS = 64
PAUSE, OH = ".", "oh"


class Talk(NamedTuple):
    """What a dialogue has come to."""

    mood: int
    """0 is the worst."""
    pleased: bool = False
    """Whether this turn of the policy's has the word that pleases in this mood."""
    answers: bool = False
    """Whether the turn has ended, and the other's answer is read."""


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 32,
    num_moods: int = 4,
    noise: float = 0.1,
    pause_mass: float = 1 / 8,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Make the task: a text scores the mood at its end, from 0 for the worst to 1 for the best.

    Args:
        max_new_tokens: T, the policy's words in a text, 2 to 64.
        vocab_size: V, the number of different words, 2 `num_moods` + 4 to 512.
        num_moods: the number of moods, 2 to 8.
        noise: the probability with which an answer is any of the moods, 0 to 1. At 0 the answers
            are a function of what the policy says.
        pause_mass: the reference's probability of "." after any word, 0.0001 to 0.5.
        task_seed: the seed from which the reference is drawn, 0 or more.
        device: where the models are put.

    Raises:
        InvalidArgument: an option is out of range.
    """
    check_range("max_new_tokens", max_new_tokens, 2, MAX_TOKENS)
    check_range("num_moods", num_moods, 2, 8)
    check_range("noise", noise, 0.0, 1.0)
    check_range("pause_mass", pause_mass, 0.0001, 0.5)
    moods, kinds = ([f"{word}{i + 1}" for i in range(num_moods)] for word in ("mood", "kind"))
    words = vocabulary([PAUSE, OH, *moods, *kinds], vocab_size)
    probs = with_mass(random_table(vocab_size, seeded(task_seed)), words.index(PAUSE), pause_mass)
    pause, mood_ids, kind_ids = words.index(PAUSE), ids(words, moods), ids(words, kinds)

    def step(talk: Talk, word: int) -> Talk:
        if talk.answers:
            return Talk(mood_ids.index(word)) if word in mood_ids else talk
        if word == kind_ids[talk.mood]:
            return talk._replace(pleased=True)
        return talk._replace(answers=word == pause)

    talks, transitions = reachable(Talk(0), step, vocab_size)
    payoff = np.array([talk.mood / (num_moods - 1) for talk in talks])
    automaton = Automaton(transitions, payoff, device)
    oh = words.index(OH)
    # The first replies keep the mood of the same number, the others change it.
    replies = [[mood] for mood in mood_ids] + [[oh, mood] for mood in mood_ids]
    answers = np.array([answer_probs(talk, num_moods, noise) for talk in talks])
    source = Source(automaton, replies, answers, [pause])
    return automaton_task(words, probs, automaton, max_new_tokens, source)


def answer_probs(talk: Talk, num_moods: int, noise: float) -> np.ndarray:
    """Return the probabilities (2 M,) of the replies: that the mood stays, if it is that of the
    number, then that it becomes that."""
    probs = np.full(num_moods, noise / num_moods)
    target = talk.mood + (1 if talk.pleased else -1)
    probs[min(max(target, 0), num_moods - 1)] += 1 - noise
    stays = np.arange(num_moods) == talk.mood
    return np.concatenate([np.where(stays, probs, 0.0), np.where(stays, 0.0, probs)])


def ids(words: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Return the token ids of some of the words."""
    return [words.index(word) for word in chosen]
