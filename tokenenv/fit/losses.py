"""The losses of objectives: pure functions of a `Batch` that return one number for each example,
(E,) float32. The number depends on the example alone: on no other example, and on no padding.

In the formulas r_t is the reward of token t of T, R = sum_t r_t the total of a text, V_t the value
of the text after token t, V_0 that of the prompt, and s the score of the text.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Batch

SHARE_WEIGHT = 5.0
"""The weight of the error of each share in `values`, relative to that of the running sum."""
REPLACED_SHARE = 0.15
"""The share of own tokens that `tokenenv.fit.corrupted` replaces, ELECTRA's."""


# ----------------------------------------------------------------------------------------- rankings


def bradley_terry(batch: Batch) -> Tensor:
    """Return -log sigmoid(R_better - R_worse) of the sums R of token rewards, (E,): the mean over
    all pairs of an example's texts (Bradley and Terry 1952).

    On log-ratios, R = coef (log pi - log pi_ref) of the whole text, this is the loss of DPO
    (Rafailov et al. 2023, arXiv 2305.18290).

    A sum grows with the length, and so does what it can say: where the better texts of the data are
    the longer ones, length itself is learned as good. The card has the
    correlation of sums with lengths.
    """
    return pairwise(batch, batch.total_B)


def bradley_terry_mean(batch: Batch) -> Tensor:
    """Return `bradley_terry` of the means of token rewards, R / T, (E,) (Q-RM, Chen et al. 2025,
    arXiv 2505.23363, without its margin).

    A mean does not grow with the length, but RL adds rewards up, and would be paid for length where
    the mean is positive. So the rewards of the model that is saved are divided by a fixed length,
    the mean one of the training texts (`Objective.divides`). That takes the size of the rewards
    back to that of a mean; what a longer text earns by its length alone is still T times the mean
    reward, and `tokenenv audit` prices it.
    """
    return pairwise(batch, batch.total_B / batch.length_B.clamp(min=1))


def pairwise(batch: Batch, value_B: Tensor) -> Tensor:
    """Return -log sigmoid of the differences of `value_B`, the better less the worse: the mean over
    all pairs of each example, (E,); 0 for an example of one text."""
    i, j = same_example(batch).triu(diagonal=1).nonzero(as_tuple=True)
    return mean_by(batch.example_B[i], -F.logsigmoid(value_B[i] - value_B[j]), batch.num_examples)


def list_mle(batch: Batch) -> Tensor:
    """Return -log p of the ranking of each example's texts, (E,), under Plackett and Luce's model:

        sum_k [log sum_{j >= k} exp(R_j) - R_k],

    in which the best text is chosen from all of them, the next one from those left, and so on
    (ListMLE, Xia et al. 2008; on token rewards Yang et al. 2023, arXiv 2306.00398). Of a pair it is
    `bradley_terry`. A tie has no place in it: texts with one score stand in the order of the data.
    """
    total_B, left = batch.total_B, same_example(batch).triu()
    chosen = total_B.expand(len(total_B), -1).masked_fill(~left, -torch.inf).logsumexp(1) - total_B
    return chosen.new_zeros(batch.num_examples).index_add(0, batch.example_B, chosen)


# ------------------------------------------------------------------------------------------- scores


def score_at_end(batch: Batch) -> Tensor:
    """Return (R - s)^2, the mean over each example's texts, (E,): the regression of reward models,
    on the sum of token rewards.

    On log-ratios and scores less V*(prompt) it is the loss of A*-PO (Brantley et al. 2025, arXiv
    2505.20686): at the optimum of score - coef KL, coef log pi*/pi_ref of a whole text is
    s - V*(prompt). Scores keep their unit there, because coef is in it.
    """
    return batch.per_example((batch.total_B - scores(batch)).square())


def score_everywhere(batch: Batch) -> Tensor:
    """Return mean_t (r_1 + ... + r_t - s)^2 over the policy's own tokens, and over each example's
    texts, (E,).

    The best running sum is E[s | the text so far] of the policy that wrote the texts, so that r_t
    is that policy's advantage: the score is learned at every position, as token-level verifiers do
    (Cobbe et al. 2021, arXiv 2110.14168).
    """
    error = batch.running_BR - batch.start_B[:, None] - scores(batch)[:, None]
    return batch.per_example(_row_mean(error.square(), batch.mask_BR))


def score_values(batch: Batch) -> Tensor:
    """Return the mean of (V_t - s)^2 over t = 0 and the policy's own tokens, and over each
    example's texts, (E,): RUDDER's return predictor (Arjona-Medina et al. 2019, arXiv 1806.07857).

    The best V_t is E[s | the text so far]. It is `score_everywhere` with one more place, the
    prompt, whose value the reward of the first token is the difference to.
    """
    error = torch.cat([batch.start_B[:, None], batch.running_BR], 1) - scores(batch)[:, None]
    return batch.per_example(_row_mean(error.square(), F.pad(batch.mask_BR, (1, 0), value=True)))


def outcome(batch: Batch) -> Tensor:
    """Return the cross-entropy of sigmoid(R) with the outcome s, 0 to 1, the mean over each
    example's texts, (E,).

    On log-ratios it trains the implicit process reward model (Yuan et al. 2024, arXiv 2412.01981;
    PRIME, Cui et al. 2025, arXiv 2502.01456): R = coef log pi/pi_ref, of whose tokens each is paid
    its own log-ratio.
    """
    loss_B = F.binary_cross_entropy_with_logits(batch.total_B, scores(batch), reduction="none")
    return batch.per_example(loss_B)


