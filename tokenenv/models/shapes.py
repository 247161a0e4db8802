"""Models without weights, to plan memory with: shapes alone, on torch's device "meta"."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_ON: ContextVar[bool] = ContextVar("shapes only", default=False)
ATTENTION = "tokenenv_shapes"
"""The name under which transformers knows an attention that computes shapes."""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Have `load_causal_lm` and `load_classifier` read configs alone, and make models on the device
    "meta", whatever the device that is asked for.

    Everything that is built of them has the right sizes and takes no memory. What a model is tried
    out for is taken to be right, since there are no numbers to look at.
    """
    token = _ON.set(True)
    try:
        yield
    finally:
        _ON.reset(token)


def wanted() -> bool:
    """Return whether this is within `shapes_only`."""
    return _ON.get()


def made_of(auto: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Return the model that an auto class of transformers makes of a config, frozen and in eval
    mode, on the device "meta"."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, attn_implementation=ATTENTION, **options)
    return model.eval().requires_grad_(False)


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention: it keeps what it reads, what it gives, and a number for each
    query. torch's own attention would hold every weight (L, L) on this device."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:3], value.shape[3])
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


# The attention masks of a forward without a cache follow from the positions, which are no numbers
# here. transformers makes none for an attention that it knows no masks of.
def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None
