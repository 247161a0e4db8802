"""What the automaton tasks share: a random bigram as the reference, and a score that an automaton
reads off the text.

Texts have exactly `max_new_tokens` tokens: there is no stop token, and a text is scored where it is
cut. The prompt is "<s>".
"""

from collections.abc import Sequence
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.models.bigram import Bigram
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.types import Scorer, Task, TrunkStates

START = "<s>"
MAX_VOCAB, MAX_TOKENS = 512, 128
CONCENTRATION, UNIFORM_SHARE = 0.3, 0.25


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises `InvalidArgument` unless `low` <= `value` <= `high`; whole bounds ask for a whole
    number."""
    if isinstance(low, int) and not isinstance(value, int):
        raise InvalidArgument(f"{name}={value!r} must be a whole number, {low} to {high}.")
    if not isinstance(value, Real) or not low <= value <= high:
        raise InvalidArgument(
            f"{name}={value} is not allowed; it must lie between {low} and {high}."
        )


def vocabulary(special: Sequence[str], vocab_size: int) -> list[str]:
    """V words: id 0 is "<s>", then `special`, then "w1", "w2", ..."""
    check_range("vocab_size", vocab_size, len(special) + 2, MAX_VOCAB)
    return [START, *special, *(f"w{i}" for i in range(1, vocab_size - len(special)))]


def random_table(vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """p(next | last), (V + 1, V): three quarters Dirichlet(0.3), one quarter uniform; the last row
    is the start."""
    rows = rng.dirichlet(np.full(vocab_size, CONCENTRATION), size=vocab_size + 1)
    return (1 - UNIFORM_SHARE) * rows + UNIFORM_SHARE / vocab_size


def seeded(task_seed: int, *stream: int) -> np.random.Generator:
    """The generator that a task draws its reference from, or, with `stream`, something else."""
    check_range("task_seed", task_seed, 0, 2**63 - 1)
    return np.random.default_rng([task_seed, *stream])


def automaton_task(
    words: Sequence[str], probs: np.ndarray, automaton: Automaton, max_new_tokens: int
) -> Task:
    """The task of these V words with reference `probs` (V + 1, V), on the automaton's device."""
    reference = Bigram(probs, automaton.device)
    return Task(
        tokenizer=word_tokenizer(tuple(words)),
        reference=reference,
        model=ResidualLM(reference).requires_grad_(False),
        prompts=[[0]],
        max_prompt_tokens=1,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(),
        scorer=Scorer(model=automaton, head=automaton.score, per_token=False),
        gold="score",
        oracle=AutomatonOracle(automaton, reference, max_new_tokens),
        features=OneHot(automaton, reference, max_new_tokens),
        num_features=automaton.num_states + len(probs) + max_new_tokens + 1,
        reward="terminal",
        kl_coef=0.05,
    )


class OneHot:
    """One-hot automaton state (Q), last token (V + 1) and step (T + 1): all that the optimum
    depends on."""

    def __init__(self, automaton: Automaton, reference: Bigram, max_new_tokens: int) -> None:
        self.automaton, self.reference = automaton, reference
        self.offsets = np.cumsum(
            [0, automaton.num_states, reference.vocab_size + 1, max_new_tokens + 1]
        )

    def __call__(self, states: TrunkStates, step: Tensor) -> Tensor:
        """Features (K, Q + V + T + 2) float32."""
        columns = (states[self.automaton], states[self.reference], step)
        hot = torch.stack(
            [
                column + int(offset)
                for column, offset in zip(columns, self.offsets[:-1], strict=True)
            ],
            dim=1,
        )
        zeros = torch.zeros(
            len(step), int(self.offsets[-1]), dtype=torch.float32, device=step.device
        )
        return zeros.scatter_(1, hot, 1.0)


@cache
def word_tokenizer(words: tuple[str, ...]) -> Any:
    """A transformers tokenizer that splits at spaces; id i is `words[i]`, and unknown words are
    read as `words[0]`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    start = words[0]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=start))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=start, pad_token=start, unk_token=start
    )
