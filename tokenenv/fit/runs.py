"""Episodes of `tokenenv train` as data: an agent's own texts with their scores.

A line of a run's `episodes.jsonl` holds prompt and response as texts with all special tokens, or as
token ids where tokens have no text. The texts are tokenised again, so a token that the policy chose
in the place of several others may come back as those.
"""

from collections.abc import Mapping
from typing import Any

from tokenenv.errors import InvalidArgument
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
    prompt = encoder.ids(episode["prompt"], f"{where}: 'prompt'", encode_prompt)
    label, segments = f"{where}: 'response'", episode.get("segments")
    if not segments or not isinstance(episode["response"], str):
        parts = [encoder.ids(episode["response"], label)]
    else:
        parts = [encoder.ids(_part(segment, "text", label), label) for segment in segments]
    columns: dict[str, Any] = {
        "prompt_ids": prompt,
        "response_ids": [token for part in parts for token in part],
        "score": NO_SCORE if episode["score"] is None else episode["score"],
    }
    if segments:
        counts = map(len, parts)
        if len(parts) != len(segments):
            counts = (_part(segment, "length", label) for segment in segments)
        owns = zip(segments, counts, strict=True)
        columns["own"] = [bool(_part(s, "own", label)) for s, count in owns for _ in range(count)]
    return columns


def _part(segment: Any, key: str, label: str) -> Any:
    kinds = {"text": str, "length": int, "own": bool}
    found = segment.get(key) if isinstance(segment, Mapping) else None
    if not isinstance(found, kinds[key]):
        raise InvalidArgument(f"{label} has a segment without {key!r}.")
    return found
