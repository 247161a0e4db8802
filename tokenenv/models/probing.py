"""What a foreign model does is found out by running it, not by the names in its config."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batching import hidden_states
from .cached_lm import acting, trunk_of
from .slot_cache import KVSlots

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of cached and uncached states that the arithmetic alone explains."""

LONG = 8192
"""Tokens of a row from which on trying out its cache takes time and memory that are worth a
warning."""

logger = logging.getLogger("tokenenv")


def why_uncached(trunk: Any, max_length: int) -> str | None:
    """None if cached states of a full row and a short one equal the uncached ones; else what went
    wrong."""
    with acting(trunk):
        try:
            difference = _probe(trunk, max_length)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign model's code raises
            return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    tolerance = TOLERANCE.get(trunk.dtype, 1e-1)
    if torch.get_float32_matmul_precision() != "highest":
        tolerance = max(tolerance, TOLERANCE[torch.float16])
    return (
        None
        if difference <= tolerance
        else f"cached states differ by {difference:.1e} of their size"
    )


def _probe(trunk: Any, max_length: int) -> float:
    """The larger relative difference of cached and uncached last states of two rows.

    Row 0 is filled to the last place: a window, a table of positions or a scale that depends on the
    length shows there or nowhere. Row 1 stays short beside it, and has forgotten what lies to its
    right, which must leave no trace.
    """
    if max_length >= LONG:
        mask = max_length**2 * trunk.dtype.itemsize / 2**20
        logger.warning(
            "trying out the cache of %s reads a text of %d tokens twice, once with a mask of %.0f "
            "MiB",
            type(trunk).__name__,
            max_length,
            mask,
        )
    full, short = max(1, max_length - 2), max(1, min(3, max_length - 2))
    ids = random_ids(trunk, 2, full + 2)
    rows = KVSlots(trunk, 2, full + 2)
    rows.prefill(torch.arange(2, device=trunk.device), ids[:, : min(full, 2 * short)])
    rows.prefill(torch.arange(1, device=trunk.device), ids[:1, :full])
    for step in range(2):
        at = np.array([full, short]) + step
        states = rows.append(ids[[0, 1], at], at, np.array([True, True]))
    alone = [
        hidden_states(trunk, ids[i : i + 1, :n], [n])[0, -1]
        for i, n in enumerate((full + 2, short + 2))
    ]
    expected = torch.stack(alone).float()
    difference = (states.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(difference.nan_to_num(torch.inf).max())


def random_ids(trunk: Any, num_rows: int, length: int) -> Tensor:
    """(num_rows, length) of the model's token ids, always the same ones; without the pad id, which
    transformers warns of."""
    config = trunk.config.get_text_config()
    ids = torch.randint(
        config.vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(0)
    )
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None:
        ids[ids == pad_id] = (pad_id + 1) % config.vocab_size
    return ids.to(trunk.device)


def looks_ahead(model: Any, length: int = 12) -> bool:
    """Whether later tokens change the states before them; tried out on a text of `length`
    tokens."""
    trunk, half = trunk_of(model), length // 2
    ids = random_ids(trunk, 2, length)
    ids[1, :half] = ids[0, :half]
    with acting(trunk):
        one, other = trunk(input_ids=ids)[0][:, :half].float()
    return bool(((one - other).norm(dim=-1) > 1e-3 * one.norm(dim=-1)).any())
