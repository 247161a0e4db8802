"""Texts that were not drawn from the policy that learns from them: how old they are, how far off,
and what corrects it.

An engine's log-probs differ a little from the learner's (other kernels, other precision), and a
text may be older than the last update. Suffixes: B episodes, T response tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.learning.policy import LMPolicy

Metrics = dict[str, float]


def staleness(batch: EpisodeBatch, updates: int) -> Metrics:
    """Updates between the first token of each text and the one that learns from it: the mean, the
    largest, and how many texts are stale at all."""
    age_B = (updates - batch.version_B).float()
    return {
        "rollout/staleness": float(age_B.mean()),
        "rollout/staleness_max": float(age_B.max()),
        "rollout/stale_texts": float((age_B > 0).sum()),
    }


def waiting(texts: Sequence[Any]) -> Metrics:
    """The ended texts that wait for the rest of their group, and the response tokens that they
    hold."""
    return {
        "rollout/waiting_texts": float(len(texts)),
        "rollout/waiting_tokens": float(sum(len(text.response) for text in texts)),
    }


def rollout_metrics(
    batch: EpisodeBatch,
    policy: LMPolicy,
    config: AgentConfig,
    updates: int,
    waiting_texts: Sequence[Any],
) -> Metrics:
    """Return how old the texts are and, where an engine wrote them, how far its log-probs are from
    the learner's. The latter are left in `learned["learner_logprob"]`."""
    metrics = staleness(batch, updates) | waiting(waiting_texts)
    if config.rollout == "step":
        return metrics
    batch.learned["learner_logprob"] = token_logprobs(
        policy, batch, config.max_batch_tokens, config.temperature
    )
    return metrics | mismatch(batch, updates)


def mismatch(batch: EpisodeBatch, updates: int) -> Metrics:
    """How far the sampler's log-probs are from the learner's `learned["learner_logprob"]`, in nats,
    on the tokens of the texts that are not stale (NaN where all are): the mean and the largest
    difference, and KL(sampler || learner) per token (k3)."""
    fresh_BT = batch.mask_BT & (batch.version_B == updates)[:, None]
    log_ratio_K = (batch.learned["learner_logprob"] - batch.logprob_BT)[fresh_BT]
    if not len(log_ratio_K):
        return dict.fromkeys(
            ("rollout/mismatch", "rollout/mismatch_max", "rollout/mismatch_kl"), float("nan")
        )
    return {
        "rollout/mismatch": float(log_ratio_K.abs().mean()),
        "rollout/mismatch_max": float(log_ratio_K.abs().max()),
        "rollout/mismatch_kl": float((torch.expm1(log_ratio_K) - log_ratio_K).mean()),
    }


def importance(batch: EpisodeBatch, cap: float) -> Tensor:
    """The weight (B, T) of each token's policy loss, `min(pi_old / pi_sampler, cap)`: truncated
    importance sampling (Ionides 2008; for engines, Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). pi_old is the learner's policy before the update,
    and what ratios are then taken to."""
    return torch.exp(batch.learned["learner_logprob"] - batch.logprob_BT).clamp(max=cap)
