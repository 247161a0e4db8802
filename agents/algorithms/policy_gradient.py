"""What the policy-gradient algorithms share: an advantage for each token, and a loss that follows
it.

One update does this, and a subclass may replace any of the three steps that are named:

    A = advantages(batch)                          the algorithm
    A = whiten(A)                                  where `whiten` is set
    A = reshape(A, batch)                          a reweighting of one's own; by default none
    for each epoch and minibatch, down the gradient of

        L = policy_loss(out, batch, weights)       by default PPO's clip on the ratio of each token
            - entropy_coef H + full_kl_coef KL(pi || pi_ref) + k3_coef k3
            + distill_coef KL(pi_T || pi)

`target_kl`, the entropy bonus, both KL losses and the importance weights of stale texts do not
depend on what `policy_loss` takes for its ratio. See `reinforce_plus_plus.py` for the shortest
algorithm, and docs/your-algorithm.md for writing one.

What it leaves out: a critic (`ppo.py`) and groups of texts (`groups.py`).

Suffixes: B episodes, T response tokens, K response tokens of one micro-batch, flat.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenenv.agents.agent import Agent
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.hooks import check_loss, described
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import whiten
from tokenenv.agents.learning.learner import (
    LossFunction,
    Metrics,
    Outputs,
    TokenOutputs,
    token_logprobs,
    token_outputs,
)
from tokenenv.agents.rollout.staleness import importance
from tokenenv.errors import InvalidArgument, NotFinite


@dataclass(kw_only=True, slots=True)
class PolicyGradientConfig(AgentConfig):
    """Settings shared by the policy-gradient agents."""

    clip_range: float | None = 0.2
    """The policy ratio is clipped to 1 +- this, above 0. None takes no ratio: plain -A log pi."""
    clip_high: float | None = None
    """The upper side of the clip, where it differs (DAPO: 0.28 with 0.2 below), above 0; None is
    `clip_range`."""
    dual_clip: float | None = None
    """The largest ratio that a token with a negative advantage is charged for, above 1 (verl's
    `clip_ratio_c`, 3 there); None sets no bound."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token; 0 or more. It looks one token ahead only,
    unlike the KL reward."""
    full_kl_coef: float = 0.0
    """Weight of the full-vocabulary KL to the reference as a loss, in nats per token; 0 or more. It
    costs one forward of the reference."""
    k3_coef: float = 0.0
    """Weight of the k3 estimate of the KL to the reference as a loss, pi_ref / pi - 1 - log(pi_ref
    / pi) of emitted tokens, in nats per token; 0 or more. Bounded as verl's `low_var_kl`:
    log-ratios to +-20, the estimate to 10. It needs no forward of the reference, and pulls along
    the gradient of KL(reference || policy); `full_kl_coef` is exact."""
    distill_coef: float = 0.0
    """Weight of the full-vocabulary KL(pi_T || pi) from the env's teacher as a loss, in nats per
    token; 0 or more (docs/distill.md). It costs one forward of the teacher."""
    gamma: float = 1.0
    """Discount per token, 0 to 1."""
    importance_cap: float | None = None
    """Above 0: each token's policy loss is weighted by pi_old / pi_sampler, at most this, and
    ratios are taken to pi_old, the learner's policy before the update. It reduces what stale texts
    and an engine's log-probs distort (2 is usual); in texts of several tokens something is left.
    None takes pi_sampler for pi_old."""
    whiten: bool = True
    """Whether advantages are brought to mean 0 and deviation 1 over the batch's tokens."""

    def __post_init__(self) -> None:
        AgentConfig.__post_init__(self)
        self.check("above", 0, "clip_range", "clip_high", "importance_cap")
        self.check("above", 1, "dual_clip")
        self.check("at least", 0, "entropy_coef", "full_kl_coef", "k3_coef", "distill_coef")
        self.check_share("gamma")
        for name in ("clip_high", "dual_clip"):
            value = getattr(self, name)
            if self.clip_range is None and value is not None:
                raise InvalidArgument(
                    f"{name}={value} bounds a ratio that clip_range=None does not take."
                )


