"""The log-ratio of a preference-tuned model to the reference, as a reward for each token."""

from typing import Any

from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.log_ratio import LogRatio
from tokenenv.rewards.seen import Transitions


class Implicit(LogRatio):
    """The log-ratio of a preference-tuned model to the reference (Rafailov et al. 2024, arXiv
    2404.12358): r_t = coef (log pi_dpo - log pi_ref)(y_t | s_t) + mix [score if the text ends
    here].

    A model that was tuned with DPO on beta is its own reward model. At the exact optimum of score -
    beta KL, with coef = beta, the log-ratio equals r + V*(s_{t+1}) - V*(s_t). It then adds up to
    score - V*(prompt) and is the reward of `Oracle`; only there are return and gradient preserved.
    Elsewhere it pays for fluent filler, and its sum drifts with the length. It pays the policy's
    own tokens; the models read what the environment writes, and nothing is paid for that.

    With clip = 0.05 and mix = 1 it is the reward of RTO (Zhong et al. 2024, arXiv 2404.18922): no
    token dominates, and what the score prefers is paid twice. With a model trained on outcomes it
    is that of PRIME (Cui et al. 2025, arXiv 2502.01456).

    Args:
        model: a causal language model with the reference's tokens; None takes the task's
            `implicit_model`.
        coef: reward per nat; None takes the env's beta at its construction, which then must not be
            0.
        clip: each token's log-ratio reward is clipped to [-clip, clip], more than 0; None clips
            nothing.
        mix: the weight of the score that is added where a text ends; it needs a scorer unless it is
            0.
    """

    name = "implicit"
    role = "implicit model"

    def __init__(
        self,
        model: Any = None,
        *,
        coef: float | None = None,
        clip: float | None = None,
        mix: float = 0.0,
    ) -> None:
        if clip is not None and not clip > 0:
            raise InvalidArgument(f"clip={clip} is not allowed; it must be more than 0, or None.")
        super().__init__(model, coef)
        self.clip, self.mix = clip, mix
        if mix != 0:
            self.needs |= {"scorer"}

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the token's log-ratio times `coef`, and `mix` times the score where a text ends
        and is scored."""
        paid = self._coef * self.log_ratio(batch)
        if self.clip is not None:
            paid = paid.clamp(-self.clip, self.clip)
        return paid + self.mix * batch.final_score() if self.mix else paid
