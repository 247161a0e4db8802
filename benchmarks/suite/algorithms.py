"""Published ways of giving the tokens of a text their share of what the text earned, as group
methods for grids of `tokenenv bench`:

    rows:
      gtpo: {reward: terminal, algo: "benchmarks.suite.algorithms:GTPO"}

    tokenenv bench --suite reshaped --modules benchmarks.suite.algorithms

This file has those that go by the policy's entropy or its distance from the reference.
`key_tokens.py` goes by which tokens are found in good texts, `trees.py` takes values and deviations
from a group, and `continuations.py` plays on. Grids find all of them under the name of this module.
`credit.py` says what they share: GRPO, and a KL penalty that they leave to it.

Suffixes: B texts, T response tokens, N groups of G texts each.
"""

from dataclasses import dataclass

from torch import Tensor

from benchmarks.suite.continuations import Resets
from benchmarks.suite.credit import CreditConfig, GroupCredit
from benchmarks.suite.key_tokens import KTAE
from benchmarks.suite.trees import TEMPO, GiGPO, PlaceScaled
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.errors import InvalidArgument

__all__ = ["CARL", "GTPO", "HICRA", "KTAE", "SPRO", "TEMPO", "GiGPO", "PlaceScaled", "Resets"]

MIN_ENTROPY = 0.01
"""Entropies count as at least this in `GTPO`, in nats: 1 / H has no bound."""


@dataclass(kw_only=True, slots=True)
class GTPOConfig(CreditConfig):
    """Settings of `GTPO`."""

    alpha: float = 0.3
    """Share of a token's reward that its entropy decides (a2 of the paper; a1 is the rest), 0 to
    1; 0 is GRPO."""

    def __post_init__(self) -> None:
        CreditConfig.__post_init__(self)
        self.check_share("alpha")


class GTPO(GroupCredit):
    """Group token policy optimisation (Tan et al. 2025, arXiv 2508.04349): uncertain tokens of
    successful texts are credited more, and confident tokens of failed texts are blamed more.

    At place t of a group d_t successful and h_t failed texts are not over. With H the entropy of
    the policy before the update, and sums over those texts, the reward of a token is

        1   x (a1 + a2 d_t H_it / sum_k H_kt)                  in a successful text
        -1  x (a1 + a2 h_t (1 / H_it) / sum_k (1 / H_kt))      in a failed one

    Both add up to +-(a1 + a2) times the texts that are there. What differs: the paper weighs
    rewards of 1 and -1 and then normalises them over tokens; here GRPO's advantages are weighed,
    after GRPO's own baseline and deviation, because scores have more than two values. These
    weights, with a1 + a2 = 1, are all that is taken from the paper. Left out is GRPO-S, its form
    for whole texts.
    """

    config_class = GTPOConfig
    config: GTPOConfig

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return GRPO's (B, T), times the weights."""
        ahead_B = self.compared(returns_BT, batch, leave_one_out=False)[:, 0]
        entropy_BT = self.token_outputs(batch).entropy_BT.clamp(min=MIN_ENTROPY)
        weights_BT = entropy_weights(entropy_BT, batch.mask_BT, ahead_B, self.group_size)
        alpha = self.config.alpha
        return super().credit(returns_BT, batch) * (1.0 - alpha + alpha * weights_BT)


def entropy_weights(
    entropy_BT: Tensor, mask_BT: Tensor, ahead_B: Tensor, group_size: int
) -> Tensor:
    """Return (B, T): the factors behind a2 in `GTPO`, for texts that have succeeded (`ahead_B` is
    above 0) and that have failed (below 0). Over either kind their mean is 1 in a group at each
    place. They are 1 in a text that is neither, and 0 to the right of a text."""
    weights_BT = (mask_BT & (ahead_B == 0)[:, None]).float()
    for values_BT, which_B in ((entropy_BT, ahead_B > 0), (1.0 / entropy_BT, ahead_B < 0)):
        chosen_BT = mask_BT & which_B[:, None]
        values_NGT = (values_BT * chosen_BT).unflatten(0, (-1, group_size))
        counts_N1T = chosen_BT.unflatten(0, (-1, group_size)).sum(1, keepdim=True)
        sums_N1T = values_NGT.sum(1, keepdim=True)
        weights_BT += (counts_N1T * values_NGT / sums_N1T.clamp(min=1e-30)).flatten(0, 1)
    return weights_BT


@dataclass(kw_only=True, slots=True)
class HICRAConfig(CreditConfig):
    """Settings of `HICRA`."""

    alpha: float = 0.2
    """How far the advantages of planning tokens are raised, in units of their size; 0 or more, 0
    is GRPO."""
    share: float = 0.2
    """Share of the batch's tokens that count as planning tokens, 0 to 1."""

    def __post_init__(self) -> None:
        CreditConfig.__post_init__(self)
        self.check("at least", 0, "alpha")
        self.check_share("share")


