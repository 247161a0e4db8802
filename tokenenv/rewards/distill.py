"""Distillation of a teacher on the policy's own texts, as a reward for each token."""

import math
from typing import Any

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.rewards.log_ratio import LogRatio
from tokenenv.rewards.seen import Transitions
from tokenenv.rewards.term import Context
from tokenenv.types import TokenSpec

CLIP = 100.0
"""Nats: more than any token's log-ratio between models that can both emit it, as a rule."""


class Distill(LogRatio):
    """The log-ratio of a teacher to the reference (on-policy distillation; Agarwal et al. 2024,
    arXiv 2306.13649): r_t = coef clip(log pi_T - log pi_ref)(y_t | s_t).

    With coef = beta, the KL term and the learner's half of it, a token is paid

        beta (log pi_T - log pi_ref) + beta log pi_ref - beta log pi = -beta (log pi - log pi_T)

    in all. That is -beta times the k1 estimate of KL(pi || pi_T), so the sum follows the exact
    gradient of the reverse KL to the teacher, and the best policy is the teacher. The same holds
    with kl="policy" and the estimator "k1". Another coef mixes reference and teacher: the best
    policy over whole texts is pi_ref (pi_T / pi_ref)^(coef / beta), normalised.

    It pays the policy's own tokens, scored or not; the teacher reads what the environment writes,
    and nothing is paid for that. It does not read the task's score, and preserves neither return
    nor gradient of it.

    Args:
        model: the teacher, a causal language model with the policy's tokens; None takes the task's
            `teacher`. A model object brings no tokenizer and is taken to read the policy's ids.
        coef: reward per nat, more than 0; None takes the env's beta at its construction, which then
            must not be 0. Under kl="none" it must be given: then nothing but the agent's own losses
            keeps the policy from the one text with the largest ratio.
        first: the share of `max_new_tokens`, above 0 and up to 1, in which a token is paid,
            from the text's beginning. At least one token is. None, with `last` None: all are paid.
        last: the same share up to `max_new_tokens`; a text that ends earlier has fewer such tokens,
            or none. With `first` too, both parts are paid.
        clip: each token's log-ratio is kept in [-clip, clip] nats, more than 0 and finite. So a
            token that the teacher cannot emit (-inf) costs coef * clip.

    Raises:
        InvalidArgument: a setting is out of range.
        ModelError: the teacher has another vocabulary; raised when an env is made.
    """

    name = "distill"
    role = "teacher"

    def __init__(
        self,
        model: Any = None,
        *,
        coef: float | None = None,
        first: float | None = None,
        last: float | None = None,
        clip: float = CLIP,
    ) -> None:
        for name, value in {"coef": coef, "clip": clip}.items():
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgument(f"{name}={value} is not allowed; it must be above 0, finite.")
        for name, value in {"first": first, "last": last}.items():
            if value is not None and not 0 < value <= 1:
                raise InvalidArgument(
                    f"{name}={value} is not allowed; it must be above 0 and at most 1, a share of "
                    "max_new_tokens."
                )
        super().__init__(model, coef)
        self.first, self.last, self.clip = first, last, clip

    def bind(self, context: Context) -> None:
        """Take the task's teacher, and beta, where none was given."""
        super().bind(context)
        check_vocabulary(self.models[0], context.spec)
        self._max_new_tokens = context.spec.max_new_tokens

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the token's log-ratio, clipped, times `coef`; 0 where the text's part is not
        paid."""
        paid = self._coef * self.log_ratio(batch).clamp(-self.clip, self.clip)
        if self.first is None and self.last is None:
            return paid
        return torch.where(self._pays(batch.before.step), paid, 0.0)

    def _pays(self, step: Tensor) -> Tensor:
        """Whether the token after `step` (K,) of the policy's tokens is paid, (K,) bool."""
        length = self._max_new_tokens
        beginning = 0 if self.first is None else share_of(self.first, length)
        end = 0 if self.last is None else share_of(self.last, length)
        return (step < beginning) | (step >= length - end)


def share_of(share: float, max_new_tokens: int) -> int:
    """Return how many of T tokens a share of them is, rounded, at least one."""
    return max(1, round(share * max_new_tokens))


def check_vocabulary(teacher: Any, spec: TokenSpec) -> None:
    """Raise `ModelError` where a teacher cannot have the policy's tokens: a `TokenModel` with
    another number of them, or a transformers model that lacks some of the tokenizer's ids."""
    config = getattr(teacher, "config", None)
    if config is None:
        size = getattr(teacher, "vocab_size", spec.vocab_size)
        fits = size == spec.vocab_size
        wanted = f"{spec.vocab_size}"
    else:
        # Embeddings are padded to different sizes, so a larger or smaller number may be the same
        # tokens, as long as it covers the tokenizer's.
        vocab = {} if spec.tokenizer is None else spec.tokenizer.get_vocab()
        least = max(vocab.values(), default=spec.vocab_size - 1) + 1
        size = int(config.get_text_config().vocab_size)
        fits = size >= least
        wanted = f"{least} or more"
    if not fits:
        raise ModelError(
            f"the teacher ({type(teacher).__name__}) has {size} token ids; allowed: {wanted}, the "
            "policy's own tokens, since it is asked for the probability of each of them."
        )
