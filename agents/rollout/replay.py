"""Finished episodes that are kept for later updates."""

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tokenenv.agents.episodes import Episode, EpisodeBatch


class Replay:
    """Keeps the latest episodes, as many as hold `capacity` response tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.episodes: deque[Episode] = deque()
        self.tokens = 0
        """Response tokens that are kept."""

    def add(self, episodes: Sequence[Episode]) -> None:
        """Take episodes in; the oldest leave."""
        # A new deque: a `copy.copy` of this object, which an agent goes back to when an update
        # fails, keeps the old one.
        self.episodes = deque([*self.episodes, *episodes])
        self.tokens += sum(len(e.response) for e in episodes)
        while self.tokens > self.capacity and len(self.episodes) > 1:
            self.tokens -= len(self.episodes.popleft().response)

    def sample(self, num_tokens: int, rng: np.random.Generator) -> list[Episode]:
        """Draw episodes, none twice, that hold at least `num_tokens` response tokens, or all."""
        chosen: list[Episode] = []
        for i in rng.permutation(len(self.episodes)):
            if num_tokens <= 0:
                break
            chosen.append(self.episodes[i])
            num_tokens -= len(chosen[-1].response)
        return chosen

    def take(self) -> list[Episode]:
        """Return all episodes and keep none."""
        taken, self.episodes, self.tokens = list(self.episodes), deque(), 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        return {"episodes": asdict(EpisodeBatch.stack(self.episodes)) if self.episodes else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.take()
        if state["episodes"]:
            self.add(EpisodeBatch(**state["episodes"]).unstack())
