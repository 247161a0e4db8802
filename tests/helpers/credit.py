"""Hand-made finished texts and scorers for the designs that redistribute a score."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import fakes
import numpy as np
import torch
from torch import Tensor

from tokenenv.models.automaton import Automaton
from tokenenv.models.heads import make_scorer
from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context
from tokenenv.types import Scorer, Task, TextIds, TokenSpec

T = 9
LENGTHS = ((2, 9, 0), (4, 1, 0), (1, 6, 3), (3, 5, 4), (5, 7, 0), (1, 2, 0), (2, 8, 1))
"""How many tokens the prompt, the response, and the response's prefix, which earns nothing, have."""


def texts(seed: int = 0) -> tuple[list[TextIds], list[int]]:
    """Return random texts with the lengths above, and the length of each one's prefix."""
    rng = np.random.default_rng(seed)
    pairs = [
        tuple(rng.integers(3, fakes.VOCAB_SIZE, size).tolist() for size in sizes[:2])
        for sizes in LENGTHS
    ]
    return pairs, [prefix_length for *_, prefix_length in LENGTHS]


def finished(
    pairs: list[TextIds],
    prefix_length: list[int],
    score: Tensor | None,
    padding: int = 2,
    own: list[np.ndarray] | None = None,
    **options: Any,
) -> FinishedTexts:
    """Return texts as reward terms see them, with some more padding than is needed; `own` are masks
    of the response tokens that are the policy's."""
    ids = [np.asarray([*prompt, *response]) for prompt, response in pairs]
    tokens = np.zeros((len(ids), max(map(len, ids)) + padding), dtype=np.int64)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
    prompt_length = np.asarray([len(prompt) for prompt, _ in pairs])
    length = np.asarray([len(text) for text in ids])
    return FinishedTexts(
        tokens=torch.from_numpy(tokens),
        length=length,
        prompt_length=prompt_length,
        prefix_length=np.asarray(prefix_length),
        score=score,
        ids=ids,
        written=None if own is None else written_of(pairs, own),
        **options,
    )


def written_of(pairs: list[TextIds], own: list[np.ndarray]) -> list[np.ndarray]:
    """Return for each text the mask of the tokens that the environment wrote, with some more
    entries than the text has tokens."""
    return [
        np.concatenate([np.zeros(len(prompt), bool), ~mask, np.zeros(3, bool)])
        for (prompt, _), mask in zip(pairs, own, strict=True)
    ]


def bound(term: Any, scorer: Any, max_batch_tokens: int = 30) -> Any:
    """Bind a term to an env with this scorer, and return it."""
    spec = TokenSpec(None, fakes.VOCAB_SIZE, 0, (1,), 5, T)
    task = Task(
        tokenizer=None,
        reference=object(),
        prompts=[],
        max_prompt_tokens=5,
        max_new_tokens=T,
        stop_token_ids=(1,),
        scorer=scorer,
    )
    options = {"kl_coef": 0.1, "max_batch_tokens": max_batch_tokens}
    term.bind(Context(spec, task, torch.device("cpu"), **options))
    return term


def placed(
    term: Any, scorer: Any, pairs: list[TextIds], prefix_length: list[int], **options: Any
) -> Tensor:
    """Return what a term places on texts, (B, T)."""
    texts = finished(pairs, prefix_length, score_texts(scorer, pairs))
    return bound(term, scorer, **options).place(texts, T)


class Words:
    """Scores finished texts by any function of their tokens."""

    per_token = False

    def __init__(self, score: Callable[[list[int], list[int]], float]) -> None:
        self.score = score

    def token_scores(self, texts: list[TextIds], width: int) -> Tensor:
        out = torch.zeros(len(texts), width)
        out[:, -1] = torch.tensor([self.score(prompt, response) for prompt, response in texts])
        return out


def _automaton() -> Scorer:
    rng = np.random.default_rng(1)
    model = Automaton(rng.integers(0, 11, (11, fakes.VOCAB_SIZE)), rng.normal(size=11))
    return Scorer(model, model.score, per_token=False)


def smooth(kind: str) -> Scorer:
    """A LayerNorm model: its score changes evenly along the line from zero embeddings."""
    return make_scorer(fakes.reward_model(kind, "gpt2"))


SCORERS: dict[str, Callable[[], Any]] = {
    "token": lambda: smooth("token"),
    "sequence": lambda: make_scorer(fakes.reward_model("sequence")),
    "automaton": _automaton,
    "text": lambda: Words(
        lambda prompt, response: sum(prompt) / 50 + sum(a * b for a, b in pairwise(response)) / 900
    ),
}
TRANSFORMERS = ("token", "sequence")


def close(actual: Any, expected: Any) -> None:
    """Equal up to float32 rounding of the largest number."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max())
    )