class HICRA(GroupCredit):
    """Hierarchy-aware credit assignment (Wang et al. 2025, arXiv 2509.03646): credit is moved
    towards planning tokens.

        A_it + alpha |A_it|   at a planning token,   A_it elsewhere        (A of GRPO, alpha 0.2)

    So a planning token of a good text is credited more, and one of a bad text is blamed less. The
    formula is as two open implementations have it. What differs: the paper finds planning tokens
    by a list of phrases that clusters of solutions gave ("let us try another way"). The words of
    an automaton hold no such phrases, so the tokens at which the policy was least certain stand
    for them, a fifth of the batch's (Wang et al. 2025, arXiv 2506.01939, take this share).
    """

    config_class = HICRAConfig
    config: HICRAConfig

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return GRPO's (B, T), raised at planning tokens."""
        credit_BT = super().credit(returns_BT, batch)
        planning_BT = self.uncertain(batch, self.config.share)
        return credit_BT + self.config.alpha * credit_BT.abs() * planning_BT


@dataclass(kw_only=True, slots=True)
class CARLConfig(CreditConfig):
    """Settings of `CARL`."""

    share: float = 0.4
    """Share of the batch's tokens that are learned from, 0 to 1; 1 is GRPO."""

    def __post_init__(self) -> None:
        CreditConfig.__post_init__(self)
        self.check_share("share")


class CARL(GroupCredit):
    """Criticality-aware agentic RL (Shen et al. 2025, arXiv 2512.04949): only the most uncertain
    actions are learned from.

        A_it   where the entropy of the policy is among the largest `share`,   0 elsewhere

    The paper reports updates on 60% fewer actions than GRPO's; hence `share` 0.4. What differs: an
    action is a token here and a turn there. In the paper further texts fork from uncertain states,
    the advantage of an action is the mean outcome behind it less that before it, and an action
    counts as critical where its state has been forked; here texts are not forked, and advantages
    are GRPO's (`continuations.py` plays on from uncertain states, and `trees.py` takes such
    differences). What is left out counts in the mean over tokens, so the loss is smaller by about
    `share`. The KL penalty of a token that is left out is not learned from either.
    """

    config_class = CARLConfig
    config: CARLConfig

    def reshape(self, advantages_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return the advantages (B, T), zero where the policy was certain."""
        return advantages_BT.masked_fill(~self.uncertain(batch, self.config.share), 0.0)


@dataclass(kw_only=True, slots=True)
class SPROConfig(CreditConfig):
    """Settings of `SPRO`."""

    process_coef: float = 0.05
    """Beta of the process reward, in deviations of the group's returns per nat; 0 or more, 0 is
    GRPO."""

    def __post_init__(self) -> None:
        CreditConfig.__post_init__(self)
        self.check("at least", 0, "process_coef")


class SPRO(GroupCredit):
    """Self-guided process reward optimisation (Fei et al. 2025, arXiv 2507.01551): the policy's
    own distance from the reference says how far a text has come.

        C_it = beta sum_{k <= t} log pi(token k) / pi_ref(token k)        cumulative process reward
        A_it = A_i + C_it - mean_j C_jt         over the group's texts that are not over at place t

    with A_i of GRPO. The mean has the own text in it, so the last place of the longest text alone
    gets 0. Taken from the paper: both formulas, with the log-probs that tokens were sampled with.
    Its beta could not be found; 0.05 is that of PRIME (Cui et al. 2025, arXiv 2502.01456), from
    which the process reward descends. What differs: the paper has no KL penalty, whereas here the
    penalty pulls each token the other way (it is paid -beta log pi / pi_ref from there on).
    """

    config_class = SPROConfig
    config: SPROConfig

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return GRPO's (B, T) plus the masked step advantage."""
        if not batch.ref_logprob_BT.any():
            raise InvalidArgument("SPRO needs an env that reports ref_logprob.")
        log_ratio_BT = batch.logprob_BT - batch.ref_logprob_BT
        step_BT = masked_step_advantages(log_ratio_BT, batch.mask_BT, self.group_size)
        return super().credit(returns_BT, batch) + self.config.process_coef * step_BT


def masked_step_advantages(log_ratio_BT: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """Return (B, T): the sum of a text's log-ratios up to each place, less its mean over the
    group's texts that are not over there."""
    sums_BT = log_ratio_BT.masked_fill(~mask_BT, 0.0).cumsum(1) * mask_BT
    counts_N1T = mask_BT.unflatten(0, (-1, group_size)).sum(1, keepdim=True)
    sums_NGT = sums_BT.unflatten(0, (-1, group_size))
    means_N1T = sums_NGT.sum(1, keepdim=True) / counts_N1T.clamp(min=1)
    return (sums_NGT - means_N1T).flatten(0, 1) * mask_BT
