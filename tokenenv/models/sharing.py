"""Frozen models that were loaded apart and hold the same numbers: one memory, and one forward."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .adapters import BASE_LAYER, adapter_layers, unwrapped
from .cached_lm import trunk_of

OF_THE_HEAD = {
    "_name_or_path",
    "architectures",
    "classifier_dropout",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
}
"""Entries of a config that a trunk without its head computes nothing from."""


def share_equal(model: Any, other: Any) -> None:
    """Have a frozen model read the weights of another one wherever both have the same numbers under
    the same name.

    Where the trunks are the same altogether, they become one module, which runs once for both.

    Args:
        model: a transformers model or one of peft's that nobody else holds; what is shared is
            replaced in it.
        other: another frozen model; it is left as it is. A `TokenModel` shares nothing.
    """
    if not hasattr(other, "named_parameters") or hasattr(other, "slots"):
        return
    mine, theirs = unwrapped(model), unwrapped(other)
    known = {_name(name): weight for name, weight in theirs.named_parameters()}
    for name, weight in list(mine.named_parameters(remove_duplicate=False)):
        same = known.get(_name(name))
        if same is not None and _equal(weight, same):
            module, _, own_name = name.rpartition(".")
            setattr(mine.get_submodule(module), own_name, same)
    if mine is model and _are_one(trunk_of(mine), trunk_of(theirs)):
        setattr(mine, mine.base_model_prefix, trunk_of(theirs))


def _are_one(one: Any, other: Any) -> bool:
    """Whether two trunks can become one module, after equal weights have become the same."""
    if one is other or adapter_layers(one) or adapter_layers(other):
        return False
    return same_function(one, other)


def same_function(one: Any, other: Any) -> bool:
    """Return whether two trunks without adapters compute the same now."""
    if type(one) is not type(other):
        return False
    settings = [
        {name: value for name, value in trunk.config.to_dict().items() if name not in OF_THE_HEAD}
        for trunk in (one, other)
    ]
    attention = [trunk.config._attn_implementation for trunk in (one, other)]
    return (
        settings[0] == settings[1]
        and attention[0] == attention[1]
        and _all_equal(one.named_parameters(), other.named_parameters())
        and _all_equal(one.named_buffers(), other.named_buffers())
    )


def _all_equal(one: Iterable[tuple[str, Tensor]], other: Iterable[tuple[str, Tensor]]) -> bool:
    mine, theirs = dict(one), dict(other)
    return mine.keys() == theirs.keys() and all(_equal(mine[n], theirs[n]) for n in mine)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same form."""
    if one is other:
        return True
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and not one.is_meta and torch.equal(one, other)


def _name(name: str) -> str:
    """A weight's name without what peft puts into it."""
    return name.replace(BASE_LAYER, "")
