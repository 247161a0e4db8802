"""DelayedKey-v0: take the right key at the beginning, open the door at the end.

## Description

The first word should be one of several keys, the good one, and the last word the door. What lies
between does not matter, so the first choice is rewarded `max_new_tokens` - 1 words later. Longer
texts are harder to learn, but success by chance stays as likely: under the reference the good key
comes first with probability 1 / `num_keys` exactly, and the door follows any word with probability
`door_mass`, by default 1/8 * 1/32 = 1/256 together. The reference is a random bigram over the words
(`task_seed`), and the policy starts from it.

## Observation Space

`Dict(tokens=Box(0, 63, (17,), int64), length=Discrete(18), prompt_length=Discrete(18))`: the prompt
and the response so far, padded on the right. P = 1 and T = 16 by default (`max_new_tokens`), so
that L = P + T = 17. With `observation="features"` it is `Box(-inf, inf, (86,), float32)`: one-hot
automaton state (4), last token (65) and step (17), which is all that the optimum depends on.

## Action Space

`Discrete(64)`: the next word (`vocab_size`).

## Rewards

The score of a text is 1 if the good key comes first and the door last, else 0; an automaton
computes it. The default design is "terminal": the score at the last word, and the KL term at every
word. `infos["gold"]` is the score.

The optimum is known exactly (`envs.unwrapped.oracle`), so `reward="oracle"` exists and an agent's
regret is a number. With the defaults and `kl_coef=0.05`, J = E[score] - 0.05 KL is 0.723 at the
optimum (J*) and 0.004 for the reference.

## Starting State

The prompt is always "<s>", and the response is empty.

## Episode End

There is no stop token: a text ends when it has T words, and is scored there. That is a termination;
with `score_truncated=False` it is a truncation without a score.

## Arguments

```python
envs = gym.make_vec("tokenenv/DelayedKey-v0", num_envs=64, max_new_tokens=32, num_keys=8)
```

## Version History

* v0: initial version.
"""

import numpy as np

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

LOST, INSIDE, AT_DOOR = "lost", "inside", "at the door"
OTHER_FIRST_MASS = 1e-4
"""The reference's probability of all first words that are no key, together. It is above 0 because a
reference must be able to emit every word."""


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 64,
    num_keys: int = 8,
    door_mass: float = 1 / 32,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Make the task: a text scores 1 if the good key comes first and the door last, else 0.

    Args:
        max_new_tokens: T, the words of a text, 2 to 128. The key is rewarded T - 1 words later.
        vocab_size: V, the number of different words, `num_keys` + 3 to 512.
        num_keys: the number of keys, 2 to 256. `task_seed` decides which of them is good.
        door_mass: the reference's probability of the door after any word, 0.0001 to 0.5.
        task_seed: the seed from which the reference and the good key are drawn, 0 or more.
        device: where the models are put.

    Raises:
        InvalidArgument: an option is out of range.
    """
    check_range("max_new_tokens", max_new_tokens, 2, MAX_TOKENS)
    check_range("num_keys", num_keys, 2, 256)
    check_range("door_mass", door_mass, 0.0001, 0.5)
    words = vocabulary([*(f"key{i}" for i in range(1, num_keys + 1)), "door"], vocab_size)
    probs = random_table(vocab_size, seeded(task_seed))
    good, door = good_key(num_keys, task_seed), words.index("door")
    probs[:-1] = with_mass(probs[:-1], door, door_mass)
    probs[-1] = first_probs(vocab_size, num_keys, good)

    def step(state: str, token: int) -> str:
        if state == "start":
            return INSIDE if token == good else LOST
        if state == LOST:
            return LOST
        return AT_DOOR if token == door else INSIDE

    automaton = explore("start", step, lambda state: float(state == AT_DOOR), vocab_size, device)
    return automaton_task(words, probs, automaton, max_new_tokens)


def good_key(num_keys: int, task_seed: int) -> int:
    """Return the id of the good key; the keys have the ids 1 to `num_keys`."""
    return 1 + int(seeded(task_seed, num_keys).integers(num_keys))


def with_mass(rows: np.ndarray, token: int, mass: float) -> np.ndarray:
    """Rescale `rows` (n, V) of probabilities so that `token` has exactly `mass` in each."""
    rows = rows * (1 - mass) / (1 - rows[:, [token]])
    rows[:, token] = mass
    return rows


def first_probs(vocab_size: int, num_keys: int, good: int) -> np.ndarray:
    """Return the probabilities (V,) of the first word, which is nearly always a key."""
    others = vocab_size - num_keys
    probs = np.full(vocab_size, OTHER_FIRST_MASS / others)
    probs[1 : num_keys + 1] = (1 - 1 / num_keys - OTHER_FIRST_MASS) / (num_keys - 1)
    probs[good] = 1 / num_keys
    return probs
