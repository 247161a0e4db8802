"""Negation-v0: say good things, and mind the "not" before a word.

A positive word counts 1 and a negative one -1; after "not" it counts the other way round, and "not
not" is nothing. The sum stays within `limit` on both sides: what goes beyond is lost. Every text
gets a score; a higher `limit` or a longer text makes the reward rarer or the credit harder to give.
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
    """Scores the sum / `limit`, -1 to 1: 6 positive and 12 negative words, 2 that negate.

    Args:
        max_new_tokens: T, 1 to 128.
        vocab_size: V, at least 22.
        limit: where the sum stays, 1 to 16.
        task_seed: of the reference.
        device: where the models are.

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
