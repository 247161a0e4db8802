"""Whole texts and their scores, whichever kind of scorer gives them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.trunks import text_states
from tokenenv.types import Scorer, TextIds, TextScorer


@torch.no_grad()
def score_texts(
    scorer: Scorer | TextScorer, texts: Sequence[TextIds], max_batch_tokens: int = 16384
) -> Tensor:
    """The scores (B,) float32 of B texts, in length-sorted forwards. A response may be empty: a
    model that scores tokens gives 0 then, any other its score of the prompt."""
    if not isinstance(scorer, Scorer):
        return scorer.token_scores(texts, max(1, *(len(response) for _, response in texts))).sum(1)
    lengths = np.asarray([len(prompt) + len(response) for prompt, response in texts])
    starts = np.asarray([len(prompt) for prompt, _ in texts])
    ends = np.asarray(
        [read_length([*prompt, *response], scorer.pad_token_id) for prompt, response in texts]
    )
    scores = torch.zeros(len(texts), dtype=torch.float32, device=scorer.model.device)
    for group in micro_batches(lengths, max_batch_tokens):
        tokens = np.zeros((len(group), int(lengths[group].max())), dtype=np.int64)
        for row, i in enumerate(group):
            tokens[row, : lengths[i]] = [*texts[i][0], *texts[i][1]]
        states = text_states(scorer.model, upload(tokens, scores.device), lengths[group])
        scores[upload(group, scores.device)] = read_scores(
            scorer, states, starts[group], ends[group]
        )
    return scores


def read_lengths(ids: Sequence[int] | np.ndarray, pad_token_id: int | None) -> np.ndarray:
    """(n,) for the first 1, 2, ..., n tokens of a text: how many there are up to the one at which a
    model that scores texts reads the score of these, 1 or more. See `Scorer.pad_token_id`."""
    lengths = np.arange(1, len(ids) + 1)
    return (
        lengths
        if pad_token_id is None
        else np.maximum.accumulate(np.where(np.asarray(ids) != pad_token_id, lengths, 1))
    )


def read_length(ids: Sequence[int] | np.ndarray, pad_token_id: int | None) -> int:
    """The last of `read_lengths`: that of the whole text."""
    return int(read_lengths(ids, pad_token_id)[-1])


def read_scores(scorer: Scorer, states: Tensor, starts: np.ndarray, ends: np.ndarray) -> Tensor:
    """The scores (b,) from states (b, L, ...), with the ambient grad mode: `starts` (b,) are the
    lengths of the prompts, `ends` (b,) the `read_length` of the texts."""
    position = np.arange(states.shape[1])
    if scorer.per_token:
        wanted = (position >= starts[:, None]) & (position < ends[:, None])
    else:
        wanted = position == ends[:, None] - 1
    row, column = (upload(index, states.device) for index in np.nonzero(wanted))
    scores = scorer.head(states[row, column])
    total = torch.zeros(len(states), dtype=sum_dtype(scores.device), device=scores.device)
    return total.index_add(0, row, scores.to(total.dtype)).float()


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which token scores are added up: in float32 thousands of them drift, and Apple's GPUs have
    nothing else."""
    return torch.float32 if device.type == "mps" else torch.float64
