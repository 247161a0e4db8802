"""What makes an env the one that a run was trained in, as plain values. Checkpoints hold it, and
are refused by another env.

It leaves out what changes nothing that is learned: device, kind of array, rendering, what is
watched, `max_batch_tokens`, `compile`. Models and prompts are told by their contents, not by where
they were found.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.env.config import EnvConfig
from tokenenv.env.given_models import GIVEN_MODELS
from tokenenv.rewards.term import RewardTerm
from tokenenv.tables import Columns
from tokenenv.types import Scorer, Task, TokenSpec

CHANGES_NOTHING = (
    "watch",
    "array",
    "max_batch_tokens",
    "compile",
    "frozen_dtype",
    *GIVEN_MODELS,
)
"""Options that may differ between a run and its continuation. Models are told by their
contents."""
SAMPLES = 4096
"""Numbers of each array, and prompts, that are looked at: a large model is told from another in
milliseconds."""


def identity(
    env_id: str | None,
    config: EnvConfig,
    task: Task,
    spec: TokenSpec,
    terms: Mapping[str, RewardTerm],
    kl_coef: float,
) -> dict[str, Any]:
    """Return the identity as nested dicts, lists and plain values. `kl_coef` is what the env was
    made with."""
    options = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in CHANGES_NOTHING
    }
    options |= {"kl_coef": kl_coef, "max_new_tokens": spec.max_new_tokens}
    del options["reward"]  # the terms say it
    models = ("reference", "model", "scorer", "implicit_model", "teacher", "step_scorer")
    more: dict[str, Any] = {"columns": columns_digest(task.columns)} if task.columns else {}
    if task.respond is not None:
        more["replies"] = {
            "respond": plain(task.respond),
            "turn_end_token_ids": plain(task.turn_end_token_ids),
            "max_context_tokens": spec.max_length,
        }
    return {
        "id": env_id,
        "options": plain(options),
        "tokens": {
            "vocab_size": spec.vocab_size,
            "stop_token_ids": list(spec.stop_token_ids),
            "max_prompt_tokens": spec.max_prompt_tokens,
        },
        "prompts": prompts_digest(task.prompts),
        **more,
        "models": {
            name: digest(getattr(task, name)) for name in models if getattr(task, name) is not None
        },
        "terms": {name: plain(term) for name, term in terms.items()},
    }


def plain(value: Any) -> Any:
    """Return a description that is equal for equal settings: plain values as they are, functions
    and classes by name, terms and other objects by their class and public settings, models by
    `digest`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, nn.Module | Scorer | Tensor | np.ndarray):
        return digest(value)
    if isinstance(value, RewardTerm):
        settings = {
            name: one
            for name, one in vars(value).items()
            if not name.startswith("_") and name != "models"
        }
        return {"class": type(value).__name__, "weight": plain(value.weight), **plain(settings)}
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class": type(value).__name__,
            **plain({field.name: getattr(value, field.name) for field in fields(value)}),
        }
    return getattr(value, "__qualname__", type(value).__qualname__)


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """Return how many prompts there are, and a checksum over (at most `SAMPLES` of) them."""
    value = 0
    for i in range(0, len(prompts), _stride(len(prompts))):
        value = zlib.crc32(np.asarray(prompts[i], np.int64).tobytes(), zlib.crc32(b"|", value))
    return f"{len(prompts)} prompts, {value:08x}"


def columns_digest(columns: Sequence[Columns]) -> str:
    """Return the names of the columns, and a checksum over (at most `SAMPLES` of) the rows."""
    value, names = 0, dict.fromkeys(name for row in columns for name in row)
    for i in range(0, len(columns), _stride(len(columns))):
        value = zlib.crc32(json.dumps(columns[i], sort_keys=True).encode(), value)
    return f"{', '.join(names)}, {value:08x}"


def digest(model: Any) -> str:
    """Return a model's class, and a checksum over the shapes, types and (at most `SAMPLES` each of)
    the numbers that it holds."""
    if isinstance(model, Scorer):
        kind = "per token" if model.per_token else "per text"
        return f"{digest(model.model)}, {digest(model.head)} {kind}"
    value = 0
    for name, array in sorted(_arrays(model).items()):
        tensor = torch.as_tensor(array).detach()
        chosen = tensor.reshape(-1)[:: _stride(tensor.numel())]
        value = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(chosen.contiguous().cpu().view(torch.uint8).numpy().tobytes(), value)
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return f"{name} {value:08x}" if value else name


def _arrays(model: Any) -> dict[str, Any]:
    """Return the tensors and arrays of a module, or of any other object, by name."""
    if isinstance(model, Tensor | np.ndarray):
        return {"": model}
    own = {name: value for name, value in _attributes(model).items() if not name.startswith("_")}
    found = dict(model.state_dict()) if isinstance(model, nn.Module) else {}
    for name, value in own.items():
        if isinstance(value, Tensor | np.ndarray):
            found[name] = value
        elif isinstance(value, nn.Module):
            found |= {f"{name}.{key}": one for key, one in _arrays(value).items()}
    return found


def _attributes(model: Any) -> Mapping[str, Any]:
    """Return an object's attributes by name, those of a dataclass with slots as well."""
    if is_dataclass(model) and not isinstance(model, type):
        return {field.name: getattr(model, field.name) for field in fields(model)}
    return getattr(model, "__dict__", {})


def _stride(count: int) -> int:
    """Return the stride at which at most `SAMPLES` of `count` are looked at."""
    return max(1, -(-count // SAMPLES))
