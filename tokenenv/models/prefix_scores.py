"""The sequence score of a text, read from a causal scorer's states, of a prefix as of the whole.

The reader of a `Scorer` is here. A `TextScorer` scores finished texts only and brings its own code
(`aligned_scorer`, `vllm_models`); `score_texts` takes either kind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.trunks import text_states
from tokenenv.types import Scorer, TextIds, TextScorer


def is_scorer(value: Any) -> bool:
    """Whether an object is a scorer, of either kind."""
    return isinstance(value, Scorer) or hasattr(value, "token_scores")


@torch.no_grad()
def score_texts(
    scorer: Scorer | TextScorer,
    texts: Sequence[TextIds],
    max_batch_tokens: int = 16384,
    own: Sequence[np.ndarray] | None = None,
) -> Tensor:
    """Return the sequence score (B,) float32 of each of B texts, whichever kind the scorer is.

    A response may be empty. A model that scores tokens then gives 0, and any other model its score
    of the prompt.

    Args:
        scorer: of either kind.
        texts: B pairs of the token ids of a prompt and a response.
        max_batch_tokens: tokens of one forward, padding included.
        own: for each text a mask (R,) bool of the response tokens that are the policy's; the scores
            of other tokens are no part of the score, if the scorer scores tokens. None: all are.
    """
    if not isinstance(scorer, Scorer):
        width = max(1, *(len(response) for _, response in texts))
        scores = scorer.token_scores(texts, width)
        if own is not None and scorer.per_token:
            scores = torch.where(upload(padded(own, width), scores.device), scores, 0.0)
        return scores.sum(1)
    lengths = np.asarray([len(prompt) + len(response) for prompt, response in texts])
    starts = np.asarray([len(prompt) for prompt, _ in texts])
    masks = None
    if own is not None:
        pairs = zip(starts, own, strict=True)
        masks = [np.concatenate([np.zeros(start, dtype=bool), mask]) for start, mask in pairs]
    ends = np.asarray(
        [read_length([*prompt, *response], scorer.pad_token_id) for prompt, response in texts]
    )
    scores = torch.zeros(len(texts), dtype=torch.float32, device=scorer.model.device)
    for group in micro_batches(lengths, max_batch_tokens):
        tokens = np.zeros((len(group), int(lengths[group].max())), dtype=np.int64)
        for row, i in enumerate(group):
            tokens[row, : lengths[i]] = [*texts[i][0], *texts[i][1]]
        states = text_states(scorer.model, upload(tokens, scores.device), lengths[group])
        counted = None if masks is None else padded([masks[i] for i in group], tokens.shape[1])
        found = read_scores(scorer, states, starts[group], ends[group], counted)
        scores[upload(group, scores.device)] = found
    return scores


def read_lengths(ids: Sequence[int] | np.ndarray, pad_token_id: int | None) -> np.ndarray:
    """Return where a scorer reads the score of each prefix of a text.

    Entry i - 1 belongs to the first i tokens: how many of these there are up to the one whose state
    is read, 1 or more. That is i, or less where the prefix ends in `Scorer.pad_token_id`.

    Args:
        ids: (n,) the tokens of the text, prompt included.
        pad_token_id: the scorer's.

    Returns:
        (n,) int64.
    """
    lengths = np.arange(1, len(ids) + 1)
    if pad_token_id is None:
        return lengths
    # A pad id repeats the last place before it, which is the largest so far.
    return np.maximum.accumulate(np.where(np.asarray(ids) != pad_token_id, lengths, 1))


def read_length(ids: Sequence[int] | np.ndarray, pad_token_id: int | None) -> int:
    """Return where a scorer reads the score of a whole text: the last of `read_lengths`."""
    return int(read_lengths(ids, pad_token_id)[-1])


def read_scores(
    scorer: Scorer,
    states: Tensor,
    starts: np.ndarray,
    ends: np.ndarray,
    own: np.ndarray | None = None,
) -> Tensor:
    """Return the sequence scores (b,) float32 from a scorer's states, with the ambient grad mode.

    Args:
        scorer: a causal one.
        states: (b, L, ...) of its model.
        starts: (b,) host data, the length of each prompt.
        ends: (b,) host data, the `read_length` of each text.
        own: (b, L) bool, the response tokens that are the policy's: a scorer of tokens adds up
            these alone. None: all are.
    """
    position = np.arange(states.shape[1])
    if scorer.per_token:
        wanted = (position >= starts[:, None]) & (position < ends[:, None])
        wanted = wanted if own is None else wanted & own
    else:
        wanted = position == ends[:, None] - 1
    # The head sees only the states that count: K of them, from all texts, flat.
    row, column = (upload(index, states.device) for index in np.nonzero(wanted))
    scores = scorer.head(states[row, column])
    total = torch.zeros(len(states), dtype=sum_dtype(scores.device), device=scores.device)
    return total.index_add(0, row, scores.to(total.dtype)).float()


def padded(masks: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Return masks of at most `width` bools each as one array (b, width), False to the right."""
    out = np.zeros((len(masks), width), dtype=bool)
    for row, mask in enumerate(masks):
        out[row, : len(mask)] = mask
    return out


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which token scores are added up: float64, or float32 on Apple's GPUs,
    which have nothing wider."""
    # In float32 the running sum of thousands of scores drifts away from their sum.
    return torch.float32 if device.type == "mps" else torch.float64
