"""The KL penalty against the reference as a part of the reward. Its weight is the env's `kl_coef`,
beta, in reward per nat."""

import torch
from torch import Tensor

from tokenenv.rewards.seen import Transitions
from tokenenv.rewards.term import RewardTerm


class ReferenceKL(RewardTerm):
    """The half of the k1 penalty that does not depend on the policy: r_t = log pi_ref(y_t | s_t).

    The learner adds the other half, -beta log pi, before its advantage estimate; docs/contract.md
    says why, and what a learner that leaves it out optimises. Both halves together are exactly k1.
    In the max-ent view this is the reward r + beta log pi_ref with an entropy bonus. Tokens that
    the environment writes cost nothing: no policy chose them.
    """

    name = "kl"
    needs = frozenset({"reference"})

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the reference's log-prob of each token."""
        assert batch.ref_logprob is not None
        return batch.ref_logprob


class PolicyKL(RewardTerm):
    """The whole penalty, r_t = -k(log pi - log pi_ref) of the sampled token, with the log-prob that
    the action carries.

    With d = log pi - log pi_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, k2 = d^2/2,
    k3 = exp(-d) - 1 + d. As a reward only k1 has the right policy gradient; k2 and k3 optimise
    something else, and are there for comparison.
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
    """Return the k1, k2 or k3 estimate in nats, elementwise, from log pi - log pi_ref."""
    if estimator == "k1":
        return log_ratio
    return log_ratio.square() / 2 if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio
