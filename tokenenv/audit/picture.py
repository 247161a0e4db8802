"""The picture of an audit: gold and proxy against KL, and the price of length beside it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenenv.audit.optimum import Point

if TYPE_CHECKING:
    from tokenenv.audit.report import Audit

PROXY, GOLD = "#c0504d", "#2f6f9f"


def picture(audit: "Audit") -> Any:
    """Return a matplotlib figure."""
    # pyplot would open windows and keep the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.3, 1])
    _along_kl(left, audit)
    _length(right, audit)
    return figure


def _along_kl(axes: Any, audit: "Audit") -> None:
    axes.set_xlabel("KL from the reference, nats a text")
    axes.set_ylabel("proxy", color=PROXY)
    axes.tick_params(axis="y", colors=PROXY)
    other = axes.twinx()
    other.set_ylabel("gold", color=GOLD)
    other.tick_params(axis="y", colors=GOLD)
    how = "exact" if audit.method != "sampling" else "estimated"
    for points, style, label in (
        (audit.optima, "-", f"optimum of proxy - beta KL ({how})"),
        (audit.best_of_n, ":", "best of n"),
    ):
        _line(axes, points, "proxy", PROXY, style)
        if audit.gold_spread is not None:
            _line(other, points, "gold", GOLD, style)
        axes.plot([], [], style, color="#555555", label=label)
    own = audit.own_optimum
    if own is not None:
        axes.axvline(own.kl, color="#999999", lw=0.8)
        axes.plot([], [], "-", color="#999999", lw=0.8, label=f"the env's beta, {own.beta:g}")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.set_title("what optimising the proxy gives", fontsize=10)
    axes.spines[["top"]].set_visible(False)
    other.spines[["top"]].set_visible(False)


def _line(axes: Any, points: Sequence[Point], name: str, colour: str, style: str) -> None:
    if not points:
        return
    kl = np.array([point.kl for point in points])
    value, error = np.array([getattr(point, name) for point in points]).T
    axes.plot(kl, value, style, color=colour, marker="o", ms=2.5)
    if np.nan_to_num(error).any():
        axes.fill_between(kl, value - error, value + error, color=colour, alpha=0.18, lw=0)


def _length(axes: Any, audit: "Audit") -> None:
    price = audit.price
    bars = [
        ("a token\n(mean)", price.per_token, PROXY),
        ("slope on\nlength", price.slope, PROXY),
        ("going on", price.going_on, PROXY),
        ("gold:\nslope", price.gold_slope, GOLD),
        ("gold:\ngoing on", price.gold_going_on, GOLD),
    ]
    known = [(name, *estimate, colour) for name, estimate, colour in bars if estimate is not None]
    known = [bar for bar in known if np.isfinite(bar[1])]
    for place, (_, value, error, colour) in enumerate(known):
        axes.bar(place, value, yerr=np.nan_to_num(error), color=colour, width=0.65, capsize=3)
    axes.set_xticks(range(len(known)), [bar[0] for bar in known], fontsize=8)
    axes.axhline(0, color="#555555", lw=0.8)
    axes.set_title("price of length, a token", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
