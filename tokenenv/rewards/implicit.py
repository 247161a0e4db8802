"""The log-ratio of a preference-tuned model to the reference, as a reward for each token."""

from typing import Any

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.trunks import logprob_reader
from tokenenv.rewards.seen import Transitions
from tokenenv.rewards.term import Context, RewardTerm


class Implicit(RewardTerm):
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
    preserves_return = False
    preserves_gradient = False

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
        self.model, self.coef, self.clip, self.mix = model, coef, clip, mix
        needs = {"reference": True, "implicit model": model is None, "scorer": mix != 0}
        self.needs = frozenset(need for need, needed in needs.items() if needed)

    def bind(self, context: Context) -> None:
        """Takes the task's model, and beta, where none was given."""
        super().bind(context)
        model = context.task.implicit_model if self.model is None else self.model
        self.models = (model,)
        self._logprob = logprob_reader(model, context.spec.vocab_size)
        self._coef = context.kl_coef if self.coef is None else self.coef
        if self.coef is None and self._coef == 0:
            raise InvalidArgument(
                f"reward={self.name!r} takes this env's beta, which is 0; give Implicit(coef=...)."
            )

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the token's log-ratio times `coef`, and `mix` times the score where a text ends
        and is scored."""
        assert batch.ref_logprob is not None
        logprob = self._logprob(batch.before.of(self.models[0]), batch.tokens)
        # Both are -inf for a token that neither model has, and their difference would be NaN.
        ratio = torch.where(logprob == batch.ref_logprob, 0.0, logprob - batch.ref_logprob)
        paid = self._coef * ratio
        if self.clip is not None:
            paid = paid.clamp(-self.clip, self.clip)
        return paid + self.mix * batch.final_score() if self.mix else paid
