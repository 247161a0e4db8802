"""Statistics of few seeds: the interquartile mean, bootstrap intervals, and the probability of
improvement (Agarwal et al. 2021, arXiv 2108.13264).

A stratum holds the runs of one environment: resampling draws as many runs from each as it has.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
Strata = Sequence[np.ndarray]
"""The values of each stratum, (n,) each. In a resample they are (RESAMPLES, n)."""


class Interval(NamedTuple):
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float


def iqm(values: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half along the last axis: a quarter of the values, rounded
    down, is left out at each end."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def iqm_of(strata: Strata) -> np.ndarray:
    """Return the interquartile mean of all values together."""
    return iqm(np.concatenate(strata, axis=-1))


def wins(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the share of pairs in which a value of `one` is the larger one, along the last axis;
    equal ones count half (the Mann-Whitney U statistic, divided by the number of pairs)."""
    difference = one[..., :, None] - other[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-1, -2))


def bootstrap(
    statistic: Callable[..., np.ndarray], *groups: Strata, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return a statistic with the percentiles of its values over resamples.

    Args:
        statistic: a function of the groups, each a list of strata, along their last axis.
        groups: of strata that are resampled independently.
        seed: of the resampling.
        level: the share of the resamples within the interval.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        [stratum[rng.integers(len(stratum), size=(RESAMPLES, len(stratum)))] for stratum in strata]
        for strata in groups
    ]
    low, high = np.quantile(statistic(*drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*groups)), float(low), float(high))


def improvement(one: Strata, other: Strata) -> np.ndarray:
    """Return the probability that a run of `one` is better than one of `other`: the mean over
    strata of `wins`."""
    return np.mean([wins(a, b) for a, b in zip(one, other, strict=True)], axis=0)


def iqm_difference(one: Strata, other: Strata) -> np.ndarray:
    """Return the interquartile mean of `one` less that of `other`."""
    return iqm_of(one) - iqm_of(other)
