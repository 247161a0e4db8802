"""Gymnasium's vector info layout: every `key` beside a mask `_key` of the rows that have it, zeros elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Values = Tensor | dict[str, Tensor]


class Infos:
    """Info values on the device, each with the rows that have it (N,) bool on the host."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Values, np.ndarray]] = {}

    def add(self, key: str, values: Values, rows: np.ndarray) -> None:
        """Sets `key` for `rows`; a dict of values becomes a nested info with masks of its own."""
        self._entries[key] = (values, rows)

    def overlay(self, other: "Infos", upload: Callable[[np.ndarray], Tensor]) -> None:
        """Takes `other`'s values in the rows that it has; they win over those already here."""
        for key, (values, rows) in other._entries.items():
            if key in self._entries:
                old, old_rows = self._entries[key]
                assert isinstance(values, Tensor)
                assert isinstance(old, Tensor)
                values, rows = torch.where(_broadcast(upload(rows), values), values, old), rows | old_rows
            self._entries[key] = (values, rows)

    def only(self, rows: np.ndarray) -> "Infos":
        """The same values in `rows` alone."""
        part = Infos()
        part._entries = {key: (values, has & rows) for key, (values, has) in self._entries.items() if (has & rows).any()}
        return part

    def to_dict(self, upload: Callable[[np.ndarray], Tensor], export: Callable[[Tensor], Any]) -> dict[str, Any]:
        """The layout that Gymnasium's own vectorisation builds; `export` makes the caller's kind of array.

        As there, a key that no row has is absent.
        """
        out: dict[str, Any] = {}
        for key, (values, rows) in self._entries.items():
            if not rows.any():
                continue
            mask = upload(rows)
            if isinstance(values, dict):
                part = Infos()
                part._entries = {name: (value, rows) for name, value in values.items()}
                out[key] = part.to_dict(upload, export)
            else:
                out[key] = export(torch.where(_broadcast(mask, values), values, torch.zeros_like(values)))
            out[f"_{key}"] = export(mask.clone())
        return out


def _broadcast(mask: Tensor, values: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (values.dim() - 1))
