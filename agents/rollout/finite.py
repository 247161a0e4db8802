"""Checks that find a policy whose numbers are not finite in the step that draws from it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenenv.agents.rollout.env_rows import take_obs
from tokenenv.errors import NotFinite


class RunningText(NamedTuple):
    """A text that has not ended."""

    slot: int
    prompt: np.ndarray
    response: np.ndarray


def running_texts(obs: Mapping[str, Any], rows: Sequence[int]) -> list[RunningText]:
    """Return the texts of these slots as an observation shows them."""
    seen = take_obs(obs, np.asarray(rows, np.int64))
    ends = zip(rows, seen["tokens"], seen["prompt_length"], seen["length"], strict=True)
    return [RunningText(row, text[:start], text[start:end]) for row, text, start, end in ends]


def require_finite_policy(invalid: np.ndarray, updates: int) -> None:
    """Raise `NotFinite` for the slots whose token has a log-prob that is not finite: `invalid` (N,)
    bool."""
    rows = np.flatnonzero(invalid).tolist()
    if rows:
        raise NotFinite(
            f"the policy's log-prob is not finite in env rows {rows}, after {updates} updates: its "
            f"weights or logits are not.",
            rows,
        )
