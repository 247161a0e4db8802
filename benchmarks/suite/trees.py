"""Values and deviations that the texts of a group give each other, for grids of `tokenenv bench`:
where texts begin alike (TEMPO), where they stand alike (GiGPO), place by place (PlaceScaled).

`credit.py` says what these share with `algorithms.py`.

Suffixes: B texts, T response tokens, L tokens of the longest text, K tokens of all texts, N groups
of G texts each, S turns.
"""

import torch
from torch import Tensor

from benchmarks.suite.credit import GroupCredit, places
from tokenenv.agents.algorithms.groups import at_turns, group_rounding, group_std, hold_last
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import ROUNDING
from tokenenv.turns import turn_numbers


class TEMPO(GroupCredit):
    """Tree-estimated mean prefix value (Tran et al. 2025, arXiv 2509.18314): the texts of a group
    are a tree of prefixes, and at its branches tokens get the change of the value as well.

        V(s) = the mean whole return of the group's texts that begin with s
        A_it = (R_it - mean_j R_jt + V(s_{t+1}) - V(s_t)) / s

    s is the deviation of the group's whole returns; all is divided by it, as in the authors'
    published code. Where the texts that share s_t all go on with the same token, the difference is
    0 and this is GRPO. The first branch counts twice: a token that no other text of the group
    begins with gets 2 (R - mean R) / s. What differs: R are returns-to-go, for rewards on the way;
    with the reward at the end and gamma 1 the two are the same.
    """

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return GRPO's (B, T) plus the differences of values."""
        values_BL1 = prefix_values(returns_BT[:, 0], batch, self.group_size)
        place_BT = places(batch)
        change_BT = values_BL1.gather(1, place_BT + 1) - values_BL1.gather(1, place_BT)
        std_B1 = group_std(returns_BT, batch.response_length_B, self.group_size)
        return super().credit(returns_BT, batch) + change_BT / std_B1


def prefix_values(values_B: Tensor, batch: EpisodeBatch, group_size: int) -> Tensor:
    """Return (B, L + 1): at column l the mean value of the group's texts whose first l tokens are
    those of the text, whoever wrote them; 0 to the right of a text."""
    tokens_BL, lengths_B = batch.tokens_BL, batch.length_B
    numbers_B = torch.arange(len(values_B)) // group_size
    means = []
    for column in range(tokens_BL.shape[1] + 1):
        if column:
            pairs_B2 = torch.stack([numbers_B, tokens_BL[:, column - 1]], 1)
            numbers_B = pairs_B2.unique(dim=0, return_inverse=True)[1]
        # A text that is over is no longer one of those that go on.
        there_B = (lengths_B >= column).to(values_B)
        counts = values_B.new_zeros(len(values_B)).index_add(0, numbers_B, there_B)
        sums = values_B.new_zeros(len(values_B)).index_add(0, numbers_B, there_B * values_B)
        means.append((sums / counts.clamp(min=1.0))[numbers_B] * there_B)
    return torch.stack(means, 1)


class GiGPO(GroupCredit):
    """Group-in-group policy optimisation (Feng et al. 2025, arXiv 2505.10978): what a token earns
    is also compared with what others earned from the same state, the anchor.

        A_it = A_i + (R_it - mean R) / std R     over the tokens of the group with the anchor of it

    with A_i of GRPO, weight 1 as in the paper, and 1 for a deviation of 0. What differs: in the
    paper an anchor is what an agent's environment shows, which comes back in many texts. The state
    of a text is all of it, and the same beginning would make this the tree of `TEMPO`. So the
    anchor is the place and the token before it: what is known to a trainer, and nearly the state
    where a model looks one token back. `anchors` may be overridden by a better key. Returns have
    the discount of the settings (`gamma`, 1 by default; the paper has 0.95 per step).
    """

    def anchors(self, batch: EpisodeBatch) -> Tensor:
        """Return int64 (B, T): a key for the state that each token was chosen in. Tokens of a
        group at the same place are compared where their keys are the same."""
        return batch.tokens_BL.gather(1, (places(batch) - 1).clamp(min=0))

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return GRPO's (B, T) plus the comparison with the same anchor."""
        row_K, place_K = batch.mask_BT.nonzero(as_tuple=True)
        keys_K3 = torch.stack(
            [row_K // self.group_size, place_K, self.anchors(batch)[row_K, place_K]], 1
        )
        _, index_K, counts = keys_K3.unique(dim=0, return_inverse=True, return_counts=True)
        step_BT = torch.zeros_like(returns_BT)
        step_BT[row_K, place_K] = scaled(returns_BT[row_K, place_K], index_K, counts)
        return super().credit(returns_BT, batch) + step_BT


def scaled(values_K: Tensor, index_K: Tensor, counts: Tensor) -> Tensor:
    """Return the values (K,) less the mean of those with the same index, over their deviation;
    only centred where that is 0 up to rounding. `counts` are how many have each index."""
    exact_K, zeros = values_K.double(), torch.zeros(len(counts), dtype=torch.float64)
    rest_K = exact_K - (zeros.index_add(0, index_K, exact_K) / counts)[index_K]
    squares = zeros.index_add(0, index_K, rest_K**2)
    std_K = (squares / (counts - 1).clamp(min=1)).sqrt()[index_K]
    flat_K = std_K <= ROUNDING * exact_K.abs().max()
    return torch.where(flat_K, 0.0, rest_K / std_K).to(values_K)


class PlaceScaled(GroupCredit):
    """GRPO whose returns are divided by their deviation at each place, or in each turn
    (`baseline="turn"`), in place of the deviation of whole returns.

        (R_it - mean_j R_jt) / s_t,    s_t the deviation of the R_jt over the group at place t

    This is the normalisation per turn that multi-turn GRPO uses (Wei et al. 2025, arXiv
    2505.11821; verl's issue 7244). What differs: it is taken from returns-to-go and not from each
    turn's own rewards, whose mean would be a price on going on (that issue; `agents/algorithms/
    groups.py`). A text that is over stands with its last return. With the reward at the end all
    this is GRPO; with rewards on the way, places where the group's texts differ little weigh more.
    """

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): returns minus their group's mean over their deviation, place by place."""
        rest_BT = self.compared(returns_BT, batch, leave_one_out=False)
        if self.config.baseline == "place":
            return rest_BT / place_std(returns_BT, batch.response_length_B, self.group_size)
        turns_BT = torch.from_numpy(turn_numbers(batch.position_BT1[:, :-1].numpy()))
        std_BS = place_std(
            *at_turns(returns_BT, batch.response_length_B, turns_BT), self.group_size
        )
        return rest_BT / std_BS.gather(1, turns_BT.clamp(max=std_BS.shape[1] - 1))


def place_std(values_BT: Tensor, lengths_B: Tensor, group_size: int) -> Tensor:
    """Return (B, T): the deviation of the group's values at each place; 1 where they are the same
    up to rounding."""
    std_NT = hold_last(values_BT, lengths_B).unflatten(0, (-1, group_size)).std(1)
    rounding_N1 = group_rounding(values_BT, lengths_B, group_size)[:, None]
    std_NT = torch.where(std_NT <= rounding_N1, 1.0, std_NT)
    return std_NT.repeat_interleave(group_size, 0)
