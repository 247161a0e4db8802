"""What optimising a reward does, before anyone trains on it."""

from tokenenv.audit.report import Audit
from tokenenv.audit.run import audit

__all__ = ["Audit", "audit"]
