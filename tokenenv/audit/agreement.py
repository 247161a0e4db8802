"""How well the proxy tells gold: in whole texts, along a text, and near its maximum."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from tokenenv.audit.statistics import auc, bootstrapped, spearman, within
from tokenenv.audit.texts import Estimate, Paid

SHARES = (0.25, 0.5, 0.75, 1.0)
"""The places in a text at which the running sum is read."""
NEAR = 0.05
"""A text is near the maximum within this share of the range."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the proxy says of gold among the reference's texts. A number is None without gold."""

    spearman: Estimate | None
    """Spearman's correlation of proxy and gold."""
    spearman_within: Estimate | None
    """The same within prompts: each less its prompt's mean."""
    measure: str
    """Of `by_position`: "AUC" where gold has two values, else "Spearman"."""
    by_position: dict[str, Estimate]
    """How well the sum of the rewards so far tells gold at each share of the text."""
    saturated: float
    """The share of texts within 5% of the range of the proxy's maximum."""


def agreement(paid: Paid, seed: int) -> Agreement:
    """Return it, with errors over prompts (over texts where there is one prompt)."""
    proxy_B, group_B = paid.proxy_B, paid.group_B
    near = proxy_B.max() - NEAR * np.ptp(proxy_B)
    saturated = float((proxy_B >= near).mean())
    if paid.gold_B is None:
        return Agreement(None, None, "", {}, saturated)
    gold_B = paid.gold_B
    values = np.unique(gold_B)
    measure = "AUC" if len(values) == 2 else "Spearman"
    inside = within(proxy_B, group_B), within(gold_B, group_B)

    def told(sums_B: np.ndarray, rows: np.ndarray) -> float:
        if measure == "AUC":
            return auc(sums_B[rows], gold_B[rows] == values[1])
        return spearman(sums_B[rows], gold_B[rows])

    found = {}
    for share in SHARES:
        sums_B = running_sum(paid, share)
        found[f"{share:.0%}"] = bootstrapped(partial(told, sums_B), group_B, seed)
    return Agreement(
        bootstrapped(lambda rows: spearman(proxy_B[rows], gold_B[rows]), group_B, seed),
        bootstrapped(lambda rows: spearman(*(x[rows] for x in inside)), group_B, seed),
        measure,
        found,
        saturated,
    )


def running_sum(paid: Paid, share: float) -> np.ndarray:
    """Return the sum (B,) of the rewards of the first `share` of each text's tokens, rounded up."""
    sums = paid.token_BT.cumsum(1)
    last = np.ceil(share * paid.length_B).astype(int).clip(min=1) - 1
    return sums[np.arange(len(sums)), last]
