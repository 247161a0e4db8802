"""Saved env states: what they must hold to be loaded."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.errors import CheckpointError, InvalidArgument

FORMAT = 1
KEYS = ("slots", "texts", "engine", "prompt_id", "episode_kl_coef", "ended", "rngs", "kl_coef", "tokens_seen")


def check_slots(slots: Sequence[int], num_envs: int) -> np.ndarray:
    """Slot numbers as an array (n,) int64, each 0 to num_envs - 1."""
    chosen = np.asarray(slots, dtype=np.int64).reshape(-1)
    if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= num_envs:
        raise InvalidArgument(f"slots={list(slots)} must hold numbers from 0 to {num_envs - 1}, at least one.")
    return chosen


def check_state(saved: Any, num_envs: int, max_length: int, terms: list[str]) -> np.ndarray:
    """The slots of a saved state that fits this env; raises `CheckpointError` before anything is changed."""
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or any(key not in saved for key in KEYS):
        raise CheckpointError(f"this is no state of a tokenenv env (format {FORMAT}); it comes from save_state().")
    slots = np.asarray(saved["slots"])
    if slots.max() >= num_envs:
        raise CheckpointError(f"the state holds slot {slots.max()}; this env has num_envs={num_envs}.")
    if saved["texts"]["tokens"].shape[1] != max_length:
        length = saved["texts"]["tokens"].shape[1]
        raise CheckpointError(f"the state's texts hold {length} tokens and this env's {max_length}; use the same task options.")
    if sorted(saved["engine"]["weights"]) != sorted(terms):
        has = sorted(saved["engine"]["weights"])
        raise CheckpointError(f"the state's reward terms are {has} and this env's {sorted(terms)}; use the same reward=.")
    return slots
