"""Adapters in a model, which peft puts there, and weights that two models have in common."""

import copy
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument, ModelError, missing

BASE_LAYER = "base_layer."
"""What peft puts before the name of a weight that it adapts."""
FROZEN = (BASE_LAYER, "original_module.")
"""The beginnings of names under which a layer of peft's keeps the weights that it adapts."""
BASE = "base_model.model."
"""What an adapter's file puts before the names of a model's modules."""


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a peft model. Any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_layers(model: Any) -> list[Any]:
    """Return peft's layers inside a model; none where the model is no PyTorch module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if getattr(module, "adapter_layer_names", ())]


def is_plain_lora(layer: Any) -> bool:
    """Return whether a layer of peft's adds low-rank products to a linear layer, and no more."""
    from peft.tuners.lora import Linear

    return type(layer) is Linear and not layer.lora_variant


def active_adapters(model: Any) -> list[str]:
    """Return the names of the adapters that a model's forward goes through, sorted."""
    layers = [layer for layer in adapter_layers(model) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters})


def beside(model: Any) -> Any:
    """Return a copy of a model to train adapters in. It shares the weights beneath them with the
    model, and has the model's own adapters, if there are any, as copies.

    Shared weights are in memory once, frozen for both. Buffers are copied. Where adapters cannot be
    trained on the weights as they are (`in_own_dtype`), nothing is shared.
    """
    if not in_own_dtype(model):
        return copy.deepcopy(model)
    adapters = _adapter_weights(model)
    return sharing(model, [one for one in model.parameters() if _place(one) not in adapters])


def sharing(model: Any, weights: Iterable[Tensor]) -> Any:
    """Return a copy of a model that has these weights of its in common with it."""
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def in_own_dtype(model: Any) -> bool:
    """Return whether adapters in float32 can be trained on a model's weights in the dtype that they
    have. Otherwise they must become float32."""
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    # Gradients that pass through float16 vanish unless the loss is scaled up, which is not done
    # here. A module that is trained as a whole (peft's `modules_to_save`) does not convert what it
    # reads, as an adapter does, so it has the dtype of its neighbours.
    whole = any(hasattr(layer, "original_module") for layer in adapter_layers(model))
    return torch.float16 not in dtypes and not (whole and dtypes != {torch.float32})


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """Freeze a model, and return a copy `beside` it with trainable float32 adapters of this rank
    (scale 2) at all linear layers but the output."""
    name = type(model).__name__
    if not hasattr(model, "add_adapter"):
        raise InvalidArgument(f"lora_rank={rank} needs a transformers model, not {name}.")
    if adapter_layers(model):
        raise InvalidArgument(
            f"lora_rank={rank}: {name} has an adapter already. To train it leave lora_rank at 0; "
            "for a new one give a model that it is merged into (model.merge_and_unload(), or what "
            "save_pretrained writes with merge=True)."
        )
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing("lora_rank", "peft") from error
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = beside(model)
    # The adapters' first weights come from the seed alone; torch's own stream goes on untouched.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except ValueError as error:
            raise InvalidArgument(
                f"lora_rank={rank}: peft cannot adapt {name} ({error})."
            ) from error
    _train(model)
    return model


def train_adapters(model: Any) -> None:
    """Make a model's active adapters trainable, in float32, and freeze everything else.

    Raises:
        InvalidArgument: the adapter of a layer is switched off or merged, so that training would
            change nothing.
    """
    for layer in adapter_layers(model):
        if layer.disable_adapters or getattr(layer, "merged", False):
            raise InvalidArgument(
                f"the adapter of {type(unwrapped(model)).__name__} is switched off or merged, so "
                "that training would not change the model; switch it on, or give the policy "
                "model.merge_and_unload()."
            )
    # transformers keeps by what names it read an adapter, and would write the base by them.
    vars(unwrapped(model)).pop("_weight_conversions", None)
    _train(model)


def _train(model: Any) -> None:
    model.requires_grad_(False)
    for layer in adapter_layers(model):
        layer.set_adapter(list(layer.active_adapters))
    if not in_own_dtype(model):
        model.float()
    # Small steps are lost on the coarse grid of bfloat16.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def merged(model: Any) -> Any:
    """Return a plain copy of a model, with the active adapters added to the weights that they
    adapt, in the dtype of these weights."""
    model = copy.deepcopy(unwrapped(model))
    _untie_adapted(model)
    for name, layer in list(model.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        elif getattr(layer, "adapter_layer_names", ()):
            layer.merge()
            plain = layer.get_base_layer()
        else:
            continue
        setattr(model.get_submodule(parent), own_name, plain)
    model._hf_peft_config_loaded = False  # transformers would look for an adapter to save
    configs = [model.config, model.config.get_text_config()]
    tied = [one for one in configs if getattr(one, "tie_word_embeddings", False)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if tied else []
    # A classifier has no output embeddings.
    if len({_place(end.weight) for end in ends if end is not None}) > 1:  # not tied any more
        for config in tied:
            config.tie_word_embeddings = False
    return model


def _untie_adapted(model: Any) -> None:
    """Give an adapted layer a weight of its own where another layer reads it too: embeddings and
    output may share one, and what is added to it would be added to both."""
    places = [_place(one) for _, one in model.named_parameters(remove_duplicate=False)]
    for layer in adapter_layers(model):
        base: Any = getattr(layer, "base_layer", None)
        weight = getattr(base, "weight", None)
        if weight is not None and places.count(_place(weight)) > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def adapter_file(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return what a file of peft's holds of a model's active adapter: its config, and its weights
    by the names that they have there.

    Raises:
        InvalidArgument: there is more than one active adapter.
    """
    from peft import get_peft_model_state_dict

    names = active_adapters(model)
    if len(names) != 1:
        raise InvalidArgument(
            f"{type(unwrapped(model)).__name__} has {len(names)} active adapters "
            f"({', '.join(names)}), and a folder holds one; merge=True saves them together."
        )
    weights = get_peft_model_state_dict(
        model,
        adapter_name=names[0],
        # The base is found under its own name. "auto" would ask a hub whether it was resized.
        save_embedding_layers=False,
    )
    prefix = BASE if unwrapped(model) is model else ""
    return copy.deepcopy(model.peft_config[names[0]]), {
        prefix + name: weight for name, weight in weights.items()
    }


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
