"""Brackets-v0: open brackets and close them again.

## Description

A text scores by its closed pairs of brackets, if every bracket that was opened has been closed by
its own kind, in order, with at most `depth` open at a time. Any number of other words may stand
anywhere. One wrong bracket is final. More `pairs` make the full score rarer, and longer texts make
a mistake likelier. The reference is a random bigram over the words (`task_seed`), and the policy
starts from it.

## Observation Space

`Dict(tokens=Box(0, 63, (17,), int64), length=Discrete(18), prompt_length=Discrete(18))`: the prompt
and the response so far, padded on the right. P = 1 and T = 16 by default (`max_new_tokens`), so
that L = P + T = 17. With `observation="features"` it is `Box(-inf, inf, (128,), float32)`: one-hot
automaton state (46), last token (65) and step (17), which is all that the optimum depends on.

## Action Space

`Discrete(64)`: the next word (`vocab_size`).

## Rewards

The score of a text is the number of closed pairs / `pairs`, 0 to 1 (further pairs add nothing), and
0 where a bracket is open at the end or was wrong; an automaton computes it. The default design is
"terminal": the score at the last word, and the KL term at every word. `infos["gold"]` is the score.

The optimum is known exactly (`envs.unwrapped.oracle`), so `reward="oracle"` exists and an agent's
regret is a number. With the defaults and `kl_coef=0.05`, J = E[score] - 0.05 KL is 0.608 at the
optimum (J*) and 0.013 for the reference.

## Starting State

The prompt is always "<s>", and the response is empty.

## Episode End

There is no stop token: a text ends when it has T words, and is scored there. That is a termination;
with `score_truncated=False` it is a truncation without a score.

## Arguments

```python
envs = gym.make_vec("tokenenv/Brackets-v0", num_envs=64, max_new_tokens=32, types=2, pairs=6)
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

KINDS = ("()", "[]", "{}", "<>")
State = tuple[str, int]
"""The brackets that are open, and the pairs closed so far."""
DEAD: State = ("dead", 0)


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 64,
    types: int = 2,
    depth: int = 3,
    pairs: int = 2,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Make the task: a text scores its closed pairs / `pairs`, 0 to 1, or 0 after a mistake.

    Args:
        max_new_tokens: T, the words of a text, 2 * `pairs` to 128.
        vocab_size: V, the number of different words, 2 * `types` + 2 to 512.
        types: the kinds of brackets, 1 to 4: the first ones of ( ), [ ], { } and < >.
        depth: the most brackets that may be open at a time, 1 to 4.
        pairs: the closed pairs that make the full score, 1 to 8.
        task_seed: the seed from which the reference is drawn, 0 or more.
        device: where the models are put.

    Raises:
        InvalidArgument: an option is out of range.
    """
    check_range("types", types, 1, len(KINDS))
    check_range("depth", depth, 1, 4)
    check_range("pairs", pairs, 1, 8)
    check_range("max_new_tokens", max_new_tokens, 2 * pairs, MAX_TOKENS)
    words = vocabulary("".join(KINDS[:types]), vocab_size)
    closing = {kind[0]: kind[1] for kind in KINDS[:types]}

    def step(state: State, token: int) -> State:
        (opened, closed), word = state, words[token]
        if state == DEAD:
            return DEAD
        if word in closing:
            return (opened + word, closed) if len(opened) < depth else DEAD
        if word in closing.values():
            matches = opened and closing[opened[-1]] == word
            return (opened[:-1], min(closed + 1, pairs)) if matches else DEAD
        return state

    def payoff(state: State) -> float:
        opened, closed = state
        return 0.0 if opened else closed / pairs

    automaton = explore(("", 0), step, payoff, vocab_size, device)
    return automaton_task(
        words, random_table(vocab_size, seeded(task_seed)), automaton, max_new_tokens
    )
