"""PlantedPhrase-v0: find the phrase that is worth something.

## Description

One phrase of a few words scores 1 wherever it occurs in the text. Decoy phrases of the same length
score 0.2 where the phrase does not occur, so that a search that settles for the first reward stays
there. Longer phrases are exponentially harder to find, and longer texts make it easier. The
reference is a random bigram over the words (`task_seed`), and the policy starts from it.

## Observation Space

`Dict(tokens=Box(0, 63, (17,), int64), length=Discrete(18), prompt_length=Discrete(18))`: the prompt
and the response so far, padded on the right. P = 1 and T = 16 by default (`max_new_tokens`), so
that L = P + T = 17. With `observation="features"` it is `Box(-inf, inf, (95,), float32)`: one-hot
automaton state (13), last token (65) and step (17), which is all that the optimum depends on.

## Action Space

`Discrete(64)`: the next word (`vocab_size`).

## Rewards

The score of a text is 1 if the phrase occurs in it, 0.2 if only a decoy does, else 0; an automaton
computes it. The default design is "terminal": the score at the last word, and the KL term at every
word. `infos["gold"]` is the score. `tokenenv.envs.tasks.planted_phrase.phrases` says which token
ids the phrase and its decoys have.

The optimum is known exactly (`envs.unwrapped.oracle`), so `reward="oracle"` exists and an agent's
regret is a number. With the defaults and `kl_coef=0.05`, J = E[score] - 0.05 KL is 0.699 at the
optimum (J*) and 0.004 for the reference.

## Starting State

The prompt is always "<s>", and the response is empty.

## Episode End

There is no stop token: a text ends when it has T words, and is scored there. That is a termination;
with `score_truncated=False` it is a truncation without a score.

## Arguments

```python
envs = gym.make_vec("tokenenv/PlantedPhrase-v0", num_envs=64, max_new_tokens=32, phrase_length=3)
```

## Version History

* v0: initial version.
"""

from math import perm

from tokenenv.envs.automata.automata import (
    MAX_TOKENS,
    MAX_VOCAB,
    automaton_task,
    check_range,
    random_table,
    seeded,
    vocabulary,
)
from tokenenv.models.automaton import explore
from tokenenv.types import Task

DECOY_SCORE = 0.2
Phrase = tuple[int, ...]
State = tuple[Phrase, float]
"""The part of a phrase that the text ends with, and the best score so far."""


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 64,
    phrase_length: int = 2,
    num_decoys: int = 4,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Make the task: a text scores 1 if the phrase occurs in it, 0.2 if only a decoy does, else 0.

    Args:
        max_new_tokens: T, the words of a text, `phrase_length` to 128.
        vocab_size: V, the number of different words, 4 to 512.
        phrase_length: the words in the phrase and in each decoy, 2 to 4 and fewer than V.
        num_decoys: the number of decoy phrases, 0 to 8.
        task_seed: the seed from which the reference and the phrases are drawn, 0 or more.
        device: where the models are put.

    Raises:
        InvalidArgument: an option is out of range.
    """
    words = vocabulary([], vocab_size)
    planted, *decoys = phrases(vocab_size, phrase_length, num_decoys, task_seed)
    check_range("max_new_tokens", max_new_tokens, phrase_length, MAX_TOKENS)
    worth = dict.fromkeys(decoys, DECOY_SCORE) | {planted: 1.0}

    def step(state: State, token: int) -> State:
        begun, best = state
        text = (*begun, token)
        best = max(best, worth.get(text, 0.0))
        return (longest_beginning(text, worth), best) if best < 1.0 else ((), best)

    start: State = ((), 0.0)
    automaton = explore(start, step, lambda state: state[1], vocab_size, device)
    return automaton_task(
        words, random_table(vocab_size, seeded(task_seed)), automaton, max_new_tokens
    )


def phrases(
    vocab_size: int = 64, phrase_length: int = 2, num_decoys: int = 4, task_seed: int = 0
) -> list[Phrase]:
    """Return the planted phrase and then its decoys, as token ids.

    All phrases are different, and none repeats a word.
    """
    check_range("vocab_size", vocab_size, 4, MAX_VOCAB)
    check_range("phrase_length", phrase_length, 2, min(4, vocab_size - 1))
    check_range("num_decoys", num_decoys, 0, min(8, perm(vocab_size - 1, phrase_length) - 1))
    rng = seeded(task_seed, phrase_length)
    found: dict[Phrase, None] = {}
    while len(found) <= num_decoys:
        found[tuple((1 + rng.permutation(vocab_size - 1)[:phrase_length]).tolist())] = None
    return list(found)


def longest_beginning(text: Phrase, wanted: dict[Phrase, float]) -> Phrase:
    """Return the longest end of `text` that is the beginning of a wanted phrase, or ().

    All phrases have one length. These ends are the states of the automaton of Aho and Corasick
    (1975), which finds several phrases in one pass.
    """
    tails = (text[i:] for i in range(len(text)))
    return next(
        (
            tail
            for tail in tails
            if any(len(tail) < len(p) and p[: len(tail)] == tail for p in wanted)
        ),
        (),
    )
