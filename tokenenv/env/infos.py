"""Gymnasium's vector info layout: every `key` beside a mask `_key` of the rows that have it, zeros
elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Values = Tensor | np.ndarray | dict[str, Tensor]
"""Of all rows; an array is on the host, and not the env's own."""
Export = Callable[[Any], Any]
"""Makes the caller's kind of array of a tensor or of a host array."""


class Infos:
    """Info values, each with the rows that have it (N,) bool on the host."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Values, np.ndarray]] = {}

    def add(self, key: str, values: Values, rows: np.ndarray) -> None:
        """Sets `key` for `rows`; a dict of values becomes a nested info with masks of its own."""
        self._entries[key] = (values, rows)

    def overlay(self, other: "Infos") -> None:
        """Takes `other`'s values in the rows that it has; they win over those already here."""
        for key, (values, rows) in other._entries.items():
            if key in self._entries:
                old, old_rows = self._entries[key]
                values, rows = _where(rows, values, old), rows | old_rows
            self._entries[key] = (values, rows)

    def only(self, rows: np.ndarray) -> "Infos":
        """Copies of the values in `rows` alone."""
        part = Infos()
        for key, (values, has) in self._entries.items():
            if (has & rows).any():
                part._entries[key] = (_copy(values), has & rows)
        return part

    def to_dict(self, export: Export) -> dict[str, Any]:
        """The layout that Gymnasium's own vectorisation builds. As there, a key that no row has is
        absent."""
        out: dict[str, Any] = {}
        for key, (values, rows) in self._entries.items():
            if not rows.any():
                continue
            if isinstance(values, dict):
                part = Infos()
                part._entries = {name: (value, rows) for name, value in values.items()}
                out[key] = part.to_dict(export)
            else:
                out[key] = export(values if rows.all() else _where(rows, values, _zeros(values)))
            out[f"_{key}"] = export(rows.copy())
        return out


def _copy(values: Values) -> Values:
    if isinstance(values, dict):
        return {name: value.clone() for name, value in values.items()}
    return values.clone() if isinstance(values, Tensor) else values.copy()


def _where(rows: np.ndarray, chosen: Any, other: Any) -> Any:
    """`chosen` in `rows`, elsewhere `other`."""
    rows = rows.reshape(-1, *[1] * (chosen.ndim - 1))
    if isinstance(chosen, Tensor):
        return torch.where(
            torch.from_numpy(rows).to(chosen.device, non_blocking=True), chosen, other
        )
    return np.where(rows, chosen, other)


def _zeros(values: Any) -> Any:
    return torch.zeros_like(values) if isinstance(values, Tensor) else np.zeros_like(values)
