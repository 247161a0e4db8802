"""Texts that were not drawn from the policy that learns from them: how old they are, how far the
two policies are apart, and the weights that correct for it.

There are two causes. A text may have been begun before the last update. And an engine's log-probs
differ a little from the learner's, because its kernels and its precision are others. Suffixes: B
episodes, T response tokens, K tokens of any texts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import logprobs_and_values, token_logprobs
from tokenenv.agents.learning.policy import LMPolicy

Metrics = dict[str, float]


def staleness(batch: EpisodeBatch, updates: int) -> Metrics:
    """Return how many updates lie between the first token of each text and the update that learns
    from it: the mean, the largest, and the number of texts where there is any (stale texts)."""
    age_B = (updates - batch.version_B).float()
    return {
        "rollout/staleness": float(age_B.mean()),
        "rollout/staleness_max": float(age_B.max()),
        "rollout/stale_texts": float((age_B > 0).sum()),
    }


def reward_lag(batch: EpisodeBatch, version: int | None) -> Metrics:
    """Return the `version` of a reward model that the env trains, and how many updates lie between
    the version that priced each text and this one: the mean and the largest; nothing where the env
    trains none."""
    priced_B = batch.reward_version_B[batch.reward_version_B >= 0]
    if version is None or not len(priced_B):
        return {}
    lag_B = (version - priced_B).float()
    return {
        "rollout/reward_version": float(version),
        "rollout/reward_lag": float(lag_B.mean()),
        "rollout/reward_lag_max": float(lag_B.max()),
    }


def waiting(texts: Sequence[Any]) -> Metrics:
    """Return the number of ended texts that wait for the rest of their group, and of the response
    tokens that they hold."""
    return {
        "rollout/waiting_texts": float(len(texts)),
        "rollout/waiting_tokens": float(sum(len(text.response) for text in texts)),
    }


def rollout_metrics(
    batch: EpisodeBatch,
    policy: LMPolicy,
    config: AgentConfig,
    updates: int,
    *,
    with_values: bool = False,
) -> Metrics:
    """Return how old the texts are and, where vLLM wrote them, how far its log-probs are from the
    learner's. The latter are left in `learned["learner_logprob"]`, and `with_values` the critic's
    values (B, T + 1), which the same forward gives, in `learned["state_value"]`."""
    metrics = staleness(batch, updates)
    # The policy's own cache gives the learner's log-probs, up to rounding.
    if config.rollout in ("step", "episode"):
        return metrics
    options = config.max_batch_tokens, config.temperature
    if with_values:
        logprob_BT, batch.learned["state_value"] = logprobs_and_values(policy, batch, *options)
    else:
        logprob_BT = token_logprobs(policy, batch, *options)
    batch.learned["learner_logprob"] = logprob_BT
    return metrics | mismatch(batch, updates)


def mismatch(batch: EpisodeBatch, updates: int) -> Metrics:
    """Return how far the sampler's log-probs are from the learner's, in nats.

    The learner's are `learned["learner_logprob"]`. The metrics are the mean and the largest
    difference, and KL(sampler || learner) per token (k3); NaN where all texts are stale.
    """
    # In a stale text the two differ for another reason: the policy has been updated since.
    fresh_BT = batch.mask_BT & (batch.version_B == updates)[:, None]
    log_ratio_K = (batch.learned["learner_logprob"] - batch.logprob_BT)[fresh_BT]
    names = ("rollout/mismatch", "rollout/mismatch_max", "rollout/mismatch_kl")
    if not len(log_ratio_K):
        return dict.fromkeys(names, float("nan"))
    size_K = log_ratio_K.abs()
    k3_K = torch.expm1(log_ratio_K) - log_ratio_K
    found = size_K.mean(), size_K.max(), k3_K.mean()
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def importance(batch: EpisodeBatch, cap: float) -> Tensor:
    """Return the weight (B, T) of each token's policy loss, `min(pi_old / pi_sampler, cap)`.

    This is truncated importance sampling (Ionides 2008; for engines, Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"). pi_old is the learner's
    policy before the update, and policy ratios are then taken to it.
    """
    # A token's own ratio corrects its own draw, and not that of the tokens before it. The product
    # over the text would correct all, with a variance that grows with the length.
    return torch.exp(batch.learned["learner_logprob"] - batch.logprob_BT).clamp(max=cap)
