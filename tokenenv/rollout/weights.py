"""A policy's weights as a checkpoint has them: for engines that run the same model in their own way."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tokenenv.errors import InvalidArgument

ADAPTER_PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""


def check_transformers_model(model: Any) -> None:
    """Raises `InvalidArgument` unless vLLM can be given the model as a checkpoint."""
    if not hasattr(model, "save_pretrained"):
        raise InvalidArgument(f"rollout needs a transformers policy, which vLLM can run, not {type(model).__name__}.")


def has_adapter(model: Any) -> bool:
    """Whether low-rank adapters are what is trained of the model."""
    return bool(getattr(model, "peft_config", None))


def named_weights(model: Any) -> dict[str, Tensor]:
    """The model's own weights under the names that its checkpoint has, adapters left out.

    Tied ones under each of their names: vLLM keeps a packed copy of an output layer that is tied to the embeddings, and
    takes no new one where the embeddings alone come.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = {name.replace(".base_layer.", "."): w for name, w in model.state_dict().items() if ".lora_" not in name}
    return revert_weight_conversion(model, weights)


def save_weights(model: Any, folder: Path) -> None:
    """Writes config.json and model.safetensors, without adapters: what `vllm serve FOLDER` loads, but for a tokenizer."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    # Copies: safetensors takes no two names for the same memory, as tied weights have.
    weights = {name: weight.to("cpu", copy=True).contiguous() for name, weight in named_weights(model).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the low-rank adapter as peft does, for a LoRA request."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: weight for name, weight in model.state_dict().items() if ".lora_" in name}
    names = [ADAPTER_PREFIX + name.replace(".default.", ".") for name in own]
    tensors = dict(zip(names, (weight.to("cpu", copy=True).contiguous() for weight in own.values()), strict=True))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    made = model.peft_config["default"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": made.r,
        "lora_alpha": made.lora_alpha,
        "target_modules": sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
