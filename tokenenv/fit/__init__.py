"""Token-level reward models, trained from what people have: preferences, scores, labels, texts."""

from tokenenv.fit.config import FitConfig
from tokenenv.fit.loop import Fitted, fit

__all__ = ["FitConfig", "Fitted", "fit"]
