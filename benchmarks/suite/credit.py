"""GRPO with one formula left open: what the tokens of a text get of what the text earned.

The methods of `algorithms.py`, `trees.py` and `continuations.py` are GRPO (Shao et al. 2024, arXiv
2402.03300) but for their `credit`. With R the returns-to-go of the reward terms, K those of the KL
penalty, and j over the texts of a group:

    A_it = credit(R)_it + K_it - mean_j K_jt
    GRPO:  credit(R)_it = (R_it - mean_j R_jt) / s,   s the deviation of the group's whole returns

The published methods have no KL penalty in the reward. Here it is one, is credited as GRPO credits
it, and is neither weighed nor divided by a method, so beta means the same in all rows of a grid.
Where a method tells successful texts from failed ones, a text has succeeded if its whole return is
above its group's mean, as scores may have more than two values.

Suffixes: B texts, T response tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from tokenenv.agents import GroupMethod
from tokenenv.agents.algorithms.groups import GroupConfig, group_std
from tokenenv.agents.algorithms.grpo import paid, total
from tokenenv.agents.episodes import EpisodeBatch


@dataclass(kw_only=True, slots=True)
class CreditConfig(GroupConfig):
    """Settings of `GroupCredit`, with the defaults of GRPO."""

    aggregation: str = "sequence-mean"
    """"token-mean": every token counts alike; "sequence-mean": every text does, whatever its
    length; "fixed-length": as the first, but the sum is divided by the longest length that texts
    can have."""
    whiten: bool = False
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""


class GroupCredit(GroupMethod):
    """GRPO, whose subclasses say how the tokens of a text share what the reward terms pay."""

    config_class = CreditConfig
    config: CreditConfig

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return the advantages (B, T) that the top of this file defines."""
        returns = self.returns(batch)
        penalty_BT = self.compared(returns["kl"], batch, leave_one_out=False)
        return penalty_BT + self.credit(total(paid(returns)), batch)

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): the part of the advantages that comes from the reward terms, given their
        returns-to-go. Here it is GRPO's."""
        rest_BT = self.compared(returns_BT, batch, leave_one_out=False)
        return rest_BT / group_std(returns_BT, batch.response_length_B, self.group_size)

    def succeeded(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return bool (B,): the texts whose whole return is above their group's mean."""
        return self.compared(returns_BT, batch, leave_one_out=False)[:, 0] > 0

    def uncertain(self, batch: EpisodeBatch, share: float) -> Tensor:
        """Return bool (B, T): the tokens at which the policy was least certain before the update,
        that share of the batch's. A token without an alternative, under an action mask, is never
        among them."""
        entropy_BT, mask_BT = self.token_outputs(batch).entropy_BT, batch.mask_BT
        # Where most tokens are the only ones that are allowed, the quantile is 0 and all reach it.
        enough_BT = entropy_BT >= entropy_BT[mask_BT].quantile(1.0 - share)
        return mask_BT & enough_BT & (entropy_BT > 0)


def places(batch: EpisodeBatch) -> Tensor:
    """Return int64 (B, T): where in its text each of the policy's tokens is; 0 to the right."""
    # What a batch has at the end of each row is the text's length, where there may be no token.
    return batch.position_BT1[:, :-1].masked_fill(~batch.mask_BT, 0)
