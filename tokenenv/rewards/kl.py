"""The KL penalty against the reference, in the env's reward. The weight is the env's `kl_coef`,
beta."""

import torch
from torch import Tensor

from tokenenv.rewards.term import RewardTerm, Transitions


class ReferenceKL(RewardTerm):
    """r_t = log pi_ref(y_t | s_t), the causal, policy-independent half of the k1 penalty.

    The learner adds -beta log pi itself, before its advantage estimate; both together are exactly
    k1 (the max-ent view: reward r + beta log pi_ref with an entropy bonus). Without that half the
    objective is another one: short, mode-seeking texts.
    """

    name = "kl"
    needs = frozenset({"reference"})

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the reference's log-prob of each token."""
        assert batch.ref_logprob is not None
        return batch.ref_logprob


class PolicyKL(RewardTerm):
    """r_t = -k(log pi - log pi_ref) of the sampled token, with the log-prob that the action
    carries.

    With d = log pi - log pi_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, k2 = d^2/2,
    k3 = exp(-d) - 1 + d. As a reward only k1 has the right policy gradient; k2 and k3 optimise
    something else and are there to compare.
    """

    name = "kl"
    kind = "policy"
    needs = frozenset({"reference"})

    def __init__(self, estimator: str = "k1", clamp: float | None = None) -> None:
        self.estimator = estimator
        self.clamp = clamp
        self.preserves_gradient = None if estimator == "k1" and clamp is None else False

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): minus the estimate, clamped to [-clamp, clamp] where a clamp is given."""
        assert batch.logprob is not None
        assert batch.ref_logprob is not None
        estimate = kl_estimate(batch.logprob - batch.ref_logprob, self.estimator)
        return -(estimate if self.clamp is None else estimate.clamp(-self.clamp, self.clamp))


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """The k1, k2 or k3 estimate in nats, elementwise, from log pi - log pi_ref."""
    if estimator == "k1":
        return log_ratio
    return log_ratio.square() / 2 if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio
