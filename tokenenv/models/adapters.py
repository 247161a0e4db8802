"""Adapters that peft has put into a model, and weights that two models have in common. peft itself
is not imported here."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from tokenenv.errors import InvalidArgument, ModelError

FROZEN = ("base_layer.", "original_module.")
"""The beginnings of names under which a layer of peft's keeps the weights that it adapts."""


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a peft model. Any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_layers(model: Any) -> list[Any]:
    """Return peft's layers inside a model; none where the model is no PyTorch module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if getattr(module, "adapter_layer_names", ())]


def active_adapters(model: Any) -> list[str]:
    """Return the names of the adapters that a model's forward goes through, sorted."""
    layers = [layer for layer in adapter_layers(model) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters})


def train_adapters(model: Any) -> None:
    """Make a model's active adapters trainable and freeze everything else.

    Raises:
        InvalidArgument: the adapter of a layer is switched off or merged, so that training would
            change nothing.
    """
    model.requires_grad_(False)
    for layer in adapter_layers(model):
        if layer.disable_adapters or getattr(layer, "merged", False):
            raise InvalidArgument(
                f"the adapter of {type(unwrapped(model)).__name__} is switched off or merged, so "
                "that training would not change the model; switch it on, or give the policy "
                "model.merge_and_unload()."
            )
        layer.set_adapter(list(layer.active_adapters))


def shared_weight(model: nn.Module, other: Any) -> str | None:
    """Return the name in `model` of a trainable weight that `other` reads too; None if there is
    none."""
    if not isinstance(other, nn.Module):
        return None
    known = {_place(weight) for weight in other.parameters()}
    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return next((name for name, weight in trained if _place(weight) in known), None)


def check_adapters_apart(models: Mapping[str, Any]) -> None:
    """Raise `ModelError` where two different models, given by role, go through the same adapter.

    peft puts adapters into the very model that it is given. An adapter around an env's reference,
    for example, changes the reference.
    """
    weights = {role: _adapter_weights(model) for role, model in models.items()}
    for (one, mine), (other, theirs) in combinations(weights.items(), 2):
        if models[one] is not models[other] and mine & theirs:
            raise ModelError(
                f"the {one} and the {other} are built around one model, and peft has put an "
                "adapter into it that changes both; give one of them a model of its own "
                "(copy.deepcopy before get_peft_model), or merge the adapter"
            )


def _adapter_weights(model: Any) -> set[int]:
    return {
        _place(weight)
        for layer in adapter_layers(model)
        for name, weight in layer.named_parameters()
        if not name.startswith(FROZEN)
    }


def _place(weight: Tensor) -> int:
    """Return where a weight lies in memory. Two parameter objects may be views of one tensor, so
    their identity does not tell; a weight without memory has identity alone."""
    return weight.data_ptr() or id(weight)
