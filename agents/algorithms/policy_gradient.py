"""What the policy-gradient algorithms share: an advantage for each token, and a loss that follows
it.

An algorithm says what its `advantages` are; see `reinforce_plus_plus.py` for the shortest.
Suffixes: B episodes, T response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenenv.agents.agent import Agent
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import whiten
from tokenenv.agents.learning.learner import LossFunction, Metrics, Outputs, token_logprobs
from tokenenv.agents.rollout.staleness import importance
from tokenenv.errors import InvalidArgument


@dataclass(kw_only=True, slots=True)
class PolicyGradientConfig(AgentConfig):
    """Settings shared by the policy-gradient agents."""

    clip_range: float | None = 0.2
    """The policy ratio is clipped to 1 +- this, above 0; None takes no ratio: plain -A log pi."""
    clip_high: float | None = None
    """The upper side of the clip, where it differs (DAPO: 0.28 with 0.2 below), above 0; None is
    `clip_range`."""
    dual_clip: float | None = None
    """The largest ratio that a token with a negative advantage is charged for, above 1 (verl's
    `clip_ratio_c`, 3 there); None sets no bound."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token; 0 or more. It looks one token ahead only,
    unlike the KL reward."""
    k3_coef: float = 0.0
    """Weight of the k3 estimate of the KL to the reference as a loss, pi_ref / pi - 1 - log(pi_ref
    / pi) of emitted tokens, in nats per token; 0 or more. Bounded as verl's `low_var_kl`:
    log-ratios to +-20, the estimate to 10. It needs no forward of the reference, and pulls along
    the gradient of KL(reference || policy); `full_kl_coef` is exact."""
    gamma: float = 1.0
    """Discount per token, 0 to 1."""
    importance_cap: float | None = None
    """Above 0: each token's policy loss is weighted by pi_old / pi_sampler, at most this, and
    ratios are taken to pi_old, the learner's policy before the update. It makes what stale texts
    and an engine's log-probs distort smaller (2 is usual); in texts of several tokens not zero.
    None takes pi_sampler for pi_old."""
    whiten: bool = True
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""

    def __post_init__(self) -> None:
        AgentConfig.__post_init__(self)
        self.check("above", 0, "clip_range", "clip_high", "importance_cap")
        self.check("above", 1, "dual_clip")
        self.check("at least", 0, "entropy_coef", "k3_coef")
        self.check_share("gamma")
        for name in ("clip_high", "dual_clip"):
            if self.clip_range is None and getattr(self, name) is not None:
                raise InvalidArgument(
                    f"{name}={getattr(self, name)} bounds a ratio that clip_range=None does not "
                    f"take."
                )


class PolicyGradient(Agent):
    """Base of the agents that weigh log pi of each token with an advantage."""

    config_class = PolicyGradientConfig
    config: PolicyGradientConfig

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """(B, T), whatever right of each text; may leave more in `batch.learned`."""
        raise NotImplementedError

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learns from finished episodes; returns the field's scalars."""
        mask_BT, known = batch.mask_BT, self._policy_before(batch)
        advantages_BT = self.advantages(batch).masked_fill(~mask_BT, 0.0)
        batch.learned["advantage"] = (
            whiten(advantages_BT, mask_BT) if self.config.whiten else advantages_BT
        )
        return known | self.optimise(batch, lambda weights_B: self.loss(batch, weights_B))

    def _policy_before(self, batch: EpisodeBatch) -> Metrics:
        """Leaves log pi of the policy that the update begins with, where it is asked for and not
        known yet, and the importance weights; says how far the sampler of stale texts was from
        it."""
        cfg, stale_B = self.config, batch.version_B < self.updates
        if cfg.importance_cap is None and cfg.target_kl is None:
            return {}
        if "learner_logprob" not in batch.learned:
            # Where only the KL is asked for, fresh texts have it: they were drawn from this policy.
            which_B = stale_B if cfg.importance_cap is None else None
            own_BT = token_logprobs(
                self.policy, batch, cfg.max_batch_tokens, cfg.temperature, which_B
            )
            batch.learned["learner_logprob"] = own_BT
        metrics, stale_BT = {}, batch.mask_BT & stale_B[:, None]
        if stale_B.any():
            own_K, drawn_K = (
                values[stale_BT] for values in (batch.learned["learner_logprob"], batch.logprob_BT)
            )
            metrics["rollout/stale_kl"] = float(
                losses.approx_kl(own_K, drawn_K, torch.full_like(own_K, 1 / len(own_K)))
            )
        if cfg.importance_cap is not None:
            batch.learned["importance"] = weights_BT = importance(batch, cfg.importance_cap)
            metrics["rollout/importance"] = float(weights_BT[batch.mask_BT].mean())
        return metrics

    def loss(self, batch: EpisodeBatch, weights_B: Tensor) -> LossFunction:
        """The loss of one minibatch, in which a token of episode b counts `weights_B[b]`."""
        cfg = self.config
        before_BT = batch.learned.get("learner_logprob", batch.logprob_BT)
        old_BT = batch.logprob_BT if cfg.importance_cap is None else before_BT

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            weights, old = out.pick(weights_B), out.pick(old_BT)
            corrected = (
                weights
                if cfg.importance_cap is None
                else weights * out.pick(batch.learned["importance"])
            )
            policy = self.policy_loss(
                out.logprob, old, out.pick(batch.learned["advantage"]), corrected
            )
            entropy, ref_kl = (weights * out.entropy).sum(), (weights * out.ref_kl).sum()
            total = policy - cfg.entropy_coef * entropy + cfg.full_kl_coef * ref_kl
            metrics = {"loss/policy": policy, "policy/entropy": entropy}
            if cfg.k3_coef:
                metrics["loss/k3"] = k3 = losses.approx_kl(
                    out.pick(batch.ref_logprob_BT), out.logprob, weights
                )
                total = total + cfg.k3_coef * k3
            with torch.no_grad():
                metrics["policy/approx_kl"] = losses.approx_kl(
                    out.logprob, out.pick(before_BT), weights
                )
                if cfg.clip_range is not None:
                    outside = losses.clip_fraction(
                        out.logprob, old, weights, cfg.clip_range, cfg.clip_high
                    )
                    metrics["policy/clip_fraction"] = outside
            return total, metrics | ({"loss/full_kl": ref_kl} if cfg.full_kl_coef else {})

        return loss

    def policy_loss(
        self, logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, weights_K: Tensor
    ) -> Tensor:
        """Clipped, or plain where `clip_range` is None."""
        cfg = self.config
        if cfg.clip_range is None:
            return losses.policy_gradient_loss(logprobs_K, advantages_K, weights_K)
        bounds = cfg.clip_range, cfg.clip_high, cfg.dual_clip
        return losses.clipped_policy_loss(
            logprobs_K, old_logprobs_K, advantages_K, weights_K, *bounds
        )
