"""Wrappers around a vector env of texts that make its action space smaller."""

from tokenenv.wrappers.action_spaces import ActionMask, TopKActions

__all__ = ["ActionMask", "TopKActions"]
