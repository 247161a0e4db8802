"""Best of n: of the texts of a group, the one with the highest score. Nothing is learned; it costs n texts for one.

What it does: n is the env's `group_size`; `learn` logs the chosen texts, `generate` and `evaluate` draw n for each prompt.
Its KL to the policy it draws from is at most log n - (n - 1) / n nats, and that is what is reported.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .agent import Agent
from .episodes import Episode, EpisodeBatch
from .evaluate import best_of_n_kl
from .learner import Metrics


class BestOfN(Agent):
    """The best of n texts by the env's own score."""

    grouped = True

    @property
    def best_of(self) -> int:
        """n."""
        return self.group_size

    def collect(self) -> list[Episode]:
        """The best text of each finished group."""
        episodes, n = super().collect(), self.best_of
        return [max(episodes[i : i + n], key=lambda e: e.score) for i in range(0, len(episodes), n)]

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Nothing is learned; the KL is the bound."""
        return {"objective/kl": best_of_n_kl(self.best_of)}

    def generate(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[list[int]]:
        """The best of n continuations of each prompt, by the env's score."""
        n = self.best_of
        repeated = [prompt for prompt in prompts for _ in range(n)]
        responses = super().generate(repeated, **options)
        scores = self.core.score_episodes(repeated, responses).score.reshape(-1, n)
        return [responses[i * n + int(best)] for i, best in enumerate(np.argmax(scores, axis=1))]
