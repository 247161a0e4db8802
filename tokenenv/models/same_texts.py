"""Texts that begin alike, as those of a group do: one slot reads the text, and the others copy its
cache."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tokenenv.types import SlotModel, Slots

from .batching import upload


def first_equals(tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return for each of n texts the number of the first text that equals it, (n,) int64.

    Args:
        tokens: (n, L) right-padded, on the host.
        lengths: (n,) host data.
    """
    ids, lengths = tokens.numpy(), np.asarray(lengths)
    # Texts that all have one prompt, without a look at each of them in Python.
    if (lengths == lengths[0]).all() and (ids == ids[0])[:, : lengths[0]].all():
        return np.zeros(len(ids), dtype=np.int64)
    seen: dict[bytes, int] = {}
    rows = zip(ids, lengths, strict=True)
    first = [seen.setdefault(row[:length].tobytes(), i) for i, (row, length) in enumerate(rows)]
    return np.asarray(first, dtype=np.int64)


def prefill_once(
    model: SlotModel,
    slots: Slots,
    tokens: Tensor,
    lengths: Sequence[int] | np.ndarray,
    first: np.ndarray,
) -> Tensor:
    """Restart some slots with new texts as `model.prefill` does, and read equal texts once.

    Args:
        model: N running texts.
        slots: (n,) host data, each slot at most once.
        tokens: (n, <=L) right-padded.
        lengths: (n,) host data.
        first: (n,) what `first_equals` returned.

    Returns:
        (n, H) the states after the texts; those of equal texts are equal to the bit.
    """
    slots, lengths = np.asarray(slots), np.asarray(lengths)
    own = first == np.arange(len(first))
    if own.all():
        return model.prefill(slots, tokens, lengths.tolist())
    rows = upload(np.flatnonzero(own), tokens.device)
    states = model.prefill(slots[own], tokens[rows], lengths[own].tolist())
    model.fork(slots[first[~own]], slots[~own])
    # The states are those of the first texts alone: each text finds its own by how many such stand
    # before it.
    return states[upload(np.cumsum(own)[first] - 1, states.device)]