class PolicyGradient(Agent):
    """Base of the agents that weigh log pi of each token with an advantage."""

    config_class = PolicyGradientConfig
    config: PolicyGradientConfig

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return (B, T) float32: the advantage of each response token; anything to the right of
        each text. May leave more in `batch.learned`."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages(batch).")

    def reshape(self, advantages_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return the advantages (B, T) to learn from, made of those that the algorithm found; here
        they are returned as they are.

        Called once an update, after whitening and before the first loss. `advantages_BT` is zero to
        the right of each text. What a reweighting may read: `self.token_outputs(batch)` (entropies
        and log-probs of the policy before the update), `batch.mask_BT`, the rewards and terms in
        `batch`, and `self.group_size` (that many consecutive rows share a prompt).
        """
        return advantages_BT

    def policy_loss(self, out: Outputs, batch: EpisodeBatch, weights_K: Tensor) -> Tensor:
        """Return the loss () of a micro-batch's K tokens: PPO's clip on the ratio of each token, or
        plain `-A log pi` where `clip_range` is None.

        `out` holds whole texts; `weights_K` sums to 1 over the minibatch (importance weights, where
        there are any, are multiplied in). `out.pick(...)` of `batch.learned["advantage"]` and of
        `batch.learned["old_logprob"]`, the log-probs that ratios are taken to, gives (K,). Metrics
        of its own go into `out.logged`.
        """
        if self.config.clip_range is None:
            advantages_K = out.pick(batch.learned["advantage"])
            return losses.policy_gradient_loss(out.logprob, advantages_K, weights_K)
        log_ratio_K = out.logprob - out.pick(batch.learned["old_logprob"])
        return self.clipped_loss(log_ratio_K, out, batch, weights_K)

    def clipped_loss(
        self, log_ratio_K: Tensor, out: Outputs, batch: EpisodeBatch, weights_K: Tensor
    ) -> Tensor:
        """Return the loss () of any policy ratio, given as its logarithm (K,), clipped as the
        config says (`losses.clipped_ratio_loss`; where `clip_range` is None the ratio is not
        clipped). Logs the share of tokens whose ratio lies outside as "policy/clip_fraction"."""
        cfg = self.config
        if cfg.clip_range is not None:
            outside_K = losses.outside_clip(log_ratio_K.detach(), cfg.clip_range, cfg.clip_high)
            out.logged["policy/clip_fraction"] = outside_K
        bounds = cfg.clip_range, cfg.clip_high, cfg.dual_clip
        advantages_K = out.pick(batch.learned["advantage"])
        return losses.clipped_ratio_loss(log_ratio_K, advantages_K, weights_K, *bounds)

    def token_outputs(self, batch: EpisodeBatch) -> TokenOutputs:
        """Return log pi and entropy of every response token under the policy before the update,
        `(logprob_BT, entropy_BT)`, in nats; zero to the right of each text.

        For `advantages` and `reshape`. The first call of an update costs one forward over the
        batch; later calls return what it found (`batch.learned["learner_entropy"]`).

        Raises:
            InvalidArgument: first called while minibatches are learned from, when the policy is no
                longer the one before the update.
        """
        if "learner_entropy" not in batch.learned:
            if "advantage" in batch.learned:
                raise InvalidArgument(
                    "token_outputs(batch) describes the policy before the update; call it first in "
                    "advantages() or reshape(), not in a loss."
                )
            cfg = self.config
            found = token_outputs(self.policy, batch, cfg.max_batch_tokens, cfg.temperature)
            batch.learned["learner_entropy"] = found.entropy_BT
            batch.learned["token_logprob"] = found.logprob_BT
            # "learner_logprob" stays what another setting has made it: for `target_kl` alone, texts
            # that are not stale have the sampler's log-probs there, which an engine has rounded.
            batch.learned.setdefault("learner_logprob", found.logprob_BT)
        return TokenOutputs(batch.learned["token_logprob"], batch.learned["learner_entropy"])

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn from finished episodes; return the field's scalars."""
        metrics, mask_BT = self._policy_before(batch), batch.mask_BT
        # Before any step: what these three leave is of the policy that the update begins with.
        advantages_BT = self._of_tokens(self.advantages(batch), batch, "advantages")
        if self.config.whiten:
            advantages_BT = whiten(advantages_BT, mask_BT)
        advantages_BT = self._of_tokens(self.reshape(advantages_BT, batch), batch, "reshape")
        batch.learned["advantage"] = advantages_BT
        return metrics | self.optimise(batch, lambda weights_B: self.loss(batch, weights_B))

    def _of_tokens(self, values_BT: Any, batch: EpisodeBatch, method: str) -> Tensor:
        """Return what a method found for each token, with zeros to the right of each text.

        Another shape would broadcast and then be learned from, so it is refused, as is a
        number that is not finite.
        """
        mask_BT = batch.mask_BT
        if not isinstance(values_BT, Tensor):
            raise InvalidArgument(
                f"{type(self).__name__}.{method} returned {described(values_BT)}; it must return a "
                f"tensor (B, T) = {tuple(mask_BT.shape)}, one number a response token."
            )
        if values_BT.shape != mask_BT.shape:
            raise InvalidArgument(
                f"{type(self).__name__}.{method} returned the shape {tuple(values_BT.shape)}; it "
                f"must be (B, T) = {tuple(mask_BT.shape)}, one number a response token."
            )
        values_BT = values_BT.detach().masked_fill(~mask_BT, 0.0)
        wrong_BT = ~values_BT.isfinite()
        if wrong_BT.any():
            row, token = wrong_BT.nonzero()[0].tolist()
            raise NotFinite(
                f"{type(self).__name__}.{method} returned {float(values_BT[row, token])} for token "
                f"{token} of text {row} of the batch, in update {self.updates}.",
                texts=[
                    text for text, bad in zip(batch.unstack(), wrong_BT.any(1), strict=True) if bad
                ],
            )
        return values_BT

    def _policy_before(self, batch: EpisodeBatch) -> Metrics:
        """Leave in `batch.learned` what an update compares the policy with: "old_logprob", which
        ratios are taken to, and, where a setting asks for them, "learner_logprob" (log pi of the
        policy that the update begins with) and "importance". Return how far the sampler of stale
        texts was from that policy."""
        cfg, stale_B = self.config, batch.version_B < self.updates
        batch.learned["old_logprob"] = batch.logprob_BT
        if cfg.importance_cap is None and cfg.target_kl is None:
            return {}
        if "learner_logprob" not in batch.learned:
            # Where only the KL is asked for, texts that are not stale have it: they were drawn from
            # this policy.
            which_B = stale_B if cfg.importance_cap is None else None
            batch.learned["learner_logprob"] = token_logprobs(
                self.policy, batch, cfg.max_batch_tokens, cfg.temperature, which_B
            )
        own_BT = batch.learned["learner_logprob"]
        metrics, stale_BT = {}, batch.mask_BT & stale_B[:, None]
        if stale_B.any():
            own_K, drawn_K = own_BT[stale_BT], batch.logprob_BT[stale_BT]
            weights_K = torch.full_like(own_K, 1 / len(own_K))
            metrics["rollout/stale_kl"] = float(losses.approx_kl(own_K, drawn_K, weights_K))
        if cfg.importance_cap is not None:
            batch.learned["old_logprob"] = own_BT
            batch.learned["importance"] = weights_BT = importance(batch, cfg.importance_cap)
            metrics["rollout/importance"] = float(weights_BT[batch.mask_BT].mean())
        return metrics

    def loss(self, batch: EpisodeBatch, weights_B: Tensor) -> LossFunction:
        """Return the loss of one minibatch, in which a token of episode b counts `weights_B[b]`."""
        cfg, learned = self.config, batch.learned
        # Where nothing asked for the policy before the update, the sampler stands in for it.
        before_BT = learned.get("learner_logprob", batch.logprob_BT)

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            weights = corrected = out.pick(weights_B)
            # Only the policy's loss is an average over the sampler's tokens that a ratio corrects:
            # entropy and full KL are exact at each state.
            if cfg.importance_cap is not None:
                corrected = weights * out.pick(learned["importance"])
            policy = self.policy_loss(out, batch, corrected)
            check_loss(policy, out.logged, len(corrected), type(self).__name__)
            entropy, ref_kl = (weights * out.entropy).sum(), (weights * out.ref_kl).sum()
            total, metrics = policy, {"loss/policy": policy, "policy/entropy": entropy}
            # What has no weight is left out of the loss: its gradient, passes over the vocabulary,
            # is then not computed.
            if cfg.entropy_coef:
                total = total - cfg.entropy_coef * entropy
            if cfg.full_kl_coef:
                metrics["loss/full_kl"] = ref_kl
                total = total + cfg.full_kl_coef * ref_kl
            if cfg.distill_coef:
                metrics["loss/distill"] = teacher_kl = (weights * out.teacher_kl).sum()
                total = total + cfg.distill_coef * teacher_kl
            if cfg.k3_coef:
                ref_logprob = out.pick(batch.ref_logprob_BT)
                metrics["loss/k3"] = k3 = losses.approx_kl(ref_logprob, out.logprob, weights)
                total = total + cfg.k3_coef * k3
            with torch.no_grad():
                # Of every token, whatever ratio the loss takes: `target_kl` stops on it.
                before = out.pick(before_BT)
                metrics["policy/approx_kl"] = losses.approx_kl(out.logprob, before, weights)
                for name, values in out.logged.items():
                    metrics[name] = (weights * values.detach().to(weights)).sum()
            return total, metrics

        return loss
