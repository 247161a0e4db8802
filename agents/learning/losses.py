"""Losses: pure functions of K response tokens taken from any mix of texts.

`weights_K` says how much each token counts and sums to 1 over a minibatch, so that the losses of
its micro-batches add up to exactly the minibatch's loss, however it is cut. All logarithms are
natural, and all losses are to be minimised.
"""

import torch
from torch import Tensor


def token_weights(lengths_B: Tensor, aggregation: str) -> Tensor:
    """Return the weight (B,) float32 of each token of B episodes that are averaged together.

    "token-mean": every token counts alike (DAPO). "sequence-mean": every episode counts alike, and
    its tokens share its weight (GRPO). "fixed-length": as "token-mean"; `loss_scale` then rescales
    the loss.
    """
    lengths_B = lengths_B.float()
    if aggregation == "sequence-mean":
        return 1.0 / (len(lengths_B) * lengths_B)
    return torch.full_like(lengths_B, 1.0) / lengths_B.sum()


def loss_scale(lengths_B: Tensor, aggregation: str, max_length: int) -> float:
    """Return the factor that a minibatch's loss is multiplied with.

    Under "fixed-length" it is the mean length over the longest possible one, so that the loss is a
    sum over tokens divided by a constant (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). Otherwise
    it is 1.
    """
    return float(lengths_B.float().mean()) / max_length if aggregation == "fixed-length" else 1.0


def policy_gradient_loss(logprobs_K: Tensor, advantages_K: Tensor, weights_K: Tensor) -> Tensor:
    """Return `-sum w A log pi`, whose gradient is the policy gradient's (Williams 1992)."""
    return -(weights_K * advantages_K * logprobs_K).sum()


def clipped_policy_loss(
    logprobs_K: Tensor,
    old_logprobs_K: Tensor,
    advantages_K: Tensor,
    weights_K: Tensor,
    clip_range: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Return `clipped_ratio_loss` of the token ratio `pi / pi_old` (PPO, Schulman et al. 2017)."""
    log_ratio_K = logprobs_K - old_logprobs_K
    return clipped_ratio_loss(
        log_ratio_K, advantages_K, weights_K, clip_range, clip_high, dual_clip
    )


def clipped_ratio_loss(
    log_ratio_K: Tensor,
    advantages_K: Tensor,
    weights_K: Tensor,
    clip_range: float | None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Return `-sum w min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_high) A)` of any policy
    ratio, given as its logarithm (PPO, Schulman et al. 2017, equation 7).

    A `clip_high` other than `clip_range`, its default, is DAPO's (Yu et al. 2025, arXiv
    2503.14476). A `clip_range` of None leaves the clip out: `-sum w ratio A`. With `dual_clip`,
    where A < 0, the min is at least `dual_clip A`: a token that has become far likelier since it
    was drawn cannot cost without bound (Ye et al. 2020, arXiv 1912.09729; verl's `clip_ratio_c`).
    """
    ratio_K = torch.exp(log_ratio_K)
    gains_K = ratio_K * advantages_K
    if clip_range is not None:
        high = clip_range if clip_high is None else clip_high
        clipped_K = ratio_K.clamp(1.0 - clip_range, 1.0 + high)
        # The smaller gain: a ratio that has gone far enough the way its advantage points has no
        # gradient, and one that went the wrong way keeps it.
        gains_K = torch.minimum(gains_K, clipped_K * advantages_K)
    # At a negative advantage the smaller gain has no bound: it grows with the ratio.
    if dual_clip is not None:
        bounded_K = torch.maximum(gains_K, dual_clip * advantages_K)
        gains_K = torch.where(advantages_K < 0, bounded_K, gains_K)
    return -(weights_K * gains_K).sum()


def clipped_value_loss(
    values_K: Tensor,
    old_values_K: Tensor,
    targets_K: Tensor,
    weights_K: Tensor,
    clip_range: float | None,
) -> Tensor:
    """Return `1/2 sum w max((v - target)^2, (clip(v, old +- clip_range) - target)^2)`; a
    `clip_range` of None leaves the clip out."""
    errors_K = (values_K - targets_K) ** 2
    if clip_range is not None:
        clipped_K = old_values_K + (values_K - old_values_K).clamp(-clip_range, clip_range)
        # The larger error: a clip may slow the critic down, and never hides how wrong it is.
        errors_K = torch.maximum(errors_K, (clipped_K - targets_K) ** 2)
    return 0.5 * (weights_K * errors_K).sum()


def approx_kl(logprobs_K: Tensor, old_logprobs_K: Tensor, weights_K: Tensor) -> Tensor:
    """Return KL(old || new) in nats per token, estimated from tokens that old has drawn: `sum w
    (ratio - 1 - log ratio)`, never negative (k3, Schulman 2020).

    Log-ratios are clamped to +-20 and a token's estimate to 10, with no gradient beyond (as verl
    does).
    """
    log_ratio_K = (logprobs_K - old_logprobs_K).clamp(-20.0, 20.0)
    # expm1 keeps the digits near ratio 1, where the two terms nearly cancel.
    return (weights_K * (torch.expm1(log_ratio_K) - log_ratio_K).clamp(max=10.0)).sum()


def clip_fraction(
    logprobs_K: Tensor,
    old_logprobs_K: Tensor,
    weights_K: Tensor,
    clip_range: float,
    clip_high: float | None = None,
) -> Tensor:
    """Return the weighted share of tokens whose ratio lies outside `[1 - clip_range, 1 +
    clip_high]`."""
    return (weights_K * outside_clip(logprobs_K - old_logprobs_K, clip_range, clip_high)).sum()


def outside_clip(log_ratio_K: Tensor, clip_range: float, clip_high: float | None = None) -> Tensor:
    """Return bool (K,): where a ratio, given as its logarithm, lies outside `[1 - clip_range, 1 +
    clip_high]`."""
    change_K = torch.exp(log_ratio_K) - 1.0
    high = clip_range if clip_high is None else clip_high
    return (change_K < -clip_range) | (change_K > high)


def explained_variance(predictions_K: Tensor, targets_K: Tensor) -> float:
    """Return `1 - var(targets - predictions) / var(targets)`: 1 is perfect, 0 is no better than a
    constant. It is NaN where the targets are constant."""
    variance = float(targets_K.var(correction=0))
    if variance == 0:
        return float("nan")
    return 1.0 - float((targets_K - predictions_K).var(correction=0)) / variance
