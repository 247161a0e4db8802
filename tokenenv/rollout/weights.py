"""A policy's weights as a checkpoint has them: for engines that run the same model in their own
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
"""What of peft's LoRA goes to vLLM; beside these the rank and the scale."""


def transformers_model(model: Any) -> Any:
    """The transformers model of a policy, without peft's wrapper. Raises `InvalidArgument` unless
    vLLM can be given it as a checkpoint and, where it has an adapter, as a checkpoint and a LoRA
    adapter."""
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
            f"has {has}; merge "
            "them (model.merge_and_unload()) or leave rollout at 'step'."
        )
    return model


def _is_plain_lora(config: Any) -> bool:
    return config.peft_type.value == "LORA" and all(
        getattr(config, key) == value for key, value in PLAIN_LORA.items()
    )


def lora_config(model: Any) -> Any:
    """peft's config of the adapter that is trained of the model; None where the model's own weights
    are."""
    names = active_adapters(model)
    return model.peft_config[names[0]] if names else None


def named_weights(model: Any) -> dict[str, Tensor]:
    """The model's own weights under the names that its checkpoint has, adapters left out.

    Tied ones under each of their names: vLLM keeps a packed copy of an output layer that is tied to
    the embeddings, and takes no new one where the embeddings alone come.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = {
        name.replace(".base_layer.", "."): w
        for name, w in model.state_dict().items()
        if ".lora_" not in name
    }
    return revert_weight_conversion(model, weights)


def save_weights(model: Any, folder: Path) -> None:
    """Writes config.json and model.safetensors, without adapters: what `vllm serve FOLDER` loads,
    but for a tokenizer."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    # Copies: safetensors takes no two names for the same memory, as tied weights have.
    weights = {
        name: weight.to("cpu", copy=True).contiguous()
        for name, weight in named_weights(model).items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the low-rank adapter as peft does, for a LoRA request."""
    folder.mkdir(parents=True, exist_ok=True)
    [adapter] = active_adapters(model)
    pattern = re.compile(rf"(.*\.lora_\w+)\.{re.escape(adapter)}(\.weight)?")
    own = {
        match: weight
        for name, weight in model.state_dict().items()
        if (match := pattern.fullmatch(name))
    }
    names = [ADAPTER_PREFIX + match[1] + (match[2] or "") for match in own]
    tensors = dict(
        zip(
            names,
            (weight.to("cpu", copy=True).contiguous() for weight in own.values()),
            strict=True,
        )
    )
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    made = lora_config(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": made.r,
        "lora_alpha": made.lora_alpha,
        "target_modules": sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
