"""What is measured: numbers made by hand, and other ways to the same numbers."""

import math

import numpy as np
import pytest
import torch

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Batch
from tokenenv.fit.measure import (
    accuracy,
    calibration_error,
    correlation,
    is_clearly_positive,
    mean_reward,
    measured,
    pair_calibration_error,
    pairs,
    ranks,
    seen,
    sigmoid,
    spearman,
)
from tokenenv.fit.objectives import OBJECTIVES

NAN = math.nan


def batch(rewards, examples, scores=None, targets=None, start=None):
    """A batch of rows of rewards; a token with None is not the policy's own."""
    width = max(map(len, rewards))
    mask = torch.tensor(
        [[r is not None for r in row] + [False] * (width - len(row)) for row in rewards]
    )
    filled = [[r or 0.0 for r in row] + [0.0] * (width - len(row)) for row in rewards]
    reward, start = torch.tensor(filled), torch.tensor(start or [0.0] * len(rewards))
    target = targets and torch.tensor([row + [NAN] * (width - len(row)) for row in targets])
    return Batch(
        reward_BR=reward,
        running_BR=start[:, None] + reward.cumsum(1),
        start_B=start,
        mask_BR=mask,
        example_B=torch.tensor(examples),
        score_B=scores and torch.tensor(scores),
        target_BR=target,
    )


def test_ranks_of_ties_are_the_mean_of_their_places():
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 3.0, 0.0])), [3, 1, 3, 3, 0])


def test_spearman_by_the_formula_of_squared_rank_differences():
    """Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1))."""
    rng = np.random.default_rng(0)
    x, y = rng.permutation(9).astype(float), rng.permutation(9).astype(float)
    expected = 1 - 6 * ((x - y) ** 2).sum() / (9 * 80)
    assert spearman([x], [y])[0] == pytest.approx(expected)
    assert spearman([np.exp(x)], [y**3])[0] == pytest.approx(expected)  # ranks alone count


def test_spearman_of_all_tokens_and_of_each_text():
    """In both texts the order is right, but the second one has higher rewards for lower
    advantages; tokens whose advantage is not known, and texts without variation, do not count."""
    rewards = [np.array([1.0, 2.0, 99.0]), np.array([11.0, 12.0]), np.array([5.0, 5.0])]
    advantages = [np.array([3.0, 4.0, NAN]), np.array([1.0, 2.0]), np.array([NAN, NAN])]
    together, within = spearman(rewards, advantages)
    assert within == pytest.approx(1.0)
    assert together == pytest.approx(-0.6)  # 1 - 6 * (4 * 2^2) / (4 * 15)
    assert all(map(math.isnan, spearman([], [])))
    assert all(map(math.isnan, spearman([np.ones(2)], [np.array([NAN, NAN])])))
    with pytest.raises(InvalidArgument, match="2 rewards and 3 advantages"):
        spearman([np.ones(2)], [np.ones(3)])


def test_pairs_are_within_examples_and_ties_are_none():
    example = np.array([0, 0, 0, 1, 1])
    better, worse = pairs(example, None)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 2),
        (3, 4),
    ]
    better, worse = pairs(example, np.array([1.0, 3.0, 1.0, 5.0, 5.0]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 0), (1, 2)]
    assert len(pairs(np.array([0, 1]), None)[0]) == 0


def test_accuracy_counts_a_tie_half():
    assert accuracy(np.array([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)


def test_calibration_error_by_hand():
    """Bins [0, 0.1) and [0.9, 1]: |0.05 - 0.5| of two cases, and |0.95 - 1| of one."""
    error = calibration_error(np.array([0.04, 0.06, 0.95]), np.array([0.0, 1.0, 1.0]))
    assert error == pytest.approx((2 * 0.45 + 0.05) / 3)
    assert calibration_error(np.array([1.0]), np.array([1.0])) == 0  # the last bin is closed


def test_pairs_that_are_told_apart_as_often_as_said_are_calibrated():
    """Of ten pairs with probability 0.9 one goes the other way."""
    margin = math.log(9)
    assert pair_calibration_error(np.array([margin] * 9 + [-margin])) == pytest.approx(0, abs=1e-9)
    sure = pair_calibration_error(np.array([margin] * 10))
    assert sure == pytest.approx(0.1)


def test_the_error_of_the_mean_reward_is_its_spread_over_resampled_texts():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 20, 400).astype(float)
    total = 0.3 * length + rng.normal(size=400) * np.sqrt(length)
    mean, error = mean_reward(total, length)
    assert mean == pytest.approx(total.sum() / length.sum())
    picks = rng.integers(0, 400, (4000, 400))
    resampled = total[picks].sum(1) / length[picks].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.05)
    assert math.isnan(mean_reward(np.ones(1), np.ones(1))[1])


