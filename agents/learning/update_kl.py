"""How far one update moves the policy, measured on some of its texts, and a warning where that is
far.

The minibatches' own "policy/approx_kl" cannot say it. It lacks the last step, which is the only one
of A2C's, and with stale texts it counts from the policy that wrote them. So some of the batch's
texts are read once more after the update, which costs about a hundredth of it. Texts that the
policy drew itself have the log-probs from before; of others those are computed anew.

Suffixes: B episodes, T response tokens.
"""

import warnings

import torch

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.learning.losses import approx_kl
from tokenenv.agents.learning.policy import LMPolicy

FAR = 1.0
"""Nats per token that no healthy update moves a policy by. SmolLM2-135M moves by 0.3 in its first
update with lr 1e-5 and by 3.8 with 3e-4."""
PROBED = 8
"""Texts of a large batch that are read again; of a small one an eighth, one at least."""


class Before:
    """The log-probs of some texts of a batch as an update begins."""

    def __init__(
        self, policy: LMPolicy, batch: EpisodeBatch, config: AgentConfig, update: int
    ) -> None:
        self._batch = batch
        self._options = config.max_batch_tokens, config.temperature
        self._probed_B = torch.zeros(len(batch), dtype=torch.bool)
        self._probed_B[:: max(PROBED, len(batch) // PROBED)] = True
        stale_B = self._probed_B & (batch.version_B < update)
        self._logprob_BT = batch.logprob_BT
        if stale_B.any():
            self._logprob_BT = token_logprobs(policy, batch, *self._options, stale_B)

    def kl(self, policy: LMPolicy) -> float:
        """Return KL(before || now) in nats per token (k3, at most 10 for one token)."""
        now_BT = token_logprobs(policy, self._batch, *self._options, self._probed_B)
        mask_BT = self._batch.mask_BT & self._probed_B[:, None]
        now_K, before_K = now_BT[mask_BT], self._logprob_BT[mask_BT]
        return float(approx_kl(now_K, before_K, torch.full_like(now_K, 1 / len(now_K))))


def warn_if_far(kl: float, update: int, lr: float) -> bool:
    """Warn where an update moved the policy by more than `FAR`; return whether it did."""
    if kl > FAR:
        warnings.warn(
            f"update {update} moved the policy by {kl:.2g} nats of KL per token, and {FAR:g} is "
            f"far: what the model could do before may be lost. Lower lr (it is {lr:.2g}), or end "
            f"such an update early by target_kl=0.1, or narrow clip_range.",
            stacklevel=2,
        )
    return kl > FAR
