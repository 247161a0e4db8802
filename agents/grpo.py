"""GRPO: group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) with per-token returns.

What it does: each token's return-to-go minus the group's mean at the same place, divided by the deviation of the group's
returns; PPO's clip; every text counts alike. Switches turn it into its variants:

- Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): `scale="none"`, `aggregation="fixed-length"`.
- DAPO (Yu et al. 2025, arXiv 2503.14476): `clip_high=0.28`, `aggregation="token-mean"`, `skip_flat_groups=True`, and an
  env with `kl_coef=0` (its penalty on overlong texts is a reward term: `missing_eos_penalty`).
- GDPO (Liu et al. 2026, arXiv 2601.05242): `scale="source"`, `whiten=True`.

The KL penalty is a reward here, so that it is credited like one; DeepSeek's KL as a loss is `full_kl_coef` (exact over
the vocabulary) in an env with `kl_coef=0`.

What it leaves out: a critic. Dividing by a group's deviation weighs prompts by how much their texts agree.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import check_choice

from .episodes import Episode, EpisodeBatch
from .groups import GroupConfig, GroupMethod, group_mean, group_std

SCALES = ("group", "source", "none")
MAX_TRIES = 10
"""Batches that are drawn in search of groups that are not flat, before an update takes what it has."""


@dataclass(kw_only=True, slots=True)
class GRPOConfig(GroupConfig):
    """Settings of `GRPO`."""

    scale: str = "group"
    """What advantages are divided by: "group": the deviation of the group's returns; "source": each reward term's of its
    own (the KL penalty stays as it is, so beta then counts in deviations); "none": nothing."""
    skip_flat_groups: bool = False
    """Whether groups in which every text has the same score are drawn again."""
    aggregation: str = "sequence-mean"
    """"token-mean": every token counts alike; "sequence-mean": every episode does, whatever its length; "fixed-length": as
    the first, but the sum is divided by the longest length that texts can have."""
    whiten: bool = False
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""

    def __post_init__(self) -> None:
        GroupConfig.__post_init__(self)
        check_choice("scale", self.scale, SCALES)


class GRPO(GroupMethod):
    """Group-relative policy optimisation with one token as one action."""

    config_class = GRPOConfig
    config: GRPOConfig

    def collect(self) -> list[Episode]:
        """Whole groups; with `skip_flat_groups` those alone that can teach something, where there are any."""
        episodes = super().collect()
        if not self.config.skip_flat_groups:
            return episodes
        kept = self.without_flat_groups(episodes)
        for _ in range(MAX_TRIES):
            missing = self.config.batch_tokens - sum(len(e.response) for e in kept)
            if missing <= 0:
                break
            kept += self.without_flat_groups(self.collector.collect(missing))
        return kept or episodes

    def without_flat_groups(self, episodes: list[Episode]) -> list[Episode]:
        """The groups whose scores differ."""
        groups = [episodes[i : i + self.group_size] for i in range(0, len(episodes), self.group_size)]
        return [episode for group in groups if np.ptp([e.score for e in group]) > 0 for episode in group]

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """(B, T)."""
        returns, lengths_B, scale = self.returns(batch), batch.response_length_B, self.config.scale
        total_BT, totals_B = torch.zeros_like(batch.reward_BT), torch.zeros(len(batch))
        for name, returns_BT in returns.items():
            centred_BT = returns_BT - group_mean(returns_BT, lengths_B, self.group_size, leave_one_out=False)
            alone = scale == "source" and name != "kl"
            totals_B += returns_BT[:, 0]
            total_BT += centred_BT / group_std(returns_BT[:, 0], self.group_size) if alone else centred_BT
        if scale == "group":
            total_BT /= group_std(totals_B, self.group_size)
        return total_BT
