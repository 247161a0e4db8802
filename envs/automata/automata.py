"""The parts that automaton tasks share: a random bigram as the reference, and a score that a finite
automaton computes from the text.

Texts have exactly `max_new_tokens` tokens of the policy's: there is no stop token, and a text is
scored where it is cut. A source may answer. The prompt is always "<s>". docs/your-task.md shows how
to make such a task.
"""

from collections.abc import Sequence
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.envs.automata.source import Source
from tokenenv.envs.automata.teacher import OptimalPolicy
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.models.bigram import Bigram
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.types import Scorer, Task, TrunkStates

START = "<s>"
MAX_VOCAB, MAX_TOKENS = 512, 128
KL_COEF = 0.05
"""Reward per nat."""
CONCENTRATION, UNIFORM_SHARE = 0.3, 0.25
"""Of the random reference: the Dirichlet parameter, and the share of the uniform distribution that
keeps every word possible."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `InvalidArgument` unless `low` <= `value` <= `high`; where the bounds are whole numbers
    the value must be one too."""
    if isinstance(low, int) and not isinstance(value, int):
        raise InvalidArgument(f"{name}={value!r} must be a whole number, {low} to {high}.")
    if not isinstance(value, Real) or not low <= value <= high:
        raise InvalidArgument(
            f"{name}={value} is not allowed; it must lie between {low} and {high}."
        )


def vocabulary(special: Sequence[str], vocab_size: int) -> list[str]:
    """Return V words: id 0 is "<s>", then come the `special` words, then "w1", "w2", ..."""
    check_range("vocab_size", vocab_size, len(special) + 2, MAX_VOCAB)
    return [START, *special, *(f"w{i}" for i in range(1, vocab_size - len(special)))]


def random_table(vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the reference p(next | last), (V + 1, V) float64. The last row is for the first word.

    Each row is three quarters a draw from Dirichlet(0.3), and one quarter uniform.
    """
    rows = rng.dirichlet(np.full(vocab_size, CONCENTRATION), size=vocab_size + 1)
    return (1 - UNIFORM_SHARE) * rows + UNIFORM_SHARE / vocab_size


def seeded(task_seed: int, *stream: int) -> np.random.Generator:
    """Return the random generator of a task's reference, or with `stream` that of something else,
    so that the reference stays the same when other things are drawn."""
    check_range("task_seed", task_seed, 0, 2**63 - 1)
    return np.random.default_rng([task_seed, *stream])


def automaton_task(
    words: Sequence[str],
    probs: np.ndarray,
    automaton: Automaton,
    max_new_tokens: int,
    source: Source | None = None,
) -> Task:
    """Make the task in which an automaton scores texts and a bigram is the reference.

    Args:
        words: V of them; word i has the token id i.
        probs: p(next | last), (V + 1, V), positive; the last row is for the first word.
        automaton: reads V tokens; its payoff in the last state is the score of a text.
        max_new_tokens: T, the tokens of every text that are the policy's.
        source: what writes into the texts, and reads them with this automaton; None: nothing does.
    """
    reference = Bigram(probs, automaton.device)
    oracle = AutomatonOracle(automaton, reference, max_new_tokens, source)
    return Task(
        tokenizer=word_tokenizer(tuple(words)),
        reference=reference,
        model=ResidualLM(reference).requires_grad_(False),
        prompts=[[0]],
        max_prompt_tokens=1,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(),
        respond=None if source is None else source.respond,
        turn_end_token_ids=None if source is None else source.turn_end_token_ids,
        # A text in which every token is answered fits, so that this limit never cuts one.
        max_context_tokens=None if source is None else oracle.max_length,
        scorer=Scorer(model=automaton, head=automaton.score, per_token=False),
        gold="score",
        oracle=oracle,
        teacher=OptimalPolicy(oracle, KL_COEF),
        features=OneHot(automaton, reference, max_new_tokens),
        num_features=automaton.num_states + len(probs) + max_new_tokens + 1,
        reward="terminal",
        kl_coef=KL_COEF,
    )


class OneHot:
    """The features of an automaton task, all that the optimum depends on: one-hot automaton state
    (Q), last token (V + 1, the last one for no token yet) and step (T + 1)."""

    def __init__(self, automaton: Automaton, reference: Bigram, max_new_tokens: int) -> None:
        self.automaton, self.reference = automaton, reference
        self.offsets = np.cumsum(
            [0, automaton.num_states, reference.vocab_size + 1, max_new_tokens + 1]
        )

    def __call__(self, states: TrunkStates, step: Tensor) -> Tensor:
        """Return the features of K texts, (K, Q + V + T + 2) float32."""
        columns = (states[self.automaton], states[self.reference], step)
        starts = map(int, self.offsets[:-1])
        hot = [column + start for column, start in zip(columns, starts, strict=True)]
        size = (len(step), int(self.offsets[-1]))
        zeros = torch.zeros(size, dtype=torch.float32, device=step.device)
        return zeros.scatter_(1, torch.stack(hot, dim=1), 1.0)


@cache
def word_tokenizer(words: tuple[str, ...]) -> Any:
    """Make a transformers tokenizer that splits at spaces; id i is `words[i]`, and unknown words
    are read as `words[0]`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    start = words[0]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=start))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=start, pad_token=start, unk_token=start
    )
