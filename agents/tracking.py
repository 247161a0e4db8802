"""The run folder: TensorBoard events and every finished episode as a line of JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.types import TokenSpec

from .episodes import Episode


class RunFolder:
    """Writes `events.out.tfevents.*` and `episodes.jsonl` into a directory, after each update."""

    def __init__(self, directory: Path, spec: TokenSpec | None) -> None:
        # Imported here: it takes a second, and most uses write nothing.
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(directory))
        self._episodes = (directory / "episodes.jsonl").open("a", encoding="utf-8")
        self._tokenizer = spec.tokenizer if spec else None

    def __call__(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Logs one update at the tokens seen so far."""
        step = int(metrics["time/tokens"])
        for name, value in metrics.items():
            if np.isfinite(value):
                self._writer.add_scalar(name, value, step)
        for episode in episodes:
            self._episodes.write(json.dumps({"tokens_seen": step, **episode_record(episode, self._tokenizer)}) + "\n")
        self._episodes.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._writer.close()
        self._episodes.close()


def episode_record(episode: Episode, tokenizer: Any) -> dict[str, Any]:
    """What a reader wants of an episode, as JSON: texts if there is a tokenizer, else token ids; None for unknown numbers."""

    def text(tokens: np.ndarray) -> Any:
        return tokenizer.decode(tokens.tolist()) if tokenizer is not None else tokens.tolist()

    numbers = {"score": episode.score, "gold": episode.gold, "reward": float(episode.reward.sum()), "kl": episode.kl}
    return {
        "prompt_id": episode.prompt_id,
        "prompt": text(episode.prompt),
        "response": text(episode.response),
        "length": len(episode.response),
        "terminated": episode.terminated,
        **{name: value if np.isfinite(value) else None for name, value in numbers.items()},
    }
