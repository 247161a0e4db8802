"""Trials of foreign models: what a model does is found out by running it, not by the names in its
config."""

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
"""The length of a text, in tokens, from which on the trial of a cache is logged as a warning: it
takes time and memory. Longer texts are tried out at a length of their own (`trial_length`)."""
BEHIND = 64
"""Tokens of a trial behind the last place at which something may begin to differ."""

logger = logging.getLogger("tokenenv")


def why_uncached(trunk: Any, max_length: int) -> str | None:
    """Return None if a model can be cached per slot, otherwise what went wrong.

    It can if the cached states of a full slot and of a short one beside it equal the uncached ones.
    A full slot has `max_length` tokens, or as many as `trial_length` says.
    """
    if trunk.device.type == "meta":  # no numbers to look at (`shapes_only`)
        return None
    with acting(trunk):
        try:
            difference = _probe(trunk, min(max_length, trial_length(trunk)))
        # Too little memory says nothing about the model, and recomputing would not help.
        except torch.OutOfMemoryError:
            raise
        # A foreign model's code may raise anything.
        except Exception as error:
            return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    tolerance = TOLERANCE.get(trunk.dtype, 1e-1)
    # Below "highest", float32 products are computed with fewer digits: TF32 has those of float16.
    if torch.get_float32_matmul_precision() != "highest":
        tolerance = max(tolerance, TOLERANCE[torch.float16])
    if difference <= tolerance:
        return None
    return f"cached states differ by {difference:.1e} of their size"


def trial_length(trunk: Any) -> int:
    """Return the longest text, in tokens, that a cache is tried out with: longer ones than `LONG`,
    and than the window of attention that the config names, tell nothing new. The costs grow with
    the square of the length. RoPE is that of the real length (`rope.fix_rope`), and a table of
    positions is looked at by itself."""
    window = getattr(trunk.config.get_text_config(), "sliding_window", None)
    return max(LONG, window or 0) + BEHIND


def _probe(trunk: Any, max_length: int) -> float:
    """Return the largest relative difference of cached and uncached last states, of two slots that
    are read by single steps and by an extension.

    Slot 0 is filled to its last place: a window, a table of positions or a scale that depends on
    the length shows there or nowhere. Slot 1 stays short beside it. Tokens of a longer prefill lie
    to the right of its text, and must leave no trace.
    """
    if max_length >= LONG:
        mask = max_length**2 * trunk.dtype.itemsize / 2**20
        message = (
            "trying out a cache reads a text of %d tokens twice, once with a mask of %.0f MiB: %s"
        )
        logger.warning(message, max_length, mask, type(trunk).__name__)
    full, short = max(1, max_length - 2), max(1, min(3, max_length - 2))
    ids = random_ids(trunk, 2, full + 2)
    slots = KVSlots(trunk, 2, full + 2)
    # Both slots get twice the short text's tokens, then slot 0 its own. Slot 1 goes on from
    # `short`, over what it holds behind that place.
    slots.prefill(torch.arange(2, device=trunk.device), ids[:, : min(full, 2 * short)])
    slots.prefill(torch.arange(1, device=trunk.device), ids[:1, :full])
    # Two steps, because the second one reads keys that the first one has stored.
    starts = np.array([full, short])
    for step in range(2):
        at = starts + step
        states = slots.append(ids[[0, 1], at], at, np.array([True, True]))
    # Then both tokens at once, over what the steps have stored.
    two = ids[torch.arange(2)[:, None], torch.from_numpy(starts[:, None] + [0, 1])]
    extended = slots.extend(slots.all_slots[:, 0], two, starts, np.array([2, 2]))[:, -1]
    alone = [
        hidden_states(trunk, ids[i : i + 1, :n], [n])[0, -1]
        for i, n in enumerate((full + 2, short + 2))
    ]
    expected = torch.stack(alone).float()
    cached = torch.stack([states, extended]).float()
    difference = (cached - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(difference.nan_to_num(torch.inf).max())


def random_ids(trunk: Any, num_rows: int, length: int) -> Tensor:
    """Return random token ids (num_rows, length) of the model's, always the same ones. The pad id,
    about which transformers warns, is not among them."""
    config = trunk.config.get_text_config()
    ids = torch.randint(
        config.vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(0)
    )
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None:
        ids[ids == pad_id] = (pad_id + 1) % config.vocab_size
    return ids.to(trunk.device)


def looks_ahead(model: Any, length: int = 12) -> bool:
    """Whether later tokens change the states before them, tried out on two texts of `length` tokens
    with one first half."""
    trunk, half = trunk_of(model), length // 2
    ids = random_ids(trunk, 2, length)
    ids[1, :half] = ids[0, :half]
    with acting(trunk):
        one, other = trunk(input_ids=ids)[0][:, :half].float()
    # On no device (`shapes_only`) there are no numbers to look at.
    return not one.is_meta and bool(((one - other).norm(dim=-1) > 1e-3 * one.norm(dim=-1)).any())
