"""DelayedKey-v0: take the right key at the beginning, open the door at the end.

The first word should be one of several keys, the good one, and the last word the door; what lies
between does not matter. So the first choice is rewarded `max_new_tokens` - 1 words later. Longer
texts are harder to learn and as likely to succeed by chance: under the reference the good key comes
first with probability 1 / `num_keys` exactly, and the door after any word with `door_mass`, by
default 1/8 * 1/32 = 1/256 together.
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
"""Of all first words that are no key, together; a reference must be able to emit everything."""


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 64,
    num_keys: int = 8,
    door_mass: float = 1 / 32,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Scores 1 if the good key comes first and the door last, else 0.

    Args:
        max_new_tokens: T, 2 to 128: the delay.
        vocab_size: V, at least `num_keys` + 3.
        num_keys: 2 or more. Which key is good depends on `task_seed`.
        door_mass: the reference's probability of the door after any word, 0.0001 to 0.5.
        task_seed: of the reference and of the good key.
        device: where the models are.

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
    """The id of the good key; keys are 1..`num_keys`."""
    return 1 + int(seeded(task_seed, num_keys).integers(num_keys))


def with_mass(rows: np.ndarray, token: int, mass: float) -> np.ndarray:
    """`rows` (n, V) of probabilities with exactly `mass` on `token` and the others scaled to the
    rest."""
    rows = rows * (1 - mass) / (1 - rows[:, [token]])
    rows[:, token] = mass
    return rows


def first_probs(vocab_size: int, num_keys: int, good: int) -> np.ndarray:
    """Of the first word, (V,): a key."""
    others = vocab_size - num_keys
    probs = np.full(vocab_size, OTHER_FIRST_MASS / others)
    probs[1 : num_keys + 1] = (1 - 1 / num_keys - OTHER_FIRST_MASS) / (num_keys - 1)
    probs[good] = 1 / num_keys
    return probs
