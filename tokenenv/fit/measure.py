"""What a reward model is worth on examples that it was not trained on: NumPy on what was read.

Suffixes: B texts, K own tokens of all texts one after another, P pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.fit import losses
from tokenenv.fit.examples import Batch
from tokenenv.fit.objectives import Objective

BINS = 10
"""Of probabilities, in which they are compared with how often they came true."""
LOG_PRIOR = math.log((1 - losses.REPLACED_SHARE) / losses.REPLACED_SHARE)
"""What `losses.replaced_tokens` adds to a reward, for the log-odds of its label."""
CLEARLY = 3.0
"""Standard errors above zero from which on a mean reward counts as positive."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a model says of the texts of some examples, and what the data says, in float64."""

    total_B: np.ndarray
    length_B: np.ndarray
    example_B: np.ndarray
    end_B: np.ndarray
    """The value of the whole text: the sum of rewards, and of the prompt's value where it has
    one."""
    score_B: np.ndarray | None
    """The score that `end_B` is trained towards."""
    reward_K: np.ndarray
    value_K: np.ndarray
    """The value of the text after each token."""
    target_K: np.ndarray | None

    @property
    def known_K(self) -> np.ndarray:
        """Where the data has a target."""
        assert self.target_K is not None
        return ~np.isnan(self.target_K)


def seen(batches: Sequence[Batch]) -> Seen:
    """Put what was read of several batches together."""
    firsts = np.cumsum([0, *(batch.num_examples for batch in batches)])
    examples = [b.example_B + int(first) for b, first in zip(batches, firsts, strict=False)]
    masks = [batch.mask_BR for batch in batches]

    def tokens(columns: Sequence[Tensor]) -> np.ndarray:
        return _joined([c[mask] for c, mask in zip(columns, masks, strict=True)])

    targets = [batch.target_BR for batch in batches if batch.target_BR is not None]
    scores = [batch.score_B for batch in batches if batch.score_B is not None]
    return Seen(
        total_B=_joined([batch.total_B for batch in batches]),
        length_B=_joined([batch.length_B for batch in batches]),
        example_B=_joined(examples),
        end_B=_joined([batch.start_B + batch.total_B for batch in batches]),
        score_B=_joined(scores) if scores else None,
        reward_K=tokens([batch.reward_BR for batch in batches]),
        value_K=tokens([batch.running_BR for batch in batches]),
        target_K=tokens(targets) if targets else None,
    )


def _joined(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().cpu().double().numpy() for tensor in tensors])


# --------------------------------------------------------------------------------- what is measured


def measured(
    what: Seen, compared: Seen, objective: Objective, scale: float = 1.0, factor: float = 1.0
) -> dict[str, float]:
    """Return all measures that the data allows.

    Args:
        what: of the examples that the loss sees.
        compared: of the examples as they were read, before labels were made of them.
        objective: says what the numbers mean.
        scale: the unit of the scores or targets, in that of the data's.
        factor: what the saved model's rewards are, of those in `what`.
    """
    found = {name: value * factor for name, value in of_rewards(what).items()}
    found |= {"length_correlation": correlation(what.total_B, what.length_B)}
    found |= of_pairs(compared, objective)
    if objective.kind == "scores":
        found |= of_scores(what, objective, scale)
    if what.target_K is not None and what.known_K.any():
        found |= of_targets(what, objective, scale)
    return found


def of_rewards(what: Seen) -> dict[str, float]:
    """Return the mean reward of a token and its standard error."""
    mean, error = mean_reward(what.total_B, what.length_B)
    return {"reward_per_token": mean, "reward_per_token_error": error}


def of_pairs(what: Seen, objective: Objective) -> dict[str, float]:
    """Return how well the texts of an example are told apart, pair by pair; nothing where there are
    no pairs.

    "accuracy" is that of the sum of rewards, which RL adds up, "own_accuracy" that of the mean,
    where the loss compares means. "calibration_error" is that of the probability that the loss
    makes of the difference.
    """
    better_P, worse_P = pairs(what.example_B, what.score_B)
    if not len(better_P):
        return {}
    found = {"accuracy": accuracy(what.total_B[better_P] - what.total_B[worse_P])}
    own_B = what.total_B / what.length_B if objective.divides else what.total_B
    own_P = own_B[better_P] - own_B[worse_P]
    if objective.divides:
        found["own_accuracy"] = accuracy(own_P)
    if objective.kind == "ranking" and objective.labels_from is None:
        found["calibration_error"] = pair_calibration_error(own_P)
    return found


def of_scores(what: Seen, objective: Objective, scale: float = 1.0) -> dict[str, float]:
    """Return how well the value of whole texts foretells their scores: the calibration error of
    outcomes; else the correlation and the root of the mean squared error, times `scale`."""
    assert what.score_B is not None
    if objective.outcomes:
        return {"calibration_error": calibration_error(sigmoid(what.end_B), what.score_B)}
    return _errors("score", what.end_B, what.score_B, scale)


