"""KTAE: which tokens are found in successful texts of a group and not in failed ones, for grids of
`tokenenv bench`.

`credit.py` says what it shares with `algorithms.py`.

Suffixes: B texts, T response tokens, N groups of G texts each, V different tokens.
"""

import math

import torch
from torch import Tensor

from benchmarks.suite.credit import GroupCredit, places
from tokenenv.agents.episodes import EpisodeBatch


class KTAE(GroupCredit):
    """Key-token advantage estimation (Sun et al. 2025, arXiv 2505.16826): a token is credited for
    being found in successful texts of its group and not in failed ones.

    Of the texts that hold a token a have succeeded and b have failed, of those without it c and d:

        F = exp(-2 p), p of Fisher's exact test of that table, two-sided; 0 where p = 1
        I = the information (in bits) that the token's presence gives about success
        D = asin sqrt(a / (a + c)) - asin sqrt(b / (b + d)) + f / g - g / f
        A_it = A_i + 2 sigmoid((F + I) / 2 D) - 1                                 (A of GRPO)

    f and g are the token's frequencies among all tokens of successful and of failed texts, damped
    as in BM25: 3 q / (q + 1 + L / mean L) for a frequency q and L tokens. All as in the authors'
    published code, whose three weights are 1. What differs: only what counts as success. A group
    in which no text is above the mean has no key tokens.
    """

    def credit(self, returns_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return GRPO's (B, T) plus the value of each token."""
        tokens_BT = batch.tokens_BL.gather(1, places(batch))
        good_B = self.succeeded(returns_BT, batch)
        keys_BT = key_values(tokens_BT, batch.mask_BT, good_B, self.group_size)
        return super().credit(returns_BT, batch) + keys_BT


def key_values(tokens_BT: Tensor, mask_BT: Tensor, good_B: Tensor, group_size: int) -> Tensor:
    """Return (B, T): the value of each token in its group, -1 to 1; see `KTAE`."""
    known_V, index_BT = tokens_BT.unique(return_inverse=True)
    counts_BV = torch.zeros(len(tokens_BT), len(known_V), dtype=torch.float64)
    counts_BV.scatter_add_(1, index_BT, mask_BT.double())
    counts_NGV = counts_BV.unflatten(0, (-1, group_size))
    good_NG1 = good_B.view(-1, group_size, 1).double()
    # The first of each pair is of the successful texts.
    holding = [((counts_NGV > 0) * side).sum(1) for side in (good_NG1, 1.0 - good_NG1)]
    texts = [side.sum(1) for side in (good_NG1, 1.0 - good_NG1)]
    emitted = [(counts_NGV * side).sum(1) for side in (good_NG1, 1.0 - good_NG1)]
    f_NV, g_NV = damped(*emitted)
    shares = [held / count.clamp(min=1.0) for held, count in zip(holding, texts, strict=True)]
    direction_NV = shares[0].sqrt().asin() - shares[1].sqrt().asin()
    direction_NV += f_NV / (g_NV + 1e-5) - g_NV / (f_NV + 1e-5)
    p_NV = fisher(*holding, *texts)
    strength_NV = torch.where(p_NV < 1.0 - 1e-9, (-2.0 * p_NV).exp(), 0.0) + information(
        *holding, *texts
    )
    # 2 sigmoid(x) - 1 = tanh(x / 2). Where all texts have failed, p is 1 and nothing is told.
    keys_NV = torch.tanh(strength_NV * direction_NV / 4.0)
    keys_BT = keys_NV.repeat_interleave(group_size, 0).gather(1, index_BT)
    return keys_BT.float() * mask_BT


def damped(good_NV: Tensor, bad_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and g (N, V) of `KTAE`, given how often each token is in successful and in failed
    texts."""
    lengths = [counts.sum(1, keepdim=True) for counts in (good_NV, bad_NV)]
    mean_N1 = (lengths[0] + lengths[1]) / 2.0
    found = []
    for counts_NV, length_N1 in zip((good_NV, bad_NV), lengths, strict=True):
        frequency_NV = counts_NV / length_N1.clamp(min=1.0)
        found.append(3.0 * frequency_NV / (frequency_NV + 1.0 + length_N1 / mean_N1))
    return found[0], found[1]


def fisher(a_NV: Tensor, b_NV: Tensor, good_N1: Tensor, bad_N1: Tensor) -> Tensor:
    """Return (N, V) float64: the two-sided p of Fisher's exact test, where a of the successful and
    b of the failed texts hold the token."""
    most = int((good_N1 + bad_N1).max())
    k_K = torch.arange(most + 1, dtype=torch.float64)
    a, held = a_NV[..., None], (a_NV + b_NV)[..., None]
    good, bad = good_N1[..., None], bad_N1[..., None]
    possible_NVK = (k_K <= good) & (k_K <= held) & (held - k_K <= bad)

    def log_p(k: Tensor) -> Tensor:
        return log_choose(good, k) + log_choose(bad, held - k) - log_choose(good + bad, held)

    p_NVK = log_p(k_K).exp().masked_fill(~possible_NVK, 0.0)
    # Equally likely tables may differ by rounding.
    as_rare_NVK = p_NVK <= log_p(a).exp() * (1.0 + 1e-9)
    return (p_NVK * as_rare_NVK).sum(-1).clamp(max=1.0)


def log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Return the logarithm of the binomial coefficient; any finite number where it is 0."""
    rest = (n - k).clamp(min=0.0)
    return (n + 1).lgamma() - (k.clamp(min=0.0) + 1).lgamma() - (rest + 1).lgamma()


def information(a_NV: Tensor, b_NV: Tensor, good_N1: Tensor, bad_N1: Tensor) -> Tensor:
    """Return (N, V): the mutual information of the token's presence and success, in bits."""
    c_NV, d_NV, whole = good_N1 - a_NV, bad_N1 - b_NV, good_N1 + bad_N1
    with_NV, without_NV = (a_NV + b_NV) / whole, (c_NV + d_NV) / whole
    left_NV = with_NV * bits(a_NV, b_NV) + without_NV * bits(c_NV, d_NV)
    return bits(good_N1, bad_N1) - left_NV


def bits(one: Tensor, other: Tensor) -> Tensor:
    """Return the entropy of a choice between two, in bits, given how often each was made; 0 where
    neither was."""
    share = one / (one + other).clamp(min=1.0)
    return -(torch.xlogy(share, share) + torch.xlogy(1.0 - share, 1.0 - share)) / math.log(2.0)