@pytest.mark.parametrize(
    ("mean", "error", "clear"), [(1, 0.3, True), (1, 0.4, False), (-1, 0.1, False), (1, NAN, False)]
)
def test_a_mean_is_clearly_positive_beyond_three_errors(mean, error, clear):
    measures = {"reward_per_token": mean, "reward_per_token_error": error}
    assert is_clearly_positive(measures) == clear


def test_correlation_of_a_constant_is_not_known():
    assert math.isnan(correlation(np.ones(3), np.arange(3.0)))
    x, y = np.random.default_rng(0).normal(size=(2, 7))
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        np.testing.assert_allclose(sigmoid(np.array([-1e4, 0.0, math.log(3)])), [0, 0.5, 0.75])


# ----------------------------------------------------------------------------------- of an objective


def all_of(name, *batches, **scaling):
    what = seen(batches)
    return measured(what, what, OBJECTIVES[name], **scaling)


PAIRS = (
    batch([[3.0, 3.0, None], [2.5], [1.0], [None, 2.0]], [0, 0, 1, 1]),
    batch([[1.0], [0.0, 0.0]], [0, 0]),
)
"""By the sum 6 > 2.5, 1 < 2, 1 > 0; by the mean 3 > 2.5, 1 < 2, 1 > 0."""


def test_pairs_by_the_sum_and_by_what_the_loss_compares():
    sums, means = all_of("bt-sum", *PAIRS), all_of("bt-mean", *PAIRS, factor=0.5)
    assert sums["accuracy"] == means["accuracy"] == means["own_accuracy"] == pytest.approx(2 / 3)
    assert "own_accuracy" not in sums
    assert sums["calibration_error"] == pair_calibration_error(np.array([3.5, -1.0, 1.0]))
    assert means["calibration_error"] == pair_calibration_error(np.array([0.5, -1.0, 1.0]))
    assert sums["reward_per_token"] == pytest.approx(12.5 / 8)
    assert means["reward_per_token"] == pytest.approx(12.5 / 16)
    assert sums["length_correlation"] == pytest.approx(
        np.corrcoef([6, 2.5, 1, 2, 1, 0], [2, 1, 1, 1, 1, 2])[0, 1]
    )


def test_the_sum_and_the_mean_may_disagree():
    longer = batch([[1.0, 1.0], [1.5]], [0, 0])
    found = all_of("bt-mean", longer)
    assert (found["accuracy"], found["own_accuracy"]) == (1.0, 0.0)


def test_scores_are_foretold_by_the_value_of_the_text_in_the_units_of_the_data():
    """Values 1 + 2 and 0 - 1 where the scores are 3.5 and -1.25, times a scale of 4."""
    found = all_of(
        "score-value", batch([[2.0], [-1.0]], [0, 1], [3.5, -1.25], start=[1.0, 0.0]), scale=4.0
    )
    assert found["score_error"] == pytest.approx(4 * math.sqrt((0.5**2 + 0.25**2) / 2))
    assert found["score_correlation"] == pytest.approx(1.0)
    assert "accuracy" not in found  # one text each: nothing to compare


def test_outcomes_are_calibrated():
    found = all_of("outcome", batch([[math.log(3)]] * 4, [0, 1, 2, 3], [1.0, 1.0, 1.0, 0.0]))
    assert found["calibration_error"] == pytest.approx(0, abs=1e-6)


def test_labels_values_and_shares_where_they_are_known():
    targets = [[1.0, NAN, 0.0], [NAN, 1.0]]
    rewards = [[2.0, 9.0, -3.0], [None, -1.0]]
    labels = all_of("labels", batch(rewards, [0, 1], targets=targets))
    assert labels["label_accuracy"] == pytest.approx(2 / 3)
    known = sigmoid(np.array([2.0, -3.0, -1.0]))
    assert labels["calibration_error"] == pytest.approx(
        calibration_error(known, np.array([1.0, 0.0, 1.0]))
    )
    replaced = all_of("corrupted", batch(rewards, [0, 1], targets=targets))
    known = sigmoid(np.array([2.0, -3.0, -1.0]) + math.log(0.85 / 0.15))
    error = calibration_error(known, np.array([1.0, 0.0, 1.0]))
    assert replaced["calibration_error"] == pytest.approx(error)
    assert replaced["label_accuracy"] == 1.0
    undecided = all_of("edits", batch([[2.0, 1.0]], [0], targets=[[1.0, 0.5]]))
    assert undecided["label_accuracy"] == 1.0
    values = all_of("values", batch(rewards, [0, 1], targets=targets))
    assert values["value_error"] == pytest.approx(math.sqrt((1 + 8**2 + 2**2) / 3))
    shares = all_of("share-delta", batch(rewards, [0, 1], targets=targets))
    assert shares["share_error"] == pytest.approx(math.sqrt((1 + 3**2 + 2**2) / 3))
