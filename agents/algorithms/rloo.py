"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv
2402.14740).

What it does: each token's return-to-go minus the mean of those of the group's other texts at the
same place, for every source of reward (each with its own discount, PRIME, Cui et al. 2025, arXiv
2502.01456), added up, then whitened; PPO's clip. With the reward at the end, no KL penalty and
`whiten=False` it has the published method's advantages.

What it leaves out: a critic. A text is compared with whole other texts, so what decides between
them late is credited to early tokens as well.
"""

from torch import Tensor

from tokenenv.agents.algorithms.groups import GroupConfig, GroupMethod, compared
from tokenenv.agents.episodes import EpisodeBatch


class RLOO(GroupMethod):
    """REINFORCE leave-one-out. Its settings are those of every group method."""

    config_class = GroupConfig
    config: GroupConfig

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """(B, T): unbiased, as no text is part of its own baseline."""
        lengths_B = batch.response_length_B
        return sum(
            (
                compared(returns_BT, lengths_B, self.group_size, leave_one_out=True)
                for returns_BT in self.returns(batch).values()
            ),
            start=batch.reward_BT.new_zeros(()),
        )
