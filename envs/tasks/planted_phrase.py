"""PlantedPhrase-v0: find the phrase that is worth something.

One phrase of a few words scores 1 wherever it occurs in the text. Decoy phrases of the same length
score 0.2 if it does not, so that a search that settles for the first reward stays there. Longer
phrases are exponentially harder to find, longer texts easier.
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
"""The beginning of a phrase that was read last, and the best score so far."""


def task(
    *,
    max_new_tokens: int = 16,
    vocab_size: int = 64,
    phrase_length: int = 2,
    num_decoys: int = 4,
    task_seed: int = 0,
    device: str = "cpu",
) -> Task:
    """Scores 1 if the phrase occurs in the text, 0.2 if only a decoy does, else 0. `phrases` says
    which they are.

    Args:
        max_new_tokens: T, `phrase_length` to 128.
        vocab_size: V, at least 4.
        phrase_length: words in the phrase and in each decoy, 2 to 4 and fewer than V.
        num_decoys: 0 to 8.
        task_seed: of the reference and of the phrases.
        device: where the models are.

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
    """The planted phrase and its decoys as token ids: different phrases, none of which repeats a
    word."""
    check_range("vocab_size", vocab_size, 4, MAX_VOCAB)
    check_range("phrase_length", phrase_length, 2, min(4, vocab_size - 1))
    check_range("num_decoys", num_decoys, 0, min(8, perm(vocab_size - 1, phrase_length) - 1))
    rng = seeded(task_seed, phrase_length)
    found: dict[Phrase, None] = {}
    while len(found) <= num_decoys:
        found[tuple((1 + rng.permutation(vocab_size - 1)[:phrase_length]).tolist())] = None
    return list(found)


def longest_beginning(text: Phrase, wanted: dict[Phrase, float]) -> Phrase:
    """The longest end of `text` with which one of the phrases, all of one length, begins (Aho and
    Corasick 1975)."""
    tails = (text[i:] for i in range(len(text)))
    return next(
        (
            tail
            for tail in tails
            if any(len(tail) < len(p) and p[: len(tail)] == tail for p in wanted)
        ),
        (),
    )
