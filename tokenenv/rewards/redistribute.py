"""The base of the designs that redistribute a score, and helpers that read parts of texts and place
numbers on tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tokenenv.models.batching import upload
from tokenenv.models.prefix_scores import padded, score_texts
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.types import Scorer, TextIds, TextScorer


class Redistribution(RewardTerm):
    """The base of a design that places the score of a finished text on its own tokens. What the
    environment wrote into the text is read with it, and is never paid.

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
    scorer: Scorer | TextScorer,
    texts: Sequence[TextIds],
    max_batch_tokens: int,
    own: Sequence[np.ndarray] | None = None,
) -> Tensor:
    """Return the scores (n,) float32 of n texts; equal texts are scored once. `own` is as for
    `score_texts`."""
    number: dict[tuple[Any, ...], int] = {}
    index: list[int] = []
    first: list[int] = []
    for i, text in enumerate(texts):
        mask = b"" if own is None else own[i].tobytes()
        index.append(number.setdefault((*map(tuple, text), mask), len(number)))
        if len(number) > len(first):
            first.append(i)
    masks = None if own is None else [own[i] for i in first]
    scores = score_texts(scorer, [texts[i] for i in first], max_batch_tokens, masks)
    return scores[upload(np.asarray(index), scores.device)]


def read_rows(trunk: Any, texts: FinishedTexts, rows: np.ndarray) -> Tensor:
    """Return the tokens (n, W) of the texts `rows` (n,), W the length of the longest of them. Ids
    that the model does not have are read as its last one."""
    tokens = texts.tokens[upload(rows, texts.tokens.device), : int(texts.length[rows].max())]
    return tokens.to(trunk.device).clamp(0, trunk.config.get_text_config().vocab_size - 1)


def at_places(values: Tensor, places: np.ndarray) -> Tensor:
    """Return the entries (n, T) of `values` (n, W), one for each token of a text, that stand at
    `places` (n, T), which are rows of `WholeTexts.positions`. Those to the right of a text's last
    own token mean nothing."""
    return values.gather(1, upload(np.minimum(places, values.shape[1] - 1), values.device))


def own_places(texts: FinishedTexts, rows: np.ndarray, width: int) -> np.ndarray:
    """Return where in the texts `rows` (n,) the response tokens of the policy's stand, those of a
    prefix included, (n, width) bool."""
    place = np.arange(width)
    own = (place >= texts.prompt_length[rows, None]) & (place < texts.length[rows, None])
    if texts.written is not None:
        own &= ~padded([texts.written[row][:width] for row in rows], width)
    return own


def rest_on_last(placed: Tensor, texts: FinishedTexts) -> Tensor:
    """Return `placed` (B, T) with the difference between each text's score and its row's sum added
    to the text's last own token."""
    assert texts.score is not None
    last = upload(texts.steps() - 1, placed.device)
    return placed.scatter_add(1, last[:, None], (texts.score - placed.sum(1))[:, None])
