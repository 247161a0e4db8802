"""Texts with outcomes, as a language model reads them to learn from: log-probs of the policy's own
tokens from whole texts, and the loss.

Suffixes: B texts, L tokens, T tokens of the policy's own, C texts that may wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenenv.models.batching import upload
from tokenenv.models.trunks import text_states
from tokenenv.rewards.seen import FinishedTexts


def outcome_loss(total_B: Tensor, outcome_B: Tensor) -> Tensor:
    """Return the cross-entropy (B,) in nats of outcomes, 0 or 1, under the probability
    sigmoid(total) (Yuan et al. 2024, arXiv 2412.01981)."""
    return F.binary_cross_entropy_with_logits(total_B, outcome_B, reduction="none")


@dataclass(frozen=True, slots=True)
class Texts:
    """B texts, on the host: all that log-probs of their tokens are computed from."""

    tokens: np.ndarray
    """(B, L) int64, right-padded."""
    length: np.ndarray
    """(B,) int64."""
    place: np.ndarray
    """(B, T) int64: the place of each token of the policy's in its text."""
    own: np.ndarray
    """(B, T) bool: where there is such a token, a prefix's left out."""


def as_texts(texts: FinishedTexts, max_new_tokens: int) -> Texts:
    """Return finished texts as what is kept of them."""
    own, place = texts.own_columns(max_new_tokens), texts.positions(max_new_tokens)
    tokens = np.zeros((len(texts.ids), int(texts.length.max())), dtype=np.int64)
    for row, (ids, length) in enumerate(zip(texts.ids, texts.length, strict=True)):
        tokens[row, :length] = ids[:length]
    return Texts(tokens, np.asarray(texts.length, dtype=np.int64), place, own)


def nobody(capacity: int, length: int, width: int) -> dict[str, np.ndarray]:
    """Return room for so many texts of at most `length` tokens, `width` of them the policy's."""
    return {
        "tokens": np.zeros((capacity, length), dtype=np.int64),
        "length": np.zeros(capacity, dtype=np.int64),
        "place": np.zeros((capacity, width), dtype=np.int64),
        "own": np.zeros((capacity, width), dtype=bool),
        "ref_logprob": np.zeros((capacity, width), dtype=np.float32),
        "outcome": np.zeros(capacity, dtype=np.float32),
    }


def pushed(rows: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return `rows` (C, ...) without the first ones, and with the `new` ones behind the others."""
    count = len(rows)
    new = new[-count:]
    if rows.ndim == 2 and new.shape[1] < rows.shape[1]:
        new = np.pad(new, ((0, 0), (0, rows.shape[1] - new.shape[1])))
    return np.concatenate([rows, new])[-count:]


def own_logprobs(
    texts: Texts,
    rows: np.ndarray,
    model: Any,
    logprob: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """Return the log-probs (b, T) of the own tokens of the texts `rows` (b,), 0 elsewhere, from one
    forward of the whole texts with the ambient grad mode."""
    length, own = texts.length[rows], texts.own[rows]
    tokens = upload(texts.tokens[rows][:, : int(length.max())], device)
    states = text_states(model, tokens, length)
    row, column = np.nonzero(own)
    place = texts.place[rows][row, column]
    row_K, column_K, place_K = (upload(index, device) for index in (row, column, place))
    values = logprob(states[row_K, place_K - 1], tokens[row_K, place_K])
    return values.new_zeros(own.shape).index_put((row_K, column_K), values)