def log_mean_exp(scores: Sequence[float] | np.ndarray, beta: float) -> float:
    """Return V* = beta log mean exp(score / beta), from the scores of texts that the reference
    wrote to one prompt (A*-PO, arXiv 2505.20686).

    It goes from the largest score (beta -> 0) to the mean (beta -> inf). With few texts it is too
    low where beta is small: the best texts are not among them.

    Raises:
        InvalidArgument: beta is negative or not finite.
    """
    if not 0.0 <= beta < np.inf:
        raise InvalidArgument(f"beta={beta} is not allowed; it must be 0 or more, and finite.")
    scores = np.asarray(scores, dtype=np.float64)
    best = scores.max()
    if beta == 0:
        return float(best)
    # log(1 + x) of the small numbers that a large beta gives keeps their digits.
    return float(best + beta * np.log1p(np.expm1((scores - best) / beta).mean()))


# -------------------------------------------------------------------------------- labels and values


def token_labels(batch: Batch) -> Tensor:
    """Return the cross-entropy of sigmoid(r_t) with the label of token t, 0 to 1: the mean over the
    labelled own tokens of each example, (E,); 0 where it has none.

    The reward of a token is then the log-odds of its label: 0 where it is uncertain.
    """
    known, label = known_targets(batch)
    loss = F.binary_cross_entropy_with_logits(batch.reward_BR, label, reduction="none")
    return _example_mean(batch, loss, known)


def replaced_tokens(batch: Batch) -> Tensor:
    """Return the cross-entropy of sigmoid(r_t + log((1 - q) / q)) with the label of token t, which
    is 1 where the text's author wrote it and 0 where the reference did, with the share q =
    `REPLACED_SHARE` of the latter: as a mean like `token_labels`, (E,).

    The best r_t is log pi_author/pi_ref of the token, as far as the text before it tells (noise-
    contrastive estimation, Gutmann and Hyvarinen 2010). Without the constant every token would be
    paid 1.7 for being one. A reference that writes as the author does leaves nothing to learn: the
    reward says what the author prefers, and says nothing of a score on the reference's own texts.
    """
    prior = math.log((1 - REPLACED_SHARE) / REPLACED_SHARE)
    return token_labels(replace(batch, reward_BR=batch.reward_BR + prior))


def shares(batch: Batch) -> Tensor:
    """Return (r_t - target_t)^2, the mean over the own tokens of each example that have a target,
    (E,); 0 where it has none. Targets are the rewards that a teacher's redistribution gives."""
    known, target = known_targets(batch)
    return _example_mean(batch, (batch.reward_BR - target).square(), known)


def values(batch: Batch) -> Tensor:
    """Return (r_1 + ... + r_t - V_t)^2 + 5 (r_t - (V_t - V_{t-1}))^2 with the value V_t of the
    data, each a mean over the own tokens of an example where it is known, (E,).

    The running sum alone would let an error at one token be repaired at the next. The value of the
    prompt counts as 0: the first token is paid V_1.
    """
    known, value = known_targets(batch)
    before = F.pad(value, (1, 0))[:, :-1]
    # Of a token behind one whose value is not known, no share is known.
    both = known & F.pad(known, (1, 0), value=True)[:, :-1]
    running = _example_mean(batch, (batch.running_BR - value).square(), known)
    share = _example_mean(batch, (batch.reward_BR - (value - before)).square(), both)
    return running + SHARE_WEIGHT * share


def value_labels(batch: Batch) -> Tensor:
    """Return the mean of (V_t - target_t)^2 over the own tokens of each example that have a target,
    and over the prompts, (E,); 0 where it has none.

    Targets may be the mean scores of continuations (Math-Shepherd, Wang et al. 2024, arXiv
    2312.08935), or V*. The prompt, which has none, is fitted to the first target of its texts: its
    best value is then the mean of those, as the value of the policy that wrote them is.
    """
    known, target = known_targets(batch)
    first = known.int().argmax(1, keepdim=True)
    start = (batch.start_B[:, None] - target.gather(1, first)).square()
    error = torch.cat([start, (batch.running_BR - target).square()], 1)
    return _example_mean(batch, error, torch.cat([known.any(1, keepdim=True), known], 1))


# ------------------------------------------------------------------------------------------ helpers


def scores(batch: Batch) -> Tensor:
    """Return the score of each text, (B,)."""
    assert batch.score_B is not None
    return batch.score_B


def known_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mask of own tokens that have a target, and the targets, 0 where there is none, (B,
    R) each."""
    assert batch.target_BR is not None
    known = batch.mask_BR & ~batch.target_BR.isnan()
    # Masked before anything is computed: the gradient of what NaN has touched is NaN.
    return known, batch.target_BR.masked_fill(~known, 0.0)


def same_example(batch: Batch) -> Tensor:
    """Return which texts are of one example, (B, B) bool."""
    return batch.example_B[:, None] == batch.example_B[None, :]


def mean_by(example: Tensor, values: Tensor, num_examples: int) -> Tensor:
    """Return the mean of the `values` (K,) of each example, whose numbers are `example` (K,), as
    (E,); 0 where it has none."""
    zeros = values.new_zeros(num_examples)
    count = zeros.index_add(0, example, torch.ones_like(values))
    return zeros.index_add(0, example, values) / count.clamp(min=1)


def _row_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `error` (B, R) where `mask`, of each text, (B,)."""
    return error.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _example_mean(batch: Batch, error: Tensor, known: Tensor) -> Tensor:
    """Return the mean of `error` (B, R) where `known`, over all texts of each example, (E,)."""
    example = batch.example_B[:, None].expand_as(error)
    return mean_by(example[known], error[known], batch.num_examples)
