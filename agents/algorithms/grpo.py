"""GRPO: group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) with per-token
returns.

What it does: each token's return-to-go minus the group's mean at the same place (or in the same
turn, `baseline="turn"`); what the reward terms pay is divided by the deviation of the group's
returns; PPO's clip; every text counts alike. With R the returns of the terms, K those of the KL
penalty, G texts in a group, and R_j0 the whole return of text j:

    A_it = (R_it - mean_j R_jt) / s + K_it - mean_j K_jt
    s^2 = sum_j (R_j0 - mean R_j0)^2 / (G - 1),   s = 1 where the R_j0 are the same up to rounding

The KL penalty has no part in s and is not divided by it (docs/algorithms.md says why). So beta
counts in deviations of the score, as where the KL is a loss (DeepSeek, TRL, verl). Switches turn
GRPO into its variants:

- Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): `scale="none"`, `aggregation="fixed-length"`.
- DAPO (Yu et al. 2025, arXiv 2503.14476): `clip_high=0.28`, `aggregation="token-mean"`,
  `skip_flat_groups=True`, and an env with `kl_coef=0` (its penalty on overlong texts is a reward
  term: `missing_eos_penalty`).
- GDPO (Liu et al. 2026, arXiv 2601.05242): `scale="source"`, `whiten=True`.

The KL penalty is a reward here, so that it is credited like one. DeepSeek's KL as a loss is
`full_kl_coef` (exact over the vocabulary) in an env with `kl_coef=0`.

What it leaves out: a critic. Dividing by a group's deviation weighs prompts by how much their texts
agree.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv.agents.algorithms.groups import (
    GroupConfig,
    GroupMethod,
    flat_groups,
    group_std,
)
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.rollout.replay import Replay
from tokenenv.errors import check_choice

SCALES = ("group", "source", "none")
MAX_TRIES = 10
"""Batches that are drawn in search of groups that are not flat, after the first, before an update
takes what it has."""


@dataclass(kw_only=True, slots=True)
class GRPOConfig(GroupConfig):
    """Settings of `GRPO`."""

    scale: str = "group"
    """What advantages are divided by: "group": the deviation of the group's returns; "source": each
    reward term's by that of its own returns; "none": nothing. The KL penalty is never divided, so
    beta counts in deviations unless this is "none"."""
    skip_flat_groups: bool = False
    """Whether groups in which the reward terms pay every text the same are drawn again; the KL
    penalty does not count."""
    aggregation: str = "sequence-mean"
    """"token-mean": every token counts alike; "sequence-mean": every episode does, whatever its
    length; "fixed-length": as the first, but the sum is divided by the longest length that texts
    can have."""
    whiten: bool = False
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""

    def __post_init__(self) -> None:
        GroupConfig.__post_init__(self)
        check_choice("scale", self.scale, SCALES)


class GRPO(GroupMethod):
    """Group-relative policy optimisation with one token as one action."""

    config_class = GRPOConfig
    config: GRPOConfig
    own_statistics = ("kept",)

    if TYPE_CHECKING:

        @dataclass(kw_only=True)
        class _Keywords(GRPOConfig, AgentKeywords): ...

        @takes(_Keywords)
        def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

    def running_statistics(self) -> dict[str, Any]:
        """Return the groups that are kept while more are drawn. Where that is interrupted, the next
        `collect` goes on with them."""
        return {"kept": Replay(sys.maxsize)}

    def collect(self) -> list[Episode]:
        """Return whole groups; with `skip_flat_groups` only those that can teach something, where
        there are any."""
        if not self.config.skip_flat_groups:
            return super().collect()
        kept: Replay = self.statistics["kept"]
        # What was kept in an earlier call that was interrupted counts as well.
        drawn: list[Episode] = []
        for _ in range(1 + MAX_TRIES):
            missing = self.batch_tokens - kept.tokens
            seen = self.collector.tokens_seen
            has_ended = bool(drawn) and seen >= self.collector.ending.total
            if missing <= 0 or has_ended:
                break
            drawn = self.collector.collect(missing)
            kept.add(self.without_flat_groups(drawn))
        # Where all groups were flat, the last ones: an update that teaches little still moves on.
        return kept.take() or drawn

    def without_flat_groups(self, episodes: list[Episode]) -> list[Episode]:
        """Return the groups whose texts the reward terms pay differently."""
        batch = EpisodeBatch.stack(episodes)
        returns_BT = total(paid(self.returns(batch)))
        flat_G = flat_groups(returns_BT, batch.response_length_B, self.group_size)
        keep = ~flat_G.repeat_interleave(self.group_size)
        return [episode for episode, kept in zip(episodes, keep.tolist(), strict=True) if kept]

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return the advantages (B, T) that the top of this file defines."""
        returns, scale, lengths_B = self.returns(batch), self.config.scale, batch.response_length_B
        terms = paid(returns) if scale == "source" else [total(paid(returns))]
        # The KL penalty is compared and never divided.
        advantages_BT = self.compared(returns["kl"], batch, leave_one_out=False)
        for returns_BT in terms:
            rest_BT = self.compared(returns_BT, batch, leave_one_out=False)
            if scale != "none":
                rest_BT = rest_BT / group_std(returns_BT, lengths_B, self.group_size)
            advantages_BT = advantages_BT + rest_BT
        return advantages_BT


def paid(returns: dict[str, Tensor]) -> list[Tensor]:
    """Return the returns of all sources but the KL penalty; there is at least one."""
    return [returns_BT for name, returns_BT in returns.items() if name != "kl"]


def total(returns: list[Tensor]) -> Tensor:
    """Return the sum (B, T) of some returns."""
    return torch.stack(returns).sum(0)
