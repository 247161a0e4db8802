"""Forwards of whole texts: length-sorted micro-batches, padded or packed; and blocks of logits."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_ELEMENTS = 2**18
"""Logits that one pass over the vocabulary reads on the CPU: 1 MiB, which a core's cache holds."""


def micro_batches(
    lengths: Sequence[int] | np.ndarray, max_batch_tokens: int, forward_tokens: int | None = None
) -> list[np.ndarray]:
    """Group the indices of texts by length, longest first.

    Each group, padded to its longest text, has at most `max_batch_tokens` tokens. A single text
    that is longer than that is a group of its own.

    Args:
        lengths: (B,) tokens of each text.
        max_batch_tokens: tokens of one group, padding included.
        forward_tokens: how many tokens one more forward costs as much as. A group is cut where that
            spares more padding than this. None cuts no further than memory asks for.

    Returns:
        Index arrays, which together hold 0..B-1.
    """
    lengths = np.asarray(lengths)
    # The longest group comes first: if memory is too small, the first forward shows it.
    order = np.argsort(-lengths, kind="stable")
    groups: list[np.ndarray] = []
    start = 0
    while start < len(order):
        size = max(1, max_batch_tokens // max(1, int(lengths[order[start]])))
        groups.append(order[start : start + size])
        start += size
    if forward_tokens is None:
        return groups
    return [part for group in groups for part in _with_less_padding(group, lengths, forward_tokens)]


def _with_less_padding(
    group: np.ndarray, lengths: np.ndarray, forward_tokens: int
) -> list[np.ndarray]:
    """Cut a group of indices, longest text first, in two where that spares the most padding; then
    each part again, as long as a cut spares more than a forward costs."""
    sizes = lengths[group]
    # Cut before text k, those from k on are padded to its length, not to the longest one's.
    spared = np.arange(len(group), 0, -1) * (sizes[0] - sizes)
    cut = int(spared.argmax())
    if spared[cut] <= forward_tokens:
        return [group]
    halves = group[:cut], group[cut:]
    return [part for half in halves for part in _with_less_padding(half, lengths, forward_tokens)]


def hidden_states(trunk: Any, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """Return the last hidden states of whole texts, without a cache and with the ambient grad mode.

    Args:
        trunk: a transformers base model.
        tokens: (B, L) int64, right-padded, on the model's device.
        lengths: (B,) host data, the tokens of each text.

    Returns:
        (B, L, H), in which state t has read tokens 0..t. States at or beyond a text's length mean
        nothing.
    """
    lengths = np.asarray(lengths)
    forward = _packed_states if is_varlen(trunk) else _padded_states
    return forward(trunk, tokens, lengths)


def last_states(states: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """Return the state (B, H) after each text's last token, out of `states` (B, L, H)."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, upload(np.asarray(lengths) - 1, states.device)]


def in_micro_batches(
    forward: Callable[[np.ndarray, int], Tensor], lengths: np.ndarray, max_batch_tokens: int
) -> Tensor:
    """Run `forward(rows, width)`, which returns states (b, width, H), over micro-batches of the
    rows 0..B-1. Return the last state of each row, (B, H), in the order of the rows."""
    groups = micro_batches(lengths, max_batch_tokens)
    states = [last_states(forward(rows, int(lengths[rows[0]])), lengths[rows]) for rows in groups]
    return in_order(states, groups)


def in_order(states: Sequence[Tensor], rows: Sequence[np.ndarray]) -> Tensor:
    """Put states (b, ...) of several groups of rows together, in the order of the rows.

    Args:
        states: of each group.
        rows: the numbers (b,) of each group's rows, host data; together they are 0..B-1.
    """
    together = torch.cat(list(states))
    # The argsort of a permutation is its inverse.
    return together[upload(np.argsort(np.concatenate(list(rows))), together.device)]


def table_entries(table: Tensor, *index: Tensor) -> Tensor:
    """Return table[index] (K,) for one index (K,) int64, 0 or more, a dimension. A single number
    for each entry is looked up in half the time."""
    place = index[0]
    for size, further in zip(table.shape[1:], index[1:], strict=True):
        place = torch.add(further, place, alpha=size)
    return table.view(-1).index_select(0, place)


def vocabulary_blocks(logits_KV: Tensor) -> Iterator[slice]:
    """Yield the rows of one pass over the vocabulary after the other. Elsewhere than on the CPU it
    is all of them: a device is slow to start, not to read."""
    rows, size = logits_KV.shape
    block = max(1, BLOCK_ELEMENTS // size) if logits_KV.device.type == "cpu" else max(1, rows)
    return (slice(start, start + block) for start in range(0, max(1, rows), block))


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of a host array on the device, without making the host wait for the device."""
    # On the CPU `from_numpy` alone would alias the caller's array.
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    tensor = torch.from_numpy(array)
    # From pageable memory, a copy to CUDA may wait for the work that is queued there.
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_varlen(trunk: Any) -> bool:
    """Whether the model attends with a flash kernel, which takes texts of many lengths packed into
    one row, without padding."""
    return "flash" in (getattr(trunk.config, "_attn_implementation", None) or "")


def _padded_states(trunk: Any, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    # Right padding needs no mask under causal attention: no token looks to its right.
    width = int(lengths.max())
    positions = torch.arange(width, device=tokens.device).expand(len(tokens), width)
    states = _forward(trunk, tokens[:, :width], positions)
    return pad(states, (0, 0, 0, tokens.shape[1] - width)) if width < tokens.shape[1] else states


def _packed_states(trunk: Any, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    """Run all texts as one row, (1, sum of lengths).

    Positions start again at 0 for each text, by which transformers knows where one ends, and keeps
    attention inside it. Over sdpa or eager attention packing is right too, but it costs the square
    of the total length.
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
