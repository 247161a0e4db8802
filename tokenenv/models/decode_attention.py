"""Attention of one new token in each slot, which reads the keys and values of a slot once.

Suffixes: N slots, H heads, S heads that have keys and values, L keys, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

NAME = "tokenenv_decode"
"""The name under which transformers' models find `attention`."""
HALF = (torch.bfloat16, torch.float16)
SPECIAL = ("softcap", "position_bias", "s_aux")
"""Options by which some models change what attention computes; sdpa takes or refuses them."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what attention gives, (N, 1, H, D), for queries (N, H, 1, D), keys and values
    (N, S, L, D) and an additive mask (N, 1, 1, L).

    Heads that share keys are rows of one matrix product, so that keys and values are read where
    they lie, once. The kernels that sdpa chooses under a mask are made for many queries. Everything
    else, such as a prefill, is left to sdpa.
    """
    plain = not any(options.get(name) is not None for name in SPECIAL)
    if query.shape[2] > 1 or attention_mask is None or not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    slots, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    # Under autocast the cache may be float32.
    key, value = key.to(query.dtype), value.to(query.dtype)
    grouped_NSGD = query.reshape(slots, key.shape[1], -1, size)
    scores_NSGL = _scores(grouped_NSGD, key).mul_(scaling).add_(attention_mask)
    probs_NSGL = scores_NSGL.softmax(-1).to(value.dtype)
    return torch.matmul(probs_NSGL, value).reshape(slots, 1, heads, size), None


def _scores(query_NSGD: Tensor, key_NSLD: Tensor) -> Tensor:
    """Return the products (N, S, G, L) float32; half precision would round the large ones most."""
    if query_NSGD.is_cuda and query_NSGD.dtype in HALF:
        flat = query_NSGD.flatten(0, 1), key_NSLD.flatten(0, 1).transpose(-1, -2)
        return torch.bmm(*flat, out_dtype=torch.float32).unflatten(0, query_NSGD.shape[:2])
    query, key = query_NSGD.float(), key_NSLD.float()
    # A CPU is a little faster with the long matrix first, if the other one is a single row.
    if query.is_cpu and query.shape[2] == 1:
        return torch.matmul(key, query.transpose(-1, -2)).transpose(-1, -2)
    return torch.matmul(query, key.transpose(-1, -2))


AttentionInterface.register(NAME, attention)
