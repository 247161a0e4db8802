"""What optimising the proxy gives: the optimum of proxy - beta KL along beta, and the best of n.

For each prompt, the optimum is pi(y) = pi_ref(y) exp(R(y) / beta) / Z (Rafailov et al. 2023, arXiv
2305.18290). The best of n texts has E[f] = sum_i f(y_(i)) [F_n(i) - F_n(i - 1)], with F_n(i) = C(i,
n) / C(N, n) over the N texts in the order of their proxy, and its KL is at most log n - (n - 1) / n
(Beirami et al. 2024, arXiv 2401.01879).

Shapes: B texts, P prompts, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from tokenenv.agents.run.evaluate import best_of_n_kl
from tokenenv.audit.statistics import RESAMPLES, spearman
from tokenenv.audit.texts import Estimate, Paid

STEPS = 24
"""The most points of a curve."""
LEAST = 32.0
"""The least number of texts, or effective number under importance weights, behind a point..."""
LEAST_OF_A_PROMPT = 4.0
"""...and the least effective number of a prompt's, on average: fewer give a biased point."""


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on the way that optimising the proxy takes."""

    kl: float
    """KL(pi || pi_ref) of a text, in nats; for the best of n its bound."""
    proxy: Estimate
    gold: Estimate
    beta: float | None = None
    """Reward per nat; infinite for the reference, None for the best of n."""
    n: int | None = None
    ess: float | None = None
    """The effective number of texts behind the point; None where it is exact."""
    spearman: float | None = None
    """Spearman's correlation of proxy and gold over the texts of this policy; None: not known."""
    proxy_R: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    """The proxy in each resample; empty where it is exact."""
    gold_R: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)


class Family(Protocol):
    """The optima of proxy - beta KL, by beta."""

    exact: bool

    def at(self, beta: float) -> Point:
        """Return the optimum at a beta above 0; infinity is the reference."""
        ...


def curve(family: Family, spread: float, beta: float) -> list[Point]:
    """Return the optima along beta, by their KL, and that at the env's own `beta`.

    beta begins at four deviations of the proxy (`spread`) and falls by the square root of 2, as
    long as the KL grows and enough texts bear the point.
    """
    points = [family.at(math.inf)]
    if spread <= 1e-9:
        return points
    for step in range(STEPS):
        point = family.at(4 * spread * 2 ** (-step / 2))
        settled = point.kl < 1.002 * points[-1].kl
        if not _borne(point) or (settled and len(points) > 4):
            break
        points.append(point)
    own = family.at(beta) if beta > 0 else None
    points += [own] if own is not None and _borne(own) else []
    return sorted(points, key=lambda point: point.kl)


def _borne(point: Point) -> bool:
    return point.ess is None or point.ess >= LEAST