def of_targets(what: Seen, objective: Objective, scale: float = 1.0) -> dict[str, float]:
    """Return how well labels, values or shares of tokens are foretold."""
    assert what.target_K is not None
    known, target = what.known_K, what.target_K[what.known_K]
    if objective.loss in (losses.token_labels, losses.replaced_tokens):
        prior = LOG_PRIOR if objective.loss is losses.replaced_tokens else 0.0
        says, decided = sigmoid(what.reward_K[known] + prior), target != 0.5
        right = (says > 0.5) == (target > 0.5)
        return {
            "label_accuracy": float(np.mean(right[decided])) if decided.any() else math.nan,
            "calibration_error": calibration_error(says, target),
        }
    if objective.loss is losses.shares:
        return _errors("share", what.reward_K[known], target, scale)
    return _errors("value", what.value_K[known], target, scale)


def _errors(name: str, said: np.ndarray, true: np.ndarray, scale: float = 1.0) -> dict[str, float]:
    return {
        f"{name}_correlation": correlation(said, true),
        f"{name}_error": scale * math.sqrt(float(np.mean((said - true) ** 2))),
    }


# -------------------------------------------------------------------------------- the figures alone


def pairs(example_B: np.ndarray, score_B: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts of all pairs within an example, the better ones and the worse ones, (P,)
    each. The better one has the higher score; where there are no scores it comes first. The texts
    of an example stand together."""
    _, starts, counts = np.unique(example_B, return_index=True, return_counts=True)
    places = [
        start + np.stack(np.triu_indices(count, k=1))
        for start, count in zip(starts, counts, strict=True)
    ]
    first_P, second_P = np.concatenate(places, axis=1)
    if score_B is None:
        return first_P, second_P
    difference_P = score_B[first_P] - score_B[second_P]
    better_P = np.where(difference_P > 0, first_P, second_P)
    worse_P = np.where(difference_P > 0, second_P, first_P)
    return better_P[difference_P != 0], worse_P[difference_P != 0]


def accuracy(difference_P: np.ndarray) -> float:
    """Return the share of differences, the better less the worse, above 0. A tie counts half."""
    return float(np.mean((difference_P > 0) + 0.5 * (difference_P == 0)))


def pair_calibration_error(difference_P: np.ndarray) -> float:
    """Return the expected calibration error of sigmoid(difference), where the better text of every
    pair is known. Each pair counts in both directions, because which comes first means nothing."""
    probability = sigmoid(np.concatenate([difference_P, -difference_P]))
    came_true = np.repeat([1.0, 0.0], len(difference_P))
    return calibration_error(probability, came_true)


def calibration_error(probability: np.ndarray, came_true: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error (Naeini et al. 2015): the mean over all cases of
    |mean probability - mean outcome| of the case's bin, of `bins` equal ones between 0 and 1."""
    number = np.minimum((probability * bins).astype(int), bins - 1)
    gap = np.bincount(number, probability - came_true, minlength=bins)
    return float(np.abs(gap).sum() / len(probability))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation; NaN where one of both is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan


def spearman(
    reward_rows: Sequence[np.ndarray], advantage_rows: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Return Spearman's rank correlation of token rewards with the exact advantages of the tokens.

    Args:
        reward_rows: for each text the rewards of its tokens.
        advantage_rows: of the same shapes; NaN where the advantage is not known.

    Returns:
        That of all tokens together, and the mean of that of each text, over the texts in which both
        vary: NaN where there is none.
    """
    rows = []
    for reward, advantage in zip(reward_rows, advantage_rows, strict=True):
        reward, advantage = (np.asarray(row, dtype=np.float64) for row in (reward, advantage))
        if reward.shape != advantage.shape:
            raise InvalidArgument(
                f"a text has {reward.size} rewards and {advantage.size} advantages; allowed: one "
                "of both for each token."
            )
        known = ~np.isnan(advantage)
        rows.append((reward[known], advantage[known]))
    if not rows:
        return math.nan, math.nan
    each = [correlation(ranks(r), ranks(a)) for r, a in rows if len(r)]
    varied = [rho for rho in each if not math.isnan(rho)]
    reward, advantage = (np.concatenate(column) for column in zip(*rows, strict=True))
    if not len(reward):
        return math.nan, math.nan
    within = float(np.mean(varied)) if varied else math.nan
    return correlation(ranks(reward), ranks(advantage)), within


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, from 0; equal values share the mean of their ranks."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[number]


def mean_reward(total_B: np.ndarray, length_B: np.ndarray) -> tuple[float, float]:
    """Return the mean reward of a token and its standard error, with texts as the sample: that of a
    ratio of two means (Cochran 1977, section 2.11). The error is NaN for one text."""
    mean = float(total_B.sum() / length_B.sum())
    left = total_B - mean * length_B
    if len(left) < 2:
        return mean, math.nan
    spread = math.sqrt(float(left @ left) * len(left) / (len(left) - 1))
    return mean, spread / float(length_B.sum())


def is_clearly_positive(measures: dict[str, float]) -> bool:
    """Return whether the mean reward of a token is above 0 by more than `CLEARLY` standard
    errors."""
    return measures["reward_per_token"] > CLEARLY * measures["reward_per_token_error"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))
