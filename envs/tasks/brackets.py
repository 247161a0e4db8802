"""Brackets-v0: open brackets and close them again.

A text scores by its closed pairs, up to `pairs` of them, if every bracket that was opened has been
closed by its own kind, in order and at most `depth` at a time; any number of other words may stand
anywhere. One wrong bracket is final. More `pairs` make the full score rarer, longer texts make a
mistake likelier.
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
    """Scores closed pairs / `pairs`, 0 to 1, if no bracket is open or wrong, else 0.

    Args:
        max_new_tokens: T, 2 * `pairs` to 128.
        vocab_size: V, at least 2 * `types` + 2.
        types: kinds of brackets, 1 to 4, of ( ), [ ], { }, < >.
        depth: brackets that may be open at a time, 1 to 4.
        pairs: closed pairs that count, 1 to 8.
        task_seed: of the reference.
        device: where the models are.

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
