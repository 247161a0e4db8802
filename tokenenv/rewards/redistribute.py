"""The base of the designs that redistribute a score, and helpers that read parts of texts and place
numbers on tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from tokenenv.models.batching import upload
from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.types import Scorer, TextIds, TextScorer


class Redistribution(RewardTerm):
    """The base of a design that places the score of a finished text on its tokens.

    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen).
    """

    kind = "hindsight"
    needs = frozenset({"scorer"})
    preserves_return = True
    preserves_gradient = False
    pays_score = True

    def bind(self, context: Context) -> None:
        """Takes the scorer."""
        super().bind(context)
        assert context.scorer is not None
        self._scorer, self._max_batch_tokens = context.scorer, context.max_batch_tokens


def distinct_scores(
    scorer: Scorer | TextScorer, texts: Sequence[TextIds], max_batch_tokens: int
) -> Tensor:
    """Return the scores (n,) float32 of n texts; equal texts are scored once."""
    number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    index = [
        number.setdefault((tuple(prompt), tuple(response)), len(number))
        for prompt, response in texts
    ]
    scores = score_texts(
        scorer, [(list(prompt), list(response)) for prompt, response in number], max_batch_tokens
    )
    return scores[upload(np.asarray(index), scores.device)]


def read_rows(trunk: Any, texts: FinishedTexts, rows: np.ndarray) -> Tensor:
    """Return the tokens (n, W) of the texts `rows` (n,), W the length of the longest of them. Ids
    that the model does not have are read as its last one."""
    tokens = texts.tokens[upload(rows, texts.tokens.device), : int(texts.length[rows].max())]
    return tokens.to(trunk.device).clamp(0, trunk.config.get_text_config().vocab_size - 1)


def at_response(values: Tensor, prompt_length: np.ndarray, max_new_tokens: int) -> Tensor:
    """Return the entries (n, T) of `values` (n, W), one for each token of a text, that belong to
    the response's tokens; zero beyond W."""
    position = prompt_length[:, None] + np.arange(max_new_tokens)
    return pad(values, (0, max_new_tokens)).gather(1, upload(position, values.device))


def rest_on_last(placed: Tensor, texts: FinishedTexts) -> Tensor:
    """Return `placed` (B, T) with the difference between each text's score and its row's sum added
    to the text's last token."""
    assert texts.score is not None
    last = upload(texts.length - texts.prompt_length - 1, placed.device)
    return placed.scatter_add(1, last[:, None], (texts.score - placed.sum(1))[:, None])
