"""The optimizers that an agent can train with, by name."""

from collections.abc import Iterable

import torch
from torch import nn

from tokenenv.errors import missing

FUSED = ("cpu", "cuda")
"""Devices on which torch has AdamW as one kernel; the numbers are those of its plain form, to
rounding."""


def make_optimizer(name: str, weights: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return AdamW without weight decay: torch's, or for "adamw8bit" the one of bitsandbytes, whose
    moments take two bytes a weight in place of eight.

    Raises:
        MissingDependency: "adamw8bit", and bitsandbytes is not installed.
    """
    weights = list(weights)
    device = weights[0].device.type
    if name == "adamw":
        return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=device in FUSED)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise missing("optimizer='adamw8bit'", "bitsandbytes") from error
    return AdamW8bit(weights, lr=lr, weight_decay=0.0)
