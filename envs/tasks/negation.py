"""Negation-v0: say good things, and mind the "not" before a word.

## Description

A positive word counts 1 and a negative word -1. After "not" a word counts the other way round, and
"not not" cancels out. The sum stays between -`limit` and `limit`: what goes beyond is lost. Every
text gets a score. A higher `limit` makes the full score rarer, and a longer text makes it harder to
tell which word earned what. There are 6 positive words, 12 negative ones and 2 that negate. The
reference is a random bigram over the words (`task_seed`), and the policy starts from it.

## Observation Space

`Dict(tokens=Box(0, 63, (17,), int64), length=Discrete(18), prompt_length=Discrete(18))`: the prompt
and the response so far, padded on the right. P = 1 and T = 16 by default (`max_new_tokens`), so
that L = P + T = 17. With `observation="features"` it is `Box(-inf, inf, (100,), float32)`: one-hot
automaton state (18), last token (65) and step (17), which is all that the optimum depends on.

## Action Space

`Discrete(64)`: the next word (`vocab_size`).

## Rewards

The score of a text is the sum / `limit`, -1 to 1; an automaton computes it. The default design is
"terminal": the score at the last word, and the KL term at every word. `infos["gold"]` is the score.

The optimum is known exactly (`envs.unwrapped.oracle`), so `reward="oracle"` exists and an agent's
regret is a number. With the defaults and `kl_coef=0.05`, J = E[score] - 0.05 KL is 0.757 at the
optimum (J*) and -0.300 for the reference.

## Starting State

The prompt is always "<s>", and the response is empty.

## Episode End

There is no stop token: a text ends when it has T words, and is scored there. That is a termination;
with `score_truncated=False` it is a truncation without a score.

## Arguments

```python
envs = gym.make_vec("tokenenv/Negation-v0", num_envs=64, max_new_tokens=32, limit=8)
```

## Version History

* v0: initial version.
"""

from tokenenv.envs.automata.automata import (
    MAX_TOKENS,
    automaton_task,
    check_range,
    random_table,
    seeded,
    vocabulary,
)
from tokenenv.models.automaton import explore
from tokenenv.types import Task

POSITIVE, NEGATIVE, NOT = (
    [f"{word}{i}" for i in range(1, count + 1)]
    for word, count in (("good", 6), ("bad", 12), ("not", 2))
)


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 64,
    limit: int = 4,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Make the task: a text scores the sum of its words / `limit`, -1 to 1.

    Args:
        max_new_tokens: T, the words of a text, 1 to 128.
        vocab_size: V, the number of different words, 22 to 512.
        limit: the largest absolute value of the sum, 1 to 16.
        task_seed: the seed from which the reference is drawn, 0 or more.
        device: where the models are put.

    Raises:
        InvalidArgument: an option is out of range.
    """
    check_range("max_new_tokens", max_new_tokens, 1, MAX_TOKENS)
    check_range("limit", limit, 1, 16)
    words = vocabulary([*POSITIVE, *NEGATIVE, *NOT], vocab_size)
    value = [(word in POSITIVE) - (word in NEGATIVE) for word in words]
    negates = [word in NOT for word in words]

    def step(state: tuple[int, bool], token: int) -> tuple[int, bool]:
        total, negated = state
        if negates[token]:
            return total, not negated
        change = -value[token] if negated else value[token]
        return max(-limit, min(limit, total + change)), False

    automaton = explore((0, False), step, lambda state: state[0] / limit, vocab_size, device)
    return automaton_task(
        words, random_table(vocab_size, seeded(task_seed)), automaton, max_new_tokens
    )
