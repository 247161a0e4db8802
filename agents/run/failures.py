"""Writing down the texts at fault when a number is not finite."""

import json
from pathlib import Path
from typing import Any

from tokenenv.agents.episodes import Episode
from tokenenv.agents.run.tracking import segments, token_columns
from tokenenv.errors import NotFinite
from tokenenv.models.pieces import TokenPieces
from tokenenv.safety.trust import refuse_link
from tokenenv.types import TokenSpec

FILE = "failed_episodes.jsonl"


def write_failures(
    directory: Path, error: NotFinite, spec: TokenSpec | None, update: int, tokens_seen: int
) -> None:
    """Add a line of JSON to `failed_episodes.jsonl` for each text of the error.

    It says what is wrong, and holds the token ids, the text where there is a tokenizer and, of a
    text that has ended, its numbers per token (None where one is not finite).
    """
    tokenizer = spec.tokenizer if spec else None
    about = {"error": str(error), "update": update, "tokens_seen": tokens_seen}
    directory.mkdir(parents=True, exist_ok=True)
    refuse_link(directory / FILE)
    with (directory / FILE).open("a", encoding="utf-8") as lines:
        for text in error.texts:
            lines.write(json.dumps(about | _record(text, tokenizer)) + "\n")


def _record(text: Any, tokenizer: Any) -> dict[str, Any]:
    # Of a text that an environment writes into, the response alone would be the policy's tokens.
    pair = {"prompt": text.prompt, "response": getattr(text, "after_prompt", text.response)}
    ids = {name: [int(token) for token in tokens] for name, tokens in pair.items()}
    known: dict[str, Any] = {f"{name}_tokens": tokens for name, tokens in ids.items()}
    known["slot"] = getattr(text, "slot", None)
    if tokenizer is not None:
        known |= {name: tokenizer.decode(tokens) for name, tokens in ids.items()}
    if not isinstance(text, Episode):
        return known
    pieces = TokenPieces(tokenizer)
    turns = {"segments": segments(text, pieces)} if len(text.written) else {}
    return known | turns | token_columns(text, pieces)
