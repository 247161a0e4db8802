"""Reading `reset(seed=..., options=...)`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.prompts import read_continuation, read_prompt
from tokenenv.tables import Columns, read_columns
from tokenenv.types import TokenSpec

Seed = int | Sequence[int | None] | None
Read = Callable[[Any, TokenSpec, str], list[int]]


@dataclass(frozen=True, slots=True)
class ResetOptions:
    """The slots that a reset begins anew, and the prompts and prefixes that it was given, by
    slot."""

    mask: np.ndarray
    masked: bool
    """Whether the mask was given, as by callers that reset what has ended; otherwise all slots
    begin anew."""
    prompts: dict[int, list[int]] = field(default_factory=dict)
    prefixes: dict[int, list[int]] = field(default_factory=dict)
    columns: dict[int, Columns] = field(default_factory=dict)
    """What belongs to each of `prompts`."""


def read_options(options: dict[str, Any] | None, num_envs: int, spec: TokenSpec) -> ResetOptions:
    """Check and return `options`; entries of slots that are not reset are ignored."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InvalidArgument(
            f"options={options!r} must be a dict with reset_mask, prompts, columns or prefixes, or "
            "None."
        )
    for key in options:
        check_choice("options key", key, ("reset_mask", "prompts", "columns", "prefixes"))
    mask = _mask(options, num_envs)
    prompts = _given(options, "prompts", mask, spec, read_prompt)
    prefixes = _given(options, "prefixes", mask, spec, read_continuation)
    for row, ids in prefixes.items():
        _check_prefix(ids, spec, f"options['prefixes'][{row}]")
    columns = _columns(options, list(prompts), num_envs)
    return ResetOptions(mask, options.get("reset_mask") is not None, prompts, prefixes, columns)


def read_seed(seed: Seed, num_envs: int) -> list[int | None]:
    """Return one seed (or None) for each slot, as Gymnasium's own vectorisation reads them."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        first = _whole(seed, "seed")
        return [first + row for row in range(num_envs)]
    if (
        not isinstance(seed, (Sequence, np.ndarray))
        or isinstance(seed, str)
        or getattr(seed, "ndim", 1) == 0
    ):
        raise InvalidArgument(
            f"seed={seed!r} is not allowed; it must be a whole number, or one entry an env "
            f"({num_envs})."
        )
    seeds = list(seed)
    if len(seeds) != num_envs:
        raise InvalidArgument(
            f"seed has {len(seeds)} entries; allowed: a whole number, or one entry an env "
            f"({num_envs})."
        )
    return [None if one is None else _whole(one, f"seed[{row}]") for row, one in enumerate(seeds)]


def _whole(seed: Any, label: str) -> int:
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InvalidArgument(f"{label}={seed!r} must be a whole number, 0 or more.")
    return int(seed)


def _mask(options: dict[str, Any], num_envs: int) -> np.ndarray:
    # Read, not popped: RecordEpisodeStatistics looks for it after the env has.
    mask = options.get("reset_mask")
    if mask is None:
        return np.ones(num_envs, dtype=bool)
    mask = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,):
        raise InvalidArgument(
            f"options['reset_mask']={mask!r} must be a bool array of shape ({num_envs},)."
        )
    if not mask.any():
        raise InvalidArgument("options['reset_mask'] must have at least one True.")
    return mask


def _given(
    options: dict[str, Any], key: str, mask: np.ndarray, spec: TokenSpec, read: Read
) -> dict[int, list[int]]:
    values = options.get(key)
    if values is None:
        return {}
    listed = isinstance(values, Sequence) or (
        isinstance(values, np.ndarray | Tensor) and values.ndim > 0
    )
    if not listed or isinstance(values, str | bytes) or len(values) != len(mask):
        raise InvalidArgument(
            f"options[{key!r}] must be a list with one entry an env ({len(mask)})."
        )
    rows = [int(row) for row in np.flatnonzero(mask)]
    return {
        row: read(values[row], spec, f"options[{key!r}][{row}]")
        for row in rows
        if values[row] is not None
    }


def _columns(options: dict[str, Any], slots: list[int], num_envs: int) -> dict[int, Columns]:
    columns = options.get("columns")
    if columns is not None and options.get("prompts") is None:
        raise InvalidArgument(
            "options['columns'] belong to options['prompts'], which are missing; the env's own "
            "prompts bring theirs."
        )
    rows = read_columns(columns, slots, num_envs, "options['columns']")
    return dict(zip(slots, rows, strict=True))


def _check_prefix(ids: list[int], spec: TokenSpec, label: str) -> None:
    if len(ids) >= spec.max_new_tokens:
        raise InvalidArgument(
            f"{label} has {len(ids)} tokens; allowed: fewer than "
            f"max_new_tokens={spec.max_new_tokens}."
        )
    if set(ids) & set(spec.stop_token_ids):
        raise InvalidArgument(f"{label} holds a stop token; a finished text cannot be continued.")
