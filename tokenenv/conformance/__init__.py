"""Whether a trainer's formulas are right: advantages, returns, KL terms and losses of any library,
held against exact gradients of worlds small enough to enumerate.

    from tokenenv.conformance import check_advantages

    report = check_advantages(lambda b: my_gae(b.penalised, b.values, b.mask, lam=b.lambda_))
    print(report)

docs/conformance.md says what the worlds are, and what was found in published code.
"""

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.checks import check_advantages, check_loss, check_returns
from tokenenv.conformance.kl import KLReport, check_kl
from tokenenv.conformance.report import Report
from tokenenv.conformance.worlds import World

__all__ = [
    "Batch",
    "KLReport",
    "Report",
    "World",
    "check_advantages",
    "check_kl",
    "check_loss",
    "check_returns",
]
