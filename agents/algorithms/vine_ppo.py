"""VinePPO (Kazemnejad et al. 2024, arXiv 2410.01679): values by playing on from the states
themselves.

What it does: texts are cut every `max_new_tokens / segments` tokens. From the start of each segment
K = `rollouts` continuations are drawn with the present policy, and the mean of what they earn is
the value V there. With gamma 1 the tokens of a segment from place a to place b share the advantage

    A = sum_{a <= t < b} r_t + V(s_b) - V(s_a)

The loss is PPO's clip. Where a text is cut must not depend on what is still to come, its length
included; otherwise the gradient is biased.

The continuations run in the env of the texts. One slot reads a prefix, `fork` copies it (caches
included) to its neighbours, and all play to the end; then the running texts go on where they were.
With `rollout="vllm"` vLLM writes the continuations, beside the running texts. Their tokens count as
seen. Where an environment writes into texts, a state holds all that it has written so far, and what
it answers from there on is drawn anew in each continuation: V is the mean over both.

What it leaves out: a trained critic, and a value of the last state of a text that was cut without a
score (`score_truncated=False`). No text can be played on from there, so it counts as 0.

Suffixes: B episodes, T response tokens, S segments, K rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv import ranks
from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.learning.advantages import returns_to_go
from tokenenv.agents.learning.learner import Metrics
from tokenenv.agents.rollout.collector import Prefix
from tokenenv.agents.rollout.env_rows import method
from tokenenv.errors import InvalidArgument
from tokenenv.tables import Columns


@dataclass(kw_only=True, slots=True)
class VinePPOConfig(PolicyGradientConfig):
    """Settings of `VinePPO`."""

    batch_tokens: int = 512
    """Response tokens of finished episodes that one update learns from, at least, rollouts aside; 1
    or more."""
    segments: int = 4
    """Places of a text of the largest length whose value is estimated, 1 or more; a shorter text
    has fewer."""
    rollouts: int = 4
    """Continuations per value; 1 or more, at most the env's slots."""

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        self.check("at least", 1, "segments", "rollouts")


class VinePPO(PolicyGradient):
    """PPO with Monte-Carlo values."""

    config_class = VinePPOConfig
    config: VinePPOConfig

    @dataclass(kw_only=True)
    class _Keywords(VinePPOConfig, AgentKeywords): ...

    @takes(_Keywords)
    def __init__(self, envs: VectorEnv, config: Any = None, **options: Any) -> None:
        super().__init__(envs, config, **options)
        if self.config.rollout != "step":
            return
        if method(envs, "fork") is None:
            raise InvalidArgument(
                f"VinePPO needs an env that can fork its texts; {type(self.core).__name__} cannot."
            )
        if self.config.rollouts > envs.num_envs:
            raise InvalidArgument(
                f"rollouts={self.config.rollouts} do not fit into {envs.num_envs} slots."
            )

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn from finished episodes; return the field's scalars and the tokens that their
        values took."""
        before = self.collector.tokens_seen
        metrics = super().update(batch)
        own = {"time/rollout_tokens": self.collector.tokens_seen - before}
        return metrics | ranks.summed(own)

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return the advantages (B, T), the same for all tokens of a segment; leave the "value" of
        each segment's start."""
        episodes, segments = batch.unstack(), self.config.segments
        starts = [cuts(len(e.response), segments, self.max_new_tokens) for e in episodes]
        pairs = zip(episodes, starts, strict=True)
        states = [state_before(e, t) for e, places in pairs for t in places]
        # The continuations of all states are drawn at once, and handed out in the same order.
        columns = [e.columns for e, places in zip(episodes, starts, strict=True) for _ in places]
        values = iter(self.values(states, columns))
        rewards_BT, gamma = self.rewards(batch), self.config.gamma
        batch.learned["value"] = torch.zeros_like(rewards_BT)
        advantages_BT = torch.zeros_like(rewards_BT)
        for b, places in enumerate(starts):
            ends, own = [*places[1:], len(episodes[b].response)], [next(values) for _ in places]
            for start, end, value, after in zip(places, ends, own, [*own[1:], 0.0], strict=True):
                earned = (rewards_BT[b, start:end] * gamma ** torch.arange(end - start)).sum()
                advantages_BT[b, start:end] = earned + gamma ** (end - start) * after - value
                batch.learned["value"][b, start:end] = value
        return advantages_BT

    def values(self, states: Sequence[Prefix], columns: Sequence[Columns] = ()) -> list[float]:
        """Return the mean return from each state under the present policy, by K continuations each;
        `columns` are what belongs to the prompt of each state."""
        played = self.play_on(states, self.config.rollouts, columns)
        batch = EpisodeBatch.stack(played)
        rewards_BT, lengths_B = self.rewards(batch), batch.response_length_B
        returns_B = returns_to_go(rewards_BT, lengths_B, self.config.gamma)[:, 0]
        return returns_B.unflatten(0, (len(states), -1)).mean(1).tolist()


def state_before(episode: Episode, token: int) -> Prefix:
    """Return the state that the response token of this number was chosen in, with all that the
    environment has written by then."""
    behind = int(episode.places[token]) - len(episode.prompt)
    own = episode.own[:behind]
    return Prefix(episode.prompt, episode.after_prompt[:behind], None if own.all() else own)


def cuts(length: int, segments: int, longest: int) -> list[int]:
    """Return where the segments of a text of so many tokens begin, the first at 0: at the same
    places whatever its length."""
    starts = sorted({longest * s // segments for s in range(segments)})
    return [start for start in starts if start < length]
