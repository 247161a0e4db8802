"""Saved env states: what they must hold to be loaded."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokenenv.errors import CheckpointError, InvalidArgument
from tokenenv.types import TokenSpec

FORMAT = 6
Layout = dict[str, Any]
"""What a state must hold, by name: a (shape, dtype), None for what must be absent, or a further
layout. A size of -1 in a shape is any size."""
EXACT = ("weights", "memory", "statistics", "learned")
"""Parts that have an entry for each term that has one, and no others."""
KEYS = (
    "slots",
    "texts",
    "engine",
    "prompt_id",
    "episode_kl_coef",
    "ended",
    "scored",
    "streams",
    "kl_coef",
    "tokens_seen",
)


def check_slots(slots: Sequence[int], num_envs: int) -> np.ndarray:
    """Return slot numbers as an array (n,) int64, each 0 to num_envs - 1."""
    try:
        chosen = np.asarray(slots)
    except ValueError:  # lists of different lengths
        chosen = np.zeros(0)
    if (
        chosen.ndim != 1
        or not len(chosen)
        or chosen.dtype.kind not in "iu"
        or chosen.min() < 0
        or chosen.max() >= num_envs
    ):
        raise InvalidArgument(
            f"slots={slots!r} must hold numbers from 0 to {num_envs - 1}, at least one."
        )
    return chosen.astype(np.int64)


def check_fork(
    sources: Sequence[int], targets: Sequence[int], ended: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots to copy from and those to copy to, (n,) int64; `ended` (N,) are those that
    hold finished episodes."""
    source, target = check_slots(sources, len(ended)), check_slots(targets, len(ended))
    if len(source) != len(target) or len(set(target)) != len(target):
        raise InvalidArgument(
            f"fork needs one distinct target a source; got {list(sources)} and {list(targets)}."
        )
    if ended[source].any():
        raise InvalidArgument(
            f"sources={list(sources)} holds finished episodes; only running ones can be copied."
        )
    return source, target


def check_state(
    saved: Any, num_envs: int, group_size: int, spec: TokenSpec, engine: Callable[[int], Layout]
) -> np.ndarray:
    """Return the slots (n,) of a saved state that fits this env; raise `CheckpointError` before
    anything is changed.

    `engine` returns the layout of what the engine saves for a number of slots.
    """
    if (
        not isinstance(saved, dict)
        or not _is(saved.get("format"), FORMAT)
        or any(key not in saved for key in KEYS)
    ):
        raise CheckpointError(
            f"this is no state of a tokenenv env (format {FORMAT}); it comes from save_state()."
        )
    slots = saved["slots"]
    if (
        not _is_array(slots, (-1,), np.int64)
        or not len(slots)
        or slots[0] < 0
        or (np.diff(slots) < 1).any()
    ):
        raise CheckpointError("the state is corrupt: its slots are not numbers in order.")
    if slots[-1] >= num_envs:
        raise CheckpointError(
            f"the state holds slot {slots[-1]}; this env has num_envs={num_envs}."
        )
    _check_arrays(saved, _layout(len(slots), spec, engine(len(slots))), "state")
    _check_texts(saved["texts"], saved["ended"], spec)
    if (saved["scored"] & ~saved["ended"]).any():
        raise CheckpointError("the state is corrupt: a text is scored that has not ended.")
    _check_columns(saved["texts"].get("columns"), len(slots))
    _check_streams(saved["streams"], len(slots), group_size)
    _check_numbers(saved)
    return slots


def check_columns(rows: list[Any], require: Callable[[list[Any], str], None]) -> None:
    """Raise `CheckpointError` unless the texts of a state have the columns that this env's terms
    ask for, which `require` looks at."""
    try:
        require(rows, "saved texts")
    except InvalidArgument as error:
        raise CheckpointError(f"the state comes from an env of other prompts: {error}") from error


def check_statistics(saved: Any, layout: Layout) -> None:
    """Raises `CheckpointError` unless `saved` holds the statistics that the engine's `layout`
    names."""
    _check_arrays(saved, layout["learned"], "learned")


def _is(value: Any, expected: int | str) -> bool:
    """Return whether they are the same plain value. A corrupt state may hold an array in its place,
    which `==` alone would compare entry by entry."""
    return isinstance(value, type(expected)) and value == expected


