"""The statistics of few seeds, against SciPy's values and by hand."""

import numpy as np
import pytest

from tokenenv.bench.statistics import bootstrap, improvement, iqm, iqm_difference, iqm_of, wins

X = np.array([0.31, 0.92, 0.55, 0.74, 0.12, 0.88, 0.67, 0.49, 0.95, 0.03])
Y = np.array([0.4, 0.7, 0.2, 0.55, 0.1])


def test_the_interquartile_mean():
    # scipy.stats.trim_mean(x, 0.25) of SciPy 1.17.1
    assert iqm(X) == pytest.approx(0.6066666666666666)
    assert iqm(X[:7]) == pytest.approx(0.63)
    assert iqm(X[:3]) == pytest.approx(0.5933333333333334)
    assert iqm(np.stack([X, X + 1])) == pytest.approx([iqm(X), iqm(X) + 1])
    assert iqm_of([X[:4], X[4:]]) == iqm(X)


def test_the_probability_of_improvement():
    # scipy.stats.mannwhitneyu(x, y).statistic / (10 * 5)
    assert wins(X, Y) == pytest.approx(0.67)
    assert wins(X, Y) + wins(Y, X) == pytest.approx(1.0)
    assert wins(np.array([1.0, 2.0]), np.array([1.0])) == 0.75
    assert improvement([X, Y + 1], [Y, Y]) == pytest.approx((0.67 + 1.0) / 2)


def test_intervals_are_those_of_scipy():
    # scipy.stats.bootstrap, method="percentile", 200,000 resamples. The tolerances are three
    # standard errors of a percentile of 2,000.
    found = bootstrap(iqm_of, [X])
    assert found.value == iqm(X)
    assert found.low == pytest.approx(0.325, abs=0.03)
    assert found.high == pytest.approx(0.82, abs=0.03)
    found = bootstrap(iqm_difference, [X], [Y])
    assert found.low == pytest.approx(-0.15833, abs=0.03)
    assert found.high == pytest.approx(0.54667, abs=0.03)


def test_resamples_are_drawn_within_strata():
    def spread(*strata):
        found = bootstrap(lambda drawn: np.mean([np.mean(one, -1) for one in drawn], 0), strata)
        return found.high - found.low

    # Environments that differ are no uncertainty: runs of one are exchanged among themselves.
    assert spread(np.zeros(5), np.ones(5)) == 0.0
    assert spread(np.array([0.0, 1.0] * 5)) > 0.4


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(lambda drawn: drawn[0].mean(-1), [values])
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert bootstrap(iqm_of, [values], seed=3) == bootstrap(iqm_of, [values], seed=3)
