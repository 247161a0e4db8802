"""Episodes of `tokenenv train` as data: an agent's own texts with their scores.

A line of a run's `episodes.jsonl` holds prompt and response as texts with all special tokens, or as
token ids where tokens have no text. The texts are tokenised again, so a token that the policy chose
in the place of several others may come back as those.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.fit.cells import listed
from tokenenv.fit.encode import Encoder
from tokenenv.models.encoding import encode_prompt

EPISODES = "episodes.jsonl"
NO_SCORE = object()
"""Stands for the score of an episode that the environment did not score."""


def episode_columns(episode: Mapping[str, Any], encoder: Encoder, where: str) -> dict[str, Any]:
    """Return the columns of data for one episode: token ids, its score, and who wrote which
    token."""
    if not {"prompt", "response", "score"} <= set(episode):
        raise InvalidArgument(f"{where} is no episode of `tokenenv train`.")
    label, response = f"{where}: 'response'", episode["response"]
    columns = {
        "prompt_ids": encoder.ids(episode["prompt"], f"{where}: 'prompt'", encode_prompt),
        "score": NO_SCORE if episode["score"] is None else episode["score"],
    }
    if not episode.get("segments"):
        return columns | {"response_ids": encoder.ids(response, label)}
    segments = listed(episode["segments"], f"{where}: 'segments'")
    if isinstance(response, str):
        parts = [encoder.ids(_part(segment, "text", label), label) for segment in segments]
        ids, lengths = [token for part in parts for token in part], [len(part) for part in parts]
    else:
        ids = encoder.ids(response, label)
        lengths = [_part(segment, "length", label) for segment in segments]
    if sum(lengths) != len(ids):
        raise InvalidArgument(f"{label} has {len(ids)} tokens, and its segments {sum(lengths)}.")
    own = np.repeat([_part(segment, "own", label) for segment in segments], lengths)
    return columns | {"response_ids": ids, "own": own}


def _part(segment: Any, key: str, label: str) -> Any:
    kinds: dict[str, type] = {"text": str, "length": int, "own": bool}
    found: Any = segment.get(key) if isinstance(segment, Mapping) else None
    if not isinstance(found, kinds[key]) or (isinstance(found, int) and found < 0):
        raise InvalidArgument(f"{label} has a segment without {key!r}.")
    return found
