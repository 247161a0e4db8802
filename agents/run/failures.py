"""The texts at fault when a number is not finite, on disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenenv.errors import NotFinite
from tokenenv.models.pieces import TokenPieces
from tokenenv.trust import refuse_link
from tokenenv.types import TokenSpec

from .env_rows import take_obs
from .episodes import Episode
from .tracking import token_columns

FILE = "failed_episodes.jsonl"


class RunningText(NamedTuple):
    """A text that has not ended."""

    slot: int
    prompt: np.ndarray
    response: np.ndarray


def running_texts(obs: Mapping[str, Any], rows: Sequence[int]) -> list[RunningText]:
    """The texts of these env rows as an observation shows them."""
    seen = take_obs(obs, np.asarray(rows, np.int64))
    ends = zip(rows, seen["tokens"], seen["prompt_length"], seen["length"], strict=True)
    return [RunningText(row, text[:start], text[start:end]) for row, text, start, end in ends]


def require_finite_policy(invalid: np.ndarray, updates: int) -> None:
    """Raises `NotFinite` for the env rows whose token was drawn with a log-prob that is none, `invalid` (N,) bool."""
    rows = np.flatnonzero(invalid).tolist()
    if rows:
        raise NotFinite(
            f"the policy's log-prob is not finite in env rows {rows}, after {updates} updates: its weights or logits are not.",
            rows,
        )


def write_failures(directory: Path, error: NotFinite, spec: TokenSpec | None, update: int, tokens_seen: int) -> None:
    """Adds a line of JSON to `failed_episodes.jsonl` for each text of the error: what is wrong, token ids, the text where there
    is a tokenizer and, of texts that have ended, what each token earned (None where it is not finite)."""
    tokenizer = spec.tokenizer if spec else None
    about = {"error": str(error), "update": update, "tokens_seen": tokens_seen}
    directory.mkdir(parents=True, exist_ok=True)
    refuse_link(directory / FILE)
    with (directory / FILE).open("a", encoding="utf-8") as lines:
        for text in error.texts:
            lines.write(json.dumps(about | _record(text, tokenizer)) + "\n")


def _record(text: Any, tokenizer: Any) -> dict[str, Any]:
    ids = {name: [int(token) for token in getattr(text, name)] for name in ("prompt", "response")}
    known = {f"{name}_tokens": tokens for name, tokens in ids.items()} | {"slot": getattr(text, "slot", None)}
    if tokenizer is not None:
        known |= {name: tokenizer.decode(tokens) for name, tokens in ids.items()}
    return known | (token_columns(text, TokenPieces(tokenizer)) if isinstance(text, Episode) else {})
