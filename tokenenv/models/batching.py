"""Whole-text forwards: length-sorted micro-batches, padded or packed."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


def micro_batches(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> list[np.ndarray]:
    """Groups the indices of `lengths`, longest first, so that each group padded to its longest text
    is at most `max_batch_tokens` tokens. A single longer text is a group of its own."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    groups: list[np.ndarray] = []
    start = 0
    while start < len(order):
        size = max(1, max_batch_tokens // max(1, int(lengths[order[start]])))
        groups.append(order[start : start + size])
        start += size
    return groups


def hidden_states(trunk: Any, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """Last hidden states (B, L, H) of right-padded `tokens` (B, L), without a cache and with the
    ambient grad mode.

    State t has read tokens 0..t. States at or beyond a row's length mean nothing. `lengths` (B,) is
    host data.
    """
    lengths = np.asarray(lengths)
    forward = _packed_states if is_varlen(trunk) else _padded_states
    return forward(trunk, tokens, lengths)


def last_states(states: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """The state (B, H) after each row's last token, from `states` (B, L, H)."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, upload(np.asarray(lengths) - 1, states.device)]


def in_micro_batches(
    forward: Callable[[np.ndarray, int], Tensor], lengths: np.ndarray, max_batch_tokens: int
) -> Tensor:
    """Runs `forward(rows, width)` -> (b, width, H) over micro-batches; returns the last states (B,
    H) in row order."""
    groups = micro_batches(lengths, max_batch_tokens)
    states = torch.cat(
        [last_states(forward(rows, int(lengths[rows[0]])), lengths[rows]) for rows in groups]
    )
    return states[upload(np.argsort(np.concatenate(groups)), states.device)]


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of a host array on the device, without making the host wait for the device."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pageable memory the copy may wait for the stream
    return tensor.to(device, non_blocking=True)


def is_varlen(trunk: Any) -> bool:
    """Whether the model attends with a flash kernel, which takes packed texts as they are."""
    return "flash" in (getattr(trunk.config, "_attn_implementation", None) or "")


def _padded_states(trunk: Any, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    """Right padding needs no mask under causal attention: no token looks to its right."""
    width = int(lengths.max())
    positions = torch.arange(width, device=tokens.device).expand(len(tokens), width)
    states = _forward(trunk, tokens[:, :width], positions)
    return pad(states, (0, 0, 0, tokens.shape[1] - width)) if width < tokens.shape[1] else states


def _packed_states(trunk: Any, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    """All texts in one row, positions starting again at 0 for each: transformers keeps attention
    inside each text.

    Packed over sdpa or eager attention it is correct too, but costs the square of the total length.
    """
    valid = np.arange(tokens.shape[1]) < lengths[:, None]
    row, column = (upload(index, tokens.device) for index in np.nonzero(valid))
    states = _forward(trunk, tokens[row, column][None], column[None])[0]
    return states.new_zeros(*tokens.shape, states.shape[-1]).index_put((row, column), states)


def _forward(trunk: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    kwargs = {"position_ids": positions} if _takes_positions(type(trunk).forward) else {}
    return trunk(input_ids=tokens, use_cache=False, **kwargs)[0]


@lru_cache
def _takes_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in signature(forward).parameters
