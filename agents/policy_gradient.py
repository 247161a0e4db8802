"""What the policy-gradient algorithms share: an advantage for each token, and a loss that follows it.

An algorithm says what its `advantages` are; see `reinforce_plus_plus.py` for the shortest. Suffixes: B episodes, T response
tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import losses
from .advantages import whiten
from .agent import Agent
from .config import AgentConfig
from .episodes import EpisodeBatch
from .learner import LossFunction, Metrics, Outputs, token_logprobs
from .staleness import importance


@dataclass(kw_only=True, slots=True)
class PolicyGradientConfig(AgentConfig):
    """Settings shared by the policy-gradient agents."""

    clip_range: float | None = 0.2
    """The policy ratio is clipped to 1 +- this, above 0; None takes no ratio: plain -A log pi."""
    clip_high: float | None = None
    """The upper side of the clip, where it differs (DAPO: 0.28 with 0.2 below), above 0; None is `clip_range`."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token; 0 or more. It looks one token ahead only, unlike the KL reward."""
    gamma: float = 1.0
    """Discount per token, 0 to 1."""
    importance_cap: float | None = None
    """Above 0: each token's policy loss is weighted by pi_old / pi_sampler, at most this, and ratios are taken to pi_old, the
    learner's policy before the update. It makes what stale texts and an engine's log-probs distort smaller (2 is usual); in
    texts of several tokens not zero. None takes pi_sampler for pi_old."""
    whiten: bool = True
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""

    def __post_init__(self) -> None:
        AgentConfig.__post_init__(self)
        self.check("above", 0, "clip_range", "clip_high", "importance_cap")
        self.check("at least", 0, "entropy_coef")
        self.check_share("gamma")


class PolicyGradient(Agent):
    """Base of the agents that weigh log pi of each token with an advantage."""

    config_class = PolicyGradientConfig
    config: PolicyGradientConfig

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """(B, T), whatever right of each text; may leave more in `batch.learned`."""
        raise NotImplementedError

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learns from finished episodes; returns the field's scalars."""
        mask_BT, corrected = batch.mask_BT, self._correct(batch)
        advantages_BT = self.advantages(batch).masked_fill(~mask_BT, 0.0)
        batch.learned["advantage"] = whiten(advantages_BT, mask_BT) if self.config.whiten else advantages_BT
        return corrected | self.optimise(batch, lambda weights_B: self.loss(batch, weights_B))

    def _correct(self, batch: EpisodeBatch) -> Metrics:
        """Leaves log pi_old and the importance weights, where they are asked for."""
        cfg = self.config
        if cfg.importance_cap is None:
            return {}
        if "learner_logprob" not in batch.learned:
            batch.learned["learner_logprob"] = token_logprobs(self.policy, batch, cfg.max_batch_tokens, cfg.temperature)
        batch.learned["importance"] = weights_BT = importance(batch, cfg.importance_cap)
        return {"rollout/importance": float(weights_BT[batch.mask_BT].mean())}

    def loss(self, batch: EpisodeBatch, weights_B: Tensor) -> LossFunction:
        """The loss of one minibatch, in which a token of episode b counts `weights_B[b]`."""
        cfg = self.config
        old_BT = batch.logprob_BT if cfg.importance_cap is None else batch.learned["learner_logprob"]

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            weights, old = out.pick(weights_B), out.pick(old_BT)
            corrected = weights if cfg.importance_cap is None else weights * out.pick(batch.learned["importance"])
            policy = self.policy_loss(out.logprob, old, out.pick(batch.learned["advantage"]), corrected)
            entropy, ref_kl = (weights * out.entropy).sum(), (weights * out.ref_kl).sum()
            total = policy - cfg.entropy_coef * entropy + cfg.full_kl_coef * ref_kl
            with torch.no_grad():
                metrics = {
                    "loss/policy": policy,
                    "policy/entropy": entropy,
                    "policy/approx_kl": losses.approx_kl(out.logprob, old, weights),
                }
                if cfg.clip_range is not None:
                    outside = losses.clip_fraction(out.logprob, old, weights, cfg.clip_range, cfg.clip_high)
                    metrics["policy/clip_fraction"] = outside
            return total, metrics | ({"loss/full_kl": ref_kl} if cfg.full_kl_coef else {})

        return loss

    def policy_loss(self, logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, weights_K: Tensor) -> Tensor:
        """Clipped, or plain where `clip_range` is None."""
        cfg = self.config
        if cfg.clip_range is None:
            return losses.policy_gradient_loss(logprobs_K, advantages_K, weights_K)
        return losses.clipped_policy_loss(logprobs_K, old_logprobs_K, advantages_K, weights_K, cfg.clip_range, cfg.clip_high)
