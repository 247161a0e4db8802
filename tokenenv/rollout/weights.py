"""A policy's weights in the form of a checkpoint, for engines that run the same model in their own
way."""

import copy
import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import active_adapters, unwrapped

ADAPTER_PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""

PLAIN_LORA: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""The LoRA options that vLLM understands, with the only values that it takes. Rank and scale are
free."""


def transformers_model(model: Any) -> Any:
    """Return the transformers model of a policy, without peft's wrapper.

    Raises:
        InvalidArgument: vLLM cannot be given the model as a checkpoint, or its adapter as a LoRA
            adapter beside it.
    """
    model = unwrapped(model)
    if not hasattr(model, "save_pretrained"):
        raise InvalidArgument(
            f"rollout needs a transformers policy, which vLLM can run, not {type(model).__name__}."
        )
    names = active_adapters(model)
    configs = [model.peft_config[name] for name in names]
    if len(names) > 1 or not all(_is_plain_lora(config) for config in configs):
        pairs = zip(names, configs, strict=True)
        has = ", ".join(f"{name!r} ({config.peft_type.value})" for name, config in pairs)
        raise InvalidArgument(
            f"rollout hands adapters over as plain LoRA of one rank, and {type(model).__name__} "
            f"has {has}; merge them (model.merge_and_unload()) or leave rollout at 'step'."
        )
    return model


def _is_plain_lora(config: Any) -> bool:
    plain = (getattr(config, key) == value for key, value in PLAIN_LORA.items())
    return config.peft_type.value == "LORA" and all(plain)


def lora_config(model: Any) -> Any:
    """Return peft's config of the adapter that is trained; None where the model's own weights
    are."""
    names = active_adapters(model)
    return model.peft_config[names[0]] if names else None


def named_weights(model: Any) -> dict[str, Tensor]:
    """Return the model's own weights, without adapters, by the names that its checkpoint has.

    Tied weights are there under each of their names: vLLM keeps a packed copy of an output layer
    that is tied to the embeddings, and does not renew it where the embeddings come alone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # peft moves the weights that it adapts into a `base_layer`.
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in model.state_dict().items()
        if ".lora_" not in name
    }
    return revert_weight_conversion(model, weights)


def save_weights(model: Any, folder: Path) -> None:
    """Write config.json and model.safetensors, without adapters and without a tokenizer, for vLLM
    to load the folder."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    # Copies, because safetensors refuses two names for the same memory, which tied weights have.
    weights = {
        name: weight.to("cpu", copy=True).contiguous()
        for name, weight in named_weights(model).items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_adapter(model: Any, folder: Path) -> None:
    """Write the low-rank adapter in peft's format, for a LoRA request."""
    folder.mkdir(parents=True, exist_ok=True)
    # A layer names its weights "lora_A.ADAPTER.weight", and an adapter's file "lora_A.weight".
    [adapter] = active_adapters(model)
    pattern = re.compile(rf"(.*\.lora_\w+)\.{re.escape(adapter)}(\.weight)?")
    tensors = {
        ADAPTER_PREFIX + match[1] + (match[2] or ""): weight.to("cpu", copy=True).contiguous()
        for name, weight in model.state_dict().items()
        if (match := pattern.fullmatch(name))
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    made = lora_config(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": made.r,
        "lora_alpha": made.lora_alpha,
        "target_modules": sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
