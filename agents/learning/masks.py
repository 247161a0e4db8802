"""Action masks: which tokens an env allows (`obs["action_mask"]`, (N, V)), kept with the episode,
eight to a byte.

What was ruled out when a token was drawn is ruled out again when its log-probability is computed:
both are of the policy renormalised over the allowed tokens. Suffixes: N envs, K tokens, V
vocabulary, M = V / 8 rounded up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def allowed_of(obs: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """(N, V) bool on the device, or None where the env allows everything."""
    return (
        torch.as_tensor(obs["action_mask"], device=device).bool() if "action_mask" in obs else None
    )


def rule_out(logits_KV: Tensor, allowed_KV: Tensor | None) -> Tensor:
    """-inf for the tokens that are not allowed."""
    return logits_KV if allowed_KV is None else logits_KV.masked_fill(~allowed_KV, -torch.inf)


def pack(obs: Mapping[str, Any]) -> np.ndarray | None:
    """(N, M) uint8 on the host, or None where the env allows everything."""
    if "action_mask" not in obs:
        return None
    mask = obs["action_mask"]
    return np.packbits(
        (mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)).astype(bool), axis=1
    )


def unpack(bits_KM: Tensor, vocab_size: int) -> Tensor:
    """(K, V) bool from what `pack` gave."""
    shifts = torch.arange(7, -1, -1, device=bits_KM.device, dtype=torch.uint8)
    return (bits_KM[:, :, None] >> shifts & 1).flatten(1)[:, :vocab_size].bool()
