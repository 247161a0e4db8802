"""Whether the rewards keep the return and the gradient of the score.

Shapes: B texts, T response tokens, H histories, V tokens.
"""

from dataclasses import dataclass

import numpy as np

from tokenenv.audit.statistics import within
from tokenenv.audit.texts import KL, Paid
from tokenenv.env.vector_env import TokenVectorEnv

CLOSE = 1e-4
"""A deviation of the return, relative to its largest value, that is rounding."""
GRADIENT_CLOSE = 1e-3
"""A relative error of the gradient that is rounding."""


@dataclass(frozen=True, slots=True)
class Preservation:
    """What the rewards keep of the score. A number is None where it is not known."""

    declared_return: bool | None
    """What the terms declare, all of them together; None: not stated, or several terms."""
    declared_gradient: bool | None
    deviation: float | None
    """The largest distance of (sum of rewards - score) from its mean over the prompt's texts; None
    without a score."""
    factor: float | None
    """What the score is multiplied by, by least squares within prompts."""
    deviation_after_factor: float | None
    """The same distance, of (sum of rewards - factor * score)."""
    largest: float
    """The largest absolute return, which the deviations are compared with."""
    gradient_error: float | None
    """|g - g*| / |g*|, with g what reward-to-go follows and g* the gradient of the expected sum of
    rewards, at the reference, over all texts; None where they cannot be enumerated."""
    score_gradient_error: float | None
    """The same, with g* of the expected score."""
    gold_cosine: float | None
    """The cosine of the angle between g and the gradient of expected gold."""

    @property
    def keeps_return(self) -> bool | None:
        """Whether the return is the score's up to a constant of the prompt, within rounding."""
        return _small(self.deviation, CLOSE * max(1.0, self.largest))

    @property
    def keeps_scaled_return(self) -> bool | None:
        """Whether it is so up to a factor."""
        return _small(self.deviation_after_factor, CLOSE * max(1.0, self.largest))

    @property
    def keeps_gradient(self) -> bool | None:
        """Whether reward-to-go follows the gradient of the expected sum of rewards: as measured,
        else as declared."""
        if self.gradient_error is not None:
            return self.gradient_error <= GRADIENT_CLOSE
        return self.declared_gradient


def _small(value: float | None, bound: float) -> bool | None:
    return None if value is None else value <= bound


def preservation(envs: TokenVectorEnv, paid: Paid, everything: Paid | None) -> Preservation:
    """Return what the rewards keep, from texts of the reference, and from all texts where these
    are known."""
    looked_at = paid if everything is None else everything
    scored = np.flatnonzero(~looked_at.cut_B | envs.token_spec.score_truncated)
    at = looked_at.at(scored) if len(scored) else None
    deviation = factor = after = None
    if at is not None and at.score_B is not None:
        proxy, score = (within(x, at.group_B) for x in (at.proxy_B, at.score_B))
        deviation = float(np.abs(proxy - score).max())
        spread = float(score @ score)
        factor = float(score @ proxy / spread) if spread > 1e-12 else None
        after = None if factor is None else float(np.abs(proxy - factor * score).max())
    errors = (None, None, None) if everything is None else gradient_errors(envs, everything)
    return Preservation(
        *declared(envs), deviation, factor, after, float(np.abs(paid.proxy_B).max()), *errors
    )


def declared(envs: TokenVectorEnv) -> tuple[bool | None, bool | None]:
    """Return what the terms declare of the return and of the gradient. One term that breaks the
    gradient breaks it; the return of a sum is declared by one term alone."""
    terms = [term for name, term in envs.reward_terms.items() if name != KL]
    gradients = [term.preserves_gradient for term in terms]
    gradient = False if False in gradients else (None if None in gradients or not terms else True)
    return terms[0].preserves_return if len(terms) == 1 else None, gradient


def gradient_errors(
    envs: TokenVectorEnv, everything: Paid
) -> tuple[float | None, float | None, float | None]:
    """Return the relative error of reward-to-go's gradient against that of the expected return and
    of the expected score, and its cosine with that of gold; by the logits of a table with a row for
    each history, at the reference."""
    followed = _gradient(envs, everything, to_go(everything.token_BT))

    def of(values_B: np.ndarray | None) -> np.ndarray | None:
        if values_B is None:
            return None
        whole = np.broadcast_to(values_B[:, None], everything.token_BT.shape)
        return _gradient(envs, everything, whole)

    own, score, gold = map(of, (everything.proxy_B, everything.score_B, everything.gold_B))
    return _error(followed, own), _error(followed, score), _cosine(followed, gold)


def to_go(token_BT: np.ndarray) -> np.ndarray:
    """Return the sum (B, T) of each token's reward and of those after it."""
    return token_BT[:, ::-1].cumsum(1)[:, ::-1]


def _gradient(envs: TokenVectorEnv, everything: Paid, credit_BT: np.ndarray) -> np.ndarray:
    """Return E[sum_t credit_t grad log pi(y_t | history)] by the logits (H, V)."""
    history_BT, token_BT, mask_BT = _histories(envs, everything)
    count, width = int(history_BT.max()) + 1, envs.token_spec.vocab_size
    prob_B = np.exp(everything.log_ref_B) / len(np.unique(everything.group_B))
    place = (history_BT * width + token_BT)[mask_BT]

    def table(values_BT: np.ndarray) -> np.ndarray:
        each = (prob_B[:, None] * values_BT)[mask_BT]
        return np.bincount(place, each, count * width).reshape(count, width)

    credit, visits = table(credit_BT), table(np.ones_like(credit_BT))
    pi = visits / np.maximum(visits.sum(1, keepdims=True), 1e-300)
    return credit - pi * credit.sum(1, keepdims=True)


def _histories(envs: TokenVectorEnv, everything: Paid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of the history before each token, the tokens, and which there are, (B, T)
    each."""
    size = everything.token_BT.shape
    token_BT = np.zeros(size, dtype=np.int64)
    for row, text in enumerate(everything.texts):
        token_BT[row, : len(text.tokens)] = text.tokens
    mask_BT = np.arange(size[1]) < everything.length_B[:, None]
    history_BT = np.zeros(size, dtype=np.int64)
    now, first = everything.group_B, 0
    for t in range(size[1]):
        # Numbers are given anew in each column, so that they stay small.
        names = np.unique(now, return_inverse=True)[1]
        history_BT[:, t] = first + names
        first += int(names.max()) + 1
        now = names * envs.token_spec.vocab_size + token_BT[:, t]
    return history_BT, token_BT, mask_BT


def _error(found: np.ndarray, exact: np.ndarray | None) -> float | None:
    if exact is None or np.linalg.norm(exact) < 1e-12:
        return None
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _cosine(one: np.ndarray, other: np.ndarray | None) -> float | None:
    if other is None or min(np.linalg.norm(one), np.linalg.norm(other)) < 1e-12:
        return None
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))
