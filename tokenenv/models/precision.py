"""The dtype of a model's weights."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def convert(model: Any, dtype: torch.dtype) -> Any:
    """Give a model's weights a dtype, in place, as if it had been loaded with it, and return the
    model."""
    for tensor in _saved(model):
        tensor.data = tensor.data.to(dtype)
    return model


def converted_copy(model: Any, dtype: torch.dtype, memo: dict[int, Any]) -> Any:
    """Return a copy of a frozen model with weights of this dtype; the model itself where it has no
    others.

    Args:
        model: a transformers model or one of peft's.
        dtype: of the copy's weights.
        memo: what has been copied before, for `copy.deepcopy`: models that have modules or weights
            in common have them in common as copies, too.
    """
    weights = list(_saved(model))
    if all(weight.dtype == dtype for weight in weights):
        return model
    for weight in weights:
        if id(weight) not in memo:
            halved = weight.data.to(dtype)
            is_parameter = isinstance(weight, nn.Parameter)
            memo[id(weight)] = nn.Parameter(halved, False) if is_parameter else halved
    return copy.deepcopy(model, memo)


def _saved(model: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors that a file of the model holds. What else there is, such as
    the frequencies of RoPE, keeps its precision, as it does where a model is loaded."""
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.dtype in (
            torch.float64,
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            yield tensor
