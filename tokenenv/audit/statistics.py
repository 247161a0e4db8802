"""Figures of texts and their errors.

Shapes: B texts, C clusters (the prompts; where there is one prompt alone, the texts), R resamples.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tokenenv.audit.texts import Estimate

RESAMPLES = 100
"""R, of a bootstrap."""


def clusters(group_B: np.ndarray) -> np.ndarray:
    """Return the number (B,) of the cluster that each text is drawn in: its prompt's, or its own
    where there is one prompt alone."""
    return group_B if group_B.max(initial=0) > 0 else np.arange(len(group_B))


def ratio(above_B: np.ndarray, below_B: np.ndarray, group_B: np.ndarray) -> Estimate:
    """Return sum(above) / sum(below) and its standard error, by linearisation over clusters; NaN
    where the divisor is 0."""
    cluster_B = clusters(group_B)
    above, below = (np.bincount(cluster_B, values) for values in (above_B, below_B))
    count, total = len(above), below.sum()
    if total == 0:
        return Estimate(float("nan"), float("nan"))
    value = above.sum() / total
    squares = np.square(above - value * below).sum() * count / max(count - 1, 1)
    error = np.sqrt(squares) / total if count > 1 else float("nan")
    return Estimate(float(value), float(error))


def mean(values_B: np.ndarray, group_B: np.ndarray) -> Estimate:
    """Return the mean and its standard error over clusters."""
    return ratio(values_B, np.ones(len(values_B)), group_B)


def within(values_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """Return each value less the mean of its prompt."""
    return values_B - (np.bincount(group_B, values_B) / np.bincount(group_B))[group_B]


def slope(y_B: np.ndarray, x_B: np.ndarray, group_B: np.ndarray) -> Estimate:
    """Return the least-squares slope of y on x within prompts; NaN where x does not vary."""
    x_B, y_B = within(x_B.astype(float), group_B), within(y_B, group_B)
    return ratio(x_B * y_B, x_B * x_B, group_B)


def ranks(values_B: np.ndarray, weight_B: np.ndarray | None = None) -> np.ndarray:
    """Return the weighted ranks (B,), 0 to 1: the share of weight below, and half of that which is
    equal."""
    weight_B = np.ones(len(values_B)) if weight_B is None else weight_B
    _, place_B = np.unique(values_B, return_inverse=True)
    weights = np.bincount(place_B, weight_B)
    return ((weights.cumsum() - weights / 2) / weights.sum())[place_B]


def correlation(x_B: np.ndarray, y_B: np.ndarray, weight_B: np.ndarray) -> float:
    """Return the weighted correlation; NaN where one of them does not vary."""
    weight_B = weight_B / weight_B.sum()
    x_B, y_B = (values - weight_B @ values for values in (x_B, y_B))
    spread = (weight_B @ x_B**2) * (weight_B @ y_B**2)
    # What rounding leaves of equal ranks is no spread.
    return float(weight_B @ (x_B * y_B) / np.sqrt(spread)) if spread > 1e-24 else float("nan")


def spearman(x_B: np.ndarray, y_B: np.ndarray, weight_B: np.ndarray | None = None) -> float:
    """Return Spearman's correlation, weighted."""
    weight_B = np.ones(len(x_B)) if weight_B is None else weight_B
    return correlation(ranks(x_B, weight_B), ranks(y_B, weight_B), weight_B)


def auc(x_B: np.ndarray, good_B: np.ndarray) -> float:
    """Return the probability that a good text has a larger x than another one, ties counting half;
    NaN where there is but one kind."""
    good, bad = int(good_B.sum()), int((~good_B).sum())
    if not good or not bad:
        return float("nan")
    ranks_B = ranks(x_B) * len(x_B) + 0.5
    return float((ranks_B[good_B].sum() - good * (good + 1) / 2) / (good * bad))


def resamples(group_B: np.ndarray, seed: int, count: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yield rows of texts: as many clusters as there are, drawn with replacement."""
    rng, cluster_B = np.random.default_rng([seed, 1]), clusters(group_B)
    order, sizes = np.argsort(cluster_B, kind="stable"), np.bincount(cluster_B)
    members = np.split(order, sizes.cumsum()[:-1])
    for _ in range(count):
        drawn = rng.integers(len(sizes), size=len(sizes))
        alone = len(sizes) == len(cluster_B)
        yield order[drawn] if alone else np.concatenate([members[i] for i in drawn])


def bootstrapped(
    statistic: Callable[[np.ndarray], float], group_B: np.ndarray, seed: int
) -> Estimate:
    """Return a statistic of rows of texts, with its standard error over clusters by bootstrap."""
    values = [statistic(rows) for rows in resamples(group_B, seed)]
    known = [value for value in values if np.isfinite(value)]
    error = float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")
    return Estimate(statistic(np.arange(len(group_B))), error)
