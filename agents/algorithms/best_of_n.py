"""Best of n: of the texts of a group, the one with the highest score.

What it does: n is the env's `group_size`. `learn` logs the chosen texts; `generate` and `evaluate`
draw n texts for each prompt and return the best one. Its KL to the policy that it draws from is at
most log n - (n - 1) / n nats (Beirami et al. 2024, arXiv 2401.01879), and that is what is reported.

What it leaves out: learning. Each text costs n texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gymnasium.vector import VectorEnv

from tokenenv.agents.agent import Agent
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.learning.learner import Metrics
from tokenenv.agents.rollout.env_rows import responds, wants_logprob
from tokenenv.agents.rollout.generate import Prompts, as_list
from tokenenv.agents.run.evaluate import best_of_each, best_of_n_kl
from tokenenv.errors import InvalidArgument


class BestOfN(Agent):
    """The best of n texts by the env's own score."""

    grouped = True
    learns = False

    if TYPE_CHECKING:

        @dataclass(kw_only=True)
        class _Keywords(AgentConfig, AgentKeywords): ...

        @takes(_Keywords)
        def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

    @property
    def best_of(self) -> int:
        """n."""
        return self.group_size

    def collect(self) -> list[Episode]:
        """Return the best text of each finished group."""
        episodes = super().collect()
        return [episodes[i] for i in best_of_each([e.score for e in episodes], self.best_of)]

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn nothing; return the bound as the KL."""
        return {"objective/kl": best_of_n_kl(self.best_of)}

    def generate(
        self,
        prompts: Prompts,
        columns: Mapping[str, Sequence[Any]] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """Return the best of n continuations of each prompt, by the env's score; `columns` are what
        belongs to the prompts, where the score asks for it: a list by name.

        Raises `InvalidArgument` where the env writes into texts: what is scored are whole texts,
        and those are written with the env (`run.evaluate.evaluate`).
        """
        if responds(self.envs):
            raise InvalidArgument(
                "BestOfN.generate writes one turn, and this env scores whole texts, into which it "
                "writes; evaluate(agent, envs, prompts=...).episodes are the best whole texts."
            )
        repeated = [prompt for prompt in as_list(prompts) for _ in range(self.best_of)]
        rows = {
            name: [value for value in values for _ in range(self.best_of)]
            for name, values in (columns or {}).items()
        }
        responses = super().generate(repeated, **options)
        if not responses:
            return []
        # The score does not depend on the KL. Where the env asks for log-probs, any will do.
        logprobs = None
        if wants_logprob(self.envs):
            logprobs = [[0.0] * len(response) for response in responses]
        given = {"logprobs": logprobs, **({"columns": rows} if rows else {})}
        scores = self.core.score_episodes(repeated, responses, **given).score
        return [responses[i] for i in best_of_each(scores, self.best_of)]