class Weighted:
    """The optima of a set of texts: all there are, with their probabilities, or a sample of the
    reference, by self-normalised importance weights within each prompt.

    Args:
        paid: B texts.
        exact: whether these are all texts of each prompt.
        seed: of the resamples.
    """

    def __init__(self, paid: Paid, *, exact: bool, seed: int = 0) -> None:
        self.exact, self.proxy_B = exact, paid.proxy_B
        # Rewards are float32: what is left of those that cancel out is no difference.
        self.rounding = 1e-5 * float(np.abs(paid.token_BT).max(initial=0.0))
        self.gold_B = np.full(len(paid.texts), np.nan) if paid.gold_B is None else paid.gold_B
        self.group_B, share_B = paid.group_B, paid.share_B
        self.base_B = np.exp(paid.log_ref_B) if exact else share_B
        rows = np.bincount(self.group_B).astype(float)
        self.share_P = np.full(len(rows), 1 / len(rows)) if exact else rows / rows.sum()
        self.prompts = np.split(
            np.argsort(self.group_B, kind="stable"), rows.astype(int).cumsum()[:-1]
        )
        self.rng = np.random.default_rng([seed, 2])
        self.drawn_RP = None
        if not exact and len(rows) > 1:
            drawn = self.rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
            self.drawn_RP = drawn * self.share_P / (drawn * self.share_P).sum(1, keepdims=True)

    @property
    def spread(self) -> float:
        """The standard deviation of the proxy within prompts; 0 where it is no more than
        rounding."""
        weight_B = self.base_B * self.share_P[self.group_B]
        middle = np.bincount(self.group_B, self.base_B * self.proxy_B) / np.bincount(
            self.group_B, self.base_B
        )
        squares = np.square(self.proxy_B - middle[self.group_B])
        spread = float(np.sqrt(weight_B @ squares / weight_B.sum()))
        return spread if spread > self.rounding else 0.0

    def at(self, beta: float) -> Point:
        """Return the optimum at this beta."""
        weight_B = np.zeros(len(self.proxy_B))
        found = []
        for rows in self.prompts:
            tilt = self.proxy_B[rows] / beta
            moments, weight_B[rows] = _tilted(
                self.base_B[rows], tilt, self.proxy_B[rows], self.gold_B[rows]
            )
            found.append(moments)
        values = np.array(found)
        point = self._combined(values, beta=beta)
        both = weight_B * self.share_P[self.group_B]
        known = None
        if np.isfinite(self.gold_B).all():
            known = spearman(self.proxy_B, self.gold_B, both)
        ess = float(values[:, 3].sum())
        if values[:, 3].mean() < LEAST_OF_A_PROMPT:
            ess = 0.0
        return replace(point, ess=None if self.exact else ess, spearman=known)

    def best_of(self, n: int) -> Point:
        """Return the best of n texts of each prompt by the proxy, ties at random: the expectation
        over all subsets of n of the sample."""
        found = [_best(self.proxy_B[rows], self.gold_B[rows], n) for rows in self.prompts]
        return self._combined(np.array(found), n=n)

    def _combined(
        self, values_PM: np.ndarray, beta: float | None = None, n: int | None = None
    ) -> Point:
        """Return the mean over prompts, with its error."""
        kl, proxy, gold = (self.share_P @ values_PM)[:3]
        if self.exact:
            return Point(kl, Estimate(proxy, 0.0), Estimate(gold, 0.0), beta)
        replicas_RM = (
            self._replicas(beta, n) if self.drawn_RP is None else self.drawn_RP @ values_PM
        )
        errors = replicas_RM.std(0, ddof=1)
        return Point(
            best_of_n_kl(n) if n else float(kl),
            Estimate(float(proxy), float(errors[1])),
            Estimate(float(gold), float(errors[2])),
            beta,
            n,
            proxy_R=replicas_RM[:, 1],
            gold_R=replicas_RM[:, 2],
        )

    def _replicas(self, beta: float | None, n: int | None) -> np.ndarray:
        """Return the figures of a single prompt's texts, drawn anew with replacement."""
        rng, count = np.random.default_rng(7), len(self.proxy_B)
        out = []
        for _ in range(RESAMPLES):
            rows = rng.integers(count, size=count)
            proxy, gold = self.proxy_B[rows], self.gold_B[rows]
            if n is not None:
                out.append(_best(proxy, gold, n))
                continue
            assert beta is not None
            out.append(_tilted(np.full(count, 1 / count), proxy / beta, proxy, gold)[0][:3])
        return np.array(out)


def _tilted(
    base: np.ndarray, tilt: np.ndarray, proxy: np.ndarray, gold: np.ndarray
) -> tuple[tuple[float, float, float, float], np.ndarray]:
    """Return KL, proxy, gold and effective number of base exp(tilt) / Z, and its weights."""
    shifted = tilt - tilt.max()
    weights = base * np.exp(shifted)
    total = weights.sum()
    weights = weights / total
    kl = weights @ shifted - math.log(total / base.sum())
    ess = 1.0 / np.square(weights).sum()
    return (max(float(kl), 0.0), float(weights @ proxy), float(weights @ gold), float(ess)), weights


def _best(proxy: np.ndarray, gold: np.ndarray, n: int) -> tuple[float, float, float]:
    """Return KL's bound, proxy and gold of the best of n."""
    weights = best_of_n_weights(proxy, n)
    return best_of_n_kl(n), float(weights @ proxy), float(weights @ gold)


def best_of_n_weights(proxy: np.ndarray, n: int) -> np.ndarray:
    """Return the probability (N,) that each of N texts is the best of n that are drawn without
    replacement; of equal ones each is as likely."""
    _, place, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    upto = counts.cumsum().astype(float)
    at_most = np.ones(len(upto))
    for j in range(n):
        at_most *= np.maximum(upto - j, 0.0) / (len(proxy) - j)
    return (np.diff(at_most, prepend=0.0) / counts)[place]


def best_of_n_curve(family: Weighted) -> list[Point]:
    """Return the best of 1, 2, 4, ... as far as the texts bear it."""
    fewest = min(map(len, family.prompts))
    most = min(fewest, len(family.proxy_B) / LEAST)
    return [family.best_of(2**k) for k in range(int(math.log2(most)) + 1)] if most >= 1 else []


class Turn(NamedTuple):
    """Where gold turns down while the proxy goes on."""

    peak: Point
    last: Point
    loss: Estimate
    """Gold at the peak less gold at the end."""


def turn_down(points: Sequence[Point]) -> Turn | None:
    """Return where gold is highest, if it falls after it by more than three errors while the proxy
    rises; None if it does not."""
    known = [point for point in points if np.isfinite(point.gold.value)]
    if len(known) < 3:
        return None
    peak, last = max(known, key=lambda point: point.gold.value), known[-1]
    loss = peak.gold.value - last.gold.value
    error = float((peak.gold_R - last.gold_R).std(ddof=1)) if len(last.gold_R) else 0.0
    scale = max(abs(peak.gold.value - known[0].gold.value), 1e-9)
    fell = loss > 3 * error and loss > 0.05 * scale and last.proxy.value > peak.proxy.value
    return Turn(peak, last, Estimate(loss, error)) if fell else None
