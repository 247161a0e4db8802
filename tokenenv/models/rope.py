"""RoPE whose frequencies depend on the longest row of a batch, made to depend on the model's
capacity alone."""

from typing import Any

import torch

from tokenenv.errors import ModelError


def fix_rope(trunk: Any, max_length: int) -> None:
    """Fixes the frequencies of `dynamic` and `longrope` RoPE, in place, to those of a text of
    `max_length` tokens.

    transformers chooses them anew in each forward from the largest position in the batch, so that a
    row's states depend on the other rows, and cached keys on when they were made. Fixed, acting,
    scoring and learning agree. The choice holds for this model object (and its copies) from then
    on; the saved config is unchanged. Other models are left alone.

    Raises:
        ModelError: the model was fixed for shorter texts, which used other frequencies; or its code
            is unknown.
    """
    known = False
    for module in trunk.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            known = True
            _fix(module, None, kinds, max_length)
        elif isinstance(kinds, dict):
            known = True
            for layer_type, kind in kinds.items():
                _fix(module, layer_type, kind, max_length)
    if not known:
        _check_unknown(trunk.config, max_length)


def _varies(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _fix(module: Any, layer_type: str | None, kind: str, max_length: int) -> None:
    fixed: dict[str | None, tuple[str, int]] = module.__dict__.setdefault("fixed_rope", {})
    kind, fixed_length = fixed.get(layer_type, (kind, 0))
    if not _varies(kind) or max_length <= fixed_length:
        return
    prefix = "" if layer_type is None else f"{layer_type}_"
    old = getattr(module, f"{prefix}inv_freq")
    new, scaling = _frequencies(module.config, layer_type, kind, max_length, old.device)
    if fixed_length and not torch.equal(old, new):
        raise ModelError(
            f"max_length={max_length}: this model's {kind} RoPE is fixed for texts of at most "
            f"{fixed_length} tokens; "
            f"load the model again for longer ones"
        )
    setattr(module, f"{prefix}inv_freq", new)
    setattr(module, f"{prefix}attention_scaling", scaling)
    fixed[layer_type] = (kind, max_length)
    if layer_type is None:  # transformers' per-forward update looks at the type alone
        module.rope_type = "default"
    else:
        module.rope_type[layer_type] = "default"


def _frequencies(
    config: Any, layer_type: str | None, kind: str, max_length: int, device: torch.device
) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    return ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=max_length, **kwargs)


def _check_unknown(config: Any, max_length: int) -> None:
    """A model with its own RoPE code cannot be fixed; short texts do not need it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type") or ""
    lengths = (
        rope.get("original_max_position_embeddings"),
        getattr(config, "original_max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    )
    original = next((length for length in lengths if length), max_length)
    if _varies(kind) and max_length > original:
        raise ModelError(
            f"max_length={max_length}: the model's own {kind} RoPE code changes with the longest "
            f"row of a batch beyond "
            f"{original} tokens; allowed: at most {original}"
        )
