"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv
2402.14740).

What it does: each token's return-to-go is compared with the mean of the group's other texts at the
same place (or in the same turn, `baseline="turn"`), for every source of reward on its own (each
with its discount; PRIME, Cui et al. 2025, arXiv 2502.01456). With G texts in a group and R_it^s the
return of source s from token t of text i,

    A_it = sum_s ( R_it^s - 1 / (G - 1) sum_{j != i} R_jt^s )

The sum is whitened, and the loss is PPO's clip. With the reward at the end, no KL penalty and
`whiten=False` it has the published method's advantages.

What it leaves out: a critic. A text is compared with whole other texts, so what decides between
them late is credited to early tokens as well.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv.agents.algorithms.groups import GroupConfig, GroupMethod
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes


class RLOO(GroupMethod):
    """REINFORCE leave-one-out. Its settings are those of every group method."""

    config_class = GroupConfig
    config: GroupConfig

    if TYPE_CHECKING:

        @dataclass(kw_only=True)
        class _Keywords(GroupConfig, AgentKeywords): ...

        @takes(_Keywords)
        def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): unbiased advantages, as no text is part of its own baseline."""
        advantages_BT = torch.zeros_like(batch.reward_BT)
        for returns_BT in self.returns(batch).values():
            advantages_BT += self.compared(returns_BT, batch, leave_one_out=True)
        return advantages_BT
