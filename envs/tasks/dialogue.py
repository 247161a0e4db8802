"""Dialogue-v0: cheer up somebody who answers.

## Description

The policy talks to somebody who has a mood, from the worst, "mood1", to the best. A turn of the
policy's ends with its word ".", and the other then answers with a mood. What pleases depends on the
mood: in "mood2" it is the word "kind2". A turn that has the word which pleases raises the mood by
one, and any other turn lowers it by one. With probability `noise` the answer is any of the moods
instead, whatever has been said; with `noise=0` the answers are a function of what the policy says.
Where the mood changes, the other says "oh" first, so that an answer has one or two words. So the
policy must read the answers, say what pleases before it ends a turn, and stop asking while the mood
is good: a text need not end with an answer. The reference is a random bigram over the words
(`task_seed`), and the policy starts from it.

## Observation Space

`Dict(tokens=Box(0, 31, (49,), int64), length=Discrete(50), prompt_length=Discrete(50),
own_mask=MultiBinary(49))`: the prompt and the response so far, padded on the right, and which words
are the policy's. P = 1 and T = 16 by default (`max_new_tokens`), and L = 49 has room for an answer
of two words to every word. With `observation="features"` it is `Box(-inf, inf, (66,), float32)`:
one-hot automaton state (16), last token (33) and step (17), which is all that the optimum depends
on.

## Action Space

`Discrete(32)`: the policy's next word (`vocab_size`).

## Rewards

The score of a text is the mood at its end, from 0 for the worst to 1 for the best; an automaton
computes it from the words of both. The default design is "terminal": the score at the last word,
and the KL term at every word of the policy's. `infos["gold"]` is the score. The turn reward, which
`reward="turn"` pays, is what a turn and its answer have changed in the score, and adds up to it.

The optimum is known exactly (`envs.unwrapped.oracle`): it is soft over the policy's words, and an
expectation over what is answered. So `reward="oracle"` exists and an agent's regret is a number.
With the defaults and `kl_coef=0.05`, J = E[score] - 0.05 KL is 0.511 at the optimum (J*) and 0.094
for the reference.

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
