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
KEYS = ("reset_mask", "prompts", "columns", "prefixes", "prefix_own")
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
    prefix_own: dict[int, list[bool]] = field(default_factory=dict)
    """Which tokens of each of `prefixes` count as the policy's, where the caller says so."""


def read_options(options: dict[str, Any] | None, num_envs: int, spec: TokenSpec) -> ResetOptions:
    """Check and return `options`; entries of slots that are not reset are ignored."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InvalidArgument(
            f"options={options!r} must be a dict with reset_mask, prompts, columns or prefixes, or "
            "None."
        )
    for key in options:
        check_choice("options key", key, KEYS)
    mask = _mask(options, num_envs)
    prompts = _given(options, "prompts", mask, spec, read_prompt)
    prefixes = _given(options, "prefixes", mask, spec, read_continuation)
    own = _prefix_own(options, mask, prefixes, spec)
    for row, ids in prefixes.items():
        # A prompt that the env draws may be of any length.
        room = spec.max_length - len(prompts.get(row, [0] * spec.max_prompt_tokens))
        _check_prefix(ids, own.get(row), room, spec, f"options['prefixes'][{row}]")
    columns = _columns(options, list(prompts), num_envs)
    masked = options.get("reset_mask") is not None
    return ResetOptions(mask, masked, prompts, prefixes, columns, own)


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


def _prefix_own(
    options: dict[str, Any], mask: np.ndarray, prefixes: dict[int, list[int]], spec: TokenSpec
) -> dict[int, list[bool]]:
    if options.get("prefix_own") is None:
        return {}
    if not spec.responds:
        raise InvalidArgument(
            "options['prefix_own'] is given, and in this env the policy alone writes; leave it out."
        )

    given = _given(options, "prefix_own", mask, spec, lambda own, spec, label: own)
    return {
        row: read_own(own, len(prefixes.get(row, ())), f"options['prefix_own'][{row}]")
        for row, own in given.items()
    }


def read_own(own: Any, count: int, label: str) -> list[bool]:
    """Return a mask of `count` tokens as a list of bool; 0 and 1 are taken too."""
    values = np.asarray(own.cpu() if isinstance(own, Tensor) else own)
    if values.shape != (count,) or not np.isin(values, (0, 1)).all():
        raise InvalidArgument(
            f"{label}={own!r} must hold {count} entries, one a token: True where the policy wrote "
            "it."
        )
    return values.astype(bool).tolist()


def _check_prefix(
    ids: list[int], own: list[bool] | None, room: int, spec: TokenSpec, label: str
) -> None:
    count = len(ids) if own is None else sum(own)
    if count >= spec.max_new_tokens:
        raise InvalidArgument(
            f"{label} has {count} tokens; allowed: fewer than max_new_tokens={spec.max_new_tokens}."
        )
    if len(ids) >= room:
        raise InvalidArgument(
            f"{label} has {len(ids)} tokens; allowed: fewer than {room}, which is what the context "
            f"of {spec.max_length} tokens leaves behind the prompt."
        )
    # A turn may end with a stop token that the environment has answered.
    if not spec.responds and set(ids) & set(spec.stop_token_ids):
        raise InvalidArgument(f"{label} holds a stop token; a finished text cannot be continued.")
