"""Best of n: of the texts of a group, the one with the highest score. Nothing is learned; it costs
n texts for one.

What it does: n is the env's `group_size`; `learn` logs the chosen texts, `generate` and `evaluate`
draw n for each prompt. Its KL to the policy it draws from is at most log n - (n - 1) / n nats, and
that is what is reported.
"""

from typing import Any

import numpy as np

from tokenenv.agents.agent import Agent
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.learning.learner import Metrics
from tokenenv.agents.rollout.env_rows import wants_logprob
from tokenenv.agents.rollout.generate import Prompts, as_list
from tokenenv.agents.run.evaluate import best_of_n_kl
from tokenenv.errors import InvalidArgument


class BestOfN(Agent):
    """The best of n texts by the env's own score."""

    grouped = True

    @property
    def best_of(self) -> int:
        """n."""
        return self.group_size

    def collect(self) -> list[Episode]:
        """The best text of each finished group."""
        episodes = super().collect()
        return [episodes[i] for i in self.best([e.score for e in episodes])]

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Nothing is learned; the KL is the bound."""
        return {"objective/kl": best_of_n_kl(self.best_of)}

    def generate(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """The best of n continuations of each prompt, by the env's score."""
        repeated = [prompt for prompt in as_list(prompts) for _ in range(self.best_of)]
        responses = super().generate(repeated, **options)
        if not responses:
            return []
        # The score knows of no KL: where the env asks for log-probabilities, any will do.
        logprobs = (
            [[0.0] * len(response) for response in responses] if wants_logprob(self.envs) else None
        )
        scores = self.core.score_episodes(repeated, responses, logprobs=logprobs).score
        return [responses[i] for i in self.best(scores)]

    def best(self, scores: Any) -> list[int]:
        """The place of the highest score of every n."""
        if scores is None or np.isnan(scores).any():
            raise InvalidArgument(
                f"BestOfN needs a score of every text, which {type(self.core).__name__} does not "
                f"give."
            )
        scores_GN = np.reshape(scores, (-1, self.best_of))
        return [
            self.best_of * group + int(best) for group, best in enumerate(scores_GN.argmax(axis=1))
        ]
