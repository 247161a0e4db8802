"""How an audit says a number, and a finding."""

import math
from dataclasses import dataclass

from tokenenv.audit.texts import Estimate


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence on one finding."""

    about: str
    warns: bool
    """Whether it is a reason not to train on the reward as it is."""
    sentence: str


def said(estimate: Estimate | float | None, unit: str = "") -> str:
    """Return a number with its error, the error to two figures and the number to as many places;
    "-" where it is not known."""
    if estimate is None:
        return "-"
    value, error = estimate if isinstance(estimate, Estimate) else (estimate, 0.0)
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error <= 0:
        return f"{value:z.3f}{unit}"
    places = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:z.{places}f} ± {error:.{places}f}{unit}"