def _layout(count: int, spec: TokenSpec, engine: Layout) -> Layout:
    """Return the layout of a state of `count` slots."""
    length = spec.max_length
    integers, floats = ((count,), np.int64), ((count,), np.float32)
    replies = {"written": ((count, length), np.bool_), "seed": integers}
    return {
        "texts": {
            "tokens": ((count, length), np.int64),
            "length": integers,
            "prompt_length": integers,
            "prefix_length": integers,
            **(replies if spec.responds else {}),
        },
        "engine": engine,
        "prompt_id": integers,
        "episode_kl_coef": floats,
        "ended": ((count,), np.bool_),
        "scored": ((count,), np.bool_),
    }


def _check_arrays(saved: Any, layout: Any, where: str) -> None:
    if isinstance(layout, dict):
        if (
            not isinstance(saved, dict)
            or not set(layout) <= set(saved)
            or (where in EXACT and set(saved) != set(layout))
        ):
            has = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
            raise CheckpointError(
                f"the state's {where} are {has} and this env's {sorted(layout)}; use the same "
                f"task, reward= and watch=."
            )
        for key, part in layout.items():
            _check_arrays(saved[key], part, key)
    elif layout is None:
        if saved is not None:
            raise CheckpointError(
                f"the state's {where} comes from a reward model, which this env does not have."
            )
    elif not _is_array(saved, *layout):
        has = f"{saved.shape} {saved.dtype}" if isinstance(saved, np.ndarray) else repr(saved)
        raise CheckpointError(
            f"the state's {where} is {has} and this env's {layout[0]} {layout[1].__name__}; "
            "it is corrupt, or comes from another task, other task options or another watch=."
        )


def _is_array(value: Any, shape: tuple[int, ...], dtype: Any) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != len(shape):
        return False
    return all(expected in (-1, size) for expected, size in zip(shape, value.shape, strict=True))


def _check_texts(texts: dict[str, np.ndarray], ended: np.ndarray, spec: TokenSpec) -> None:
    tokens, prompt = texts["tokens"], texts["prompt_length"]
    response = texts["length"] - prompt
    valid = (
        (prompt >= 1)
        & (prompt <= spec.max_prompt_tokens)
        & (texts["prefix_length"] >= 0)
        & (texts["prefix_length"] <= response)
    )
    steps = response
    if spec.responds:
        place, written = np.arange(tokens.shape[1]), texts["written"]
        outside = (place < prompt[:, None]) | (place >= texts["length"][:, None])
        steps = response - written.sum(1)
        valid &= ~(written & outside).any(1) & (texts["seed"] >= 0)
        valid &= texts["length"] <= np.where(ended, spec.max_length, spec.max_length - 1)
    valid &= steps <= np.where(ended, spec.max_new_tokens, spec.max_new_tokens - 1)
    if not valid.all() or tokens.min() < 0 or tokens.max() >= spec.vocab_size:
        raise CheckpointError(
            "the state is corrupt, or comes from another task: its texts do not fit this env."
        )


def _check_columns(rows: Any, count: int) -> None:
    whole = isinstance(rows, list) and len(rows) == count
    if not whole or not all(isinstance(row, dict) and all(map(_is_name, row)) for row in rows):
        raise CheckpointError(
            f"the state is corrupt: the columns of its texts are not {count} mappings of names."
        )


def _is_name(key: Any) -> bool:
    return isinstance(key, str)


def _check_streams(streams: Any, count: int, group_size: int) -> None:
    """Check that there are a seed and a number of texts for each slot, those of its group."""
    given = streams if isinstance(streams, dict) else {}
    if not _is(given.get("group_size"), group_size):
        raise CheckpointError(
            f"the state has group_size={given.get('group_size')!r} and this env "
            f"group_size={group_size}."
        )
    for key in ("seeds", "begun"):
        numbers = given.get(key)
        whole = isinstance(numbers, list) and len(numbers) == count
        if not whole or not all(
            isinstance(number, int) and number >= 0 for number in numbers or ()
        ):
            raise CheckpointError(
                f"the state is corrupt: the {key} of its streams are not {count} whole numbers, 0 "
                f"or more."
            )


def _check_numbers(saved: dict[str, Any]) -> None:
    try:
        if not (
            np.isfinite(saved["kl_coef"])
            and saved["kl_coef"] >= 0
            and int(saved["tokens_seen"]) >= 0
        ):
            raise ValueError(f"kl_coef={saved['kl_coef']} and tokens_seen={saved['tokens_seen']}")
    except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the state is corrupt: {error}.") from error
