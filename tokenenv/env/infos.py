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


Entries = dict[str, tuple[Values, np.ndarray]]
"""Info values by key, each with the rows that have it, (N,) bool on the host. A dict of values
becomes a nested info with masks of its own."""


class Infos:
    """The info values of all slots."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def overlay(self, other: "Infos") -> None:
        """Take `other`'s values in the rows that it has; they win over those already here."""
        for key, (values, rows) in other._entries.items():
            if key in self._entries:
                old, old_rows = self._entries[key]
                values, rows = _where(rows, values, old), rows | old_rows
            self._entries[key] = (values, rows)

    def only(self, rows: np.ndarray) -> "Infos":
        """Return copies of the values in `rows` alone."""
        return Infos(
            {
                key: (_copy(values), has & rows)
                for key, (values, has) in self._entries.items()
                if (has & rows).any()
            }
        )

    def to_dict(self, export: Export) -> dict[str, Any]:
        """Return the layout that Gymnasium's own vectorisation builds. As there, a key that no row
        has is absent."""
        out: dict[str, Any] = {}
        for key, (values, rows) in self._entries.items():
            everywhere = rows.all()
            if not everywhere and not rows.any():
                continue
            named = values if isinstance(values, dict) else {key: values}
            found: dict[str, Any] = {}
            for name, value in named.items():
                shown = value if everywhere else _where(rows, value, _zeros(value))
                found[name], found[f"_{name}"] = export(shown), export(rows.copy())
            if isinstance(values, dict):
                out[key], out[f"_{key}"] = found, export(rows.copy())
            else:
                out |= found
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
