"""Adapters of peft's inside a model, and weights that two models have in common. peft itself is not
imported here."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from tokenenv.errors import InvalidArgument, ModelError

FROZEN = ("base_layer.", "original_module.")
"""Where a layer of peft's keeps the weights that it adapts."""


def unwrapped(model: Any) -> Any:
    """The transformers model that a peft model was put around; any other model is returned as it
    is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_layers(model: Any) -> list[Any]:
    """The layers of peft's inside a model; none of a model that is no PyTorch module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if getattr(module, "adapter_layer_names", ())]


def active_adapters(model: Any) -> list[str]:
    """The names of the adapters that a model's forward goes through."""
    return sorted(
        {
            name
            for layer in adapter_layers(model)
            if not layer.disable_adapters
            for name in layer.active_adapters
        }
    )


def train_adapters(model: Any) -> None:
    """Freezes a model but for its active adapters, which become trainable.

    Raises:
        InvalidArgument: a layer's adapter is switched off, or merged, and would be trained in vain.
    """
    model.requires_grad_(False)
    for layer in adapter_layers(model):
        if layer.disable_adapters or getattr(layer, "merged", False):
            raise InvalidArgument(
                f"the adapter of {type(unwrapped(model)).__name__} is switched off or merged, so "
                f"that training would not "
                "change the model; switch it on, or give the policy model.merge_and_unload()."
            )
        layer.set_adapter(list(layer.active_adapters))


def shared_weight(model: nn.Module, other: Any) -> str | None:
    """The name in `model` of a trainable weight that `other` reads too; None if there is none."""
    known = (
        {_place(weight) for weight in other.parameters()} if isinstance(other, nn.Module) else set()
    )
    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return next((name for name, weight in trained if _place(weight) in known), None)


def check_adapters_apart(models: Mapping[str, Any]) -> None:
    """Raises `ModelError` where two different models, by role, go through the same adapter.

    peft puts adapters into the very model that it is given: around an env's reference, say, they
    change the reference.
    """
    weights = {role: _adapter_weights(model) for role, model in models.items()}
    for (one, mine), (other, theirs) in combinations(weights.items(), 2):
        if models[one] is not models[other] and mine & theirs:
            raise ModelError(
                f"the {one} and the {other} are built around one model, and peft has put an "
                f"adapter into it that changes both; "
                "give one of them a model of its own (copy.deepcopy before get_peft_model), or "
                "merge the adapter"
            )


def _adapter_weights(model: Any) -> set[int]:
    return {
        _place(weight)
        for layer in adapter_layers(model)
        for name, weight in layer.named_parameters()
        if not name.startswith(FROZEN)
    }


def _place(weight: Tensor) -> int:
    """Where a weight lies in memory: two parameter objects may be views of one tensor."""
    return weight.data_ptr() or id(weight)
