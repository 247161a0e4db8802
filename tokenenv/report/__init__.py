"""One page of what a bench has found, with every figure as a file beside it."""

from tokenenv.report.writing import write_report

__all__ = ["write_report"]
