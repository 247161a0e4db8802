"""Action masks: which tokens an env allows (`obs["action_mask"]`, (N, V)), kept with the episode,
eight to a byte.

What was ruled out when a token was drawn is ruled out again when its log-prob is computed. Both are
of the policy renormalised over the allowed tokens; otherwise the ratio of the two would be wrong.

Suffixes: N envs, K tokens, V vocabulary, M = V / 8 rounded up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def allowed_of(obs: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """Return the allowed tokens, (N, V) bool on the device, or None where the env allows all."""
    if "action_mask" not in obs:
        return None
    return torch.as_tensor(obs["action_mask"], device=device).bool()


def rule_out(logits_KV: Tensor, allowed_KV: Tensor | None) -> Tensor:
    """Return the logits (K, V) with -inf for the tokens that are not allowed."""
    return logits_KV if allowed_KV is None else logits_KV.masked_fill(~allowed_KV, -torch.inf)


def pack(obs: Mapping[str, Any]) -> np.ndarray | None:
    """Return the allowed tokens packed, (N, M) uint8 on the host, or None where the env allows
    all."""
    if "action_mask" not in obs:
        return None
    mask = obs["action_mask"]
    if isinstance(mask, Tensor):
        mask = mask.cpu().numpy()
    return np.packbits(np.asarray(mask).astype(bool), axis=1)


def unpack(bits_KM: Tensor, vocab_size: int) -> Tensor:
    """Return (K, V) bool from what `pack` returned."""
    # NumPy packs the first token into a byte's highest bit.
    shifts = torch.arange(7, -1, -1, device=bits_KM.device, dtype=torch.uint8)
    return (bits_KM[:, :, None] >> shifts & 1).flatten(1)[:, :vocab_size].bool()
