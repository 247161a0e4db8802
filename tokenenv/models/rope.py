"""Rotary position embeddings (RoPE) whose frequencies depend on the longest text of a batch, made
to depend on the model's capacity alone."""

from typing import Any

import torch

from tokenenv.errors import ModelError


def fix_rope(trunk: Any, max_length: int) -> None:
    """Fix the frequencies of `dynamic` and `longrope` RoPE, in place, to those of a text of
    `max_length` tokens. Models with other kinds of RoPE are left alone.

    transformers chooses these frequencies anew in each forward, from the largest position in the
    batch. A text's states then depend on the other texts, and cached keys on when they were made.
    With fixed frequencies, acting, scoring and learning agree. They stay fixed for this model
    object and its copies; the saved config is unchanged.

    Raises:
        ModelError: the model was fixed before, for shorter texts and so at other frequencies; or it
            has RoPE code of its own, which cannot be fixed.
    """
    # transformers keeps one kind of RoPE for the model, or a dict of kinds by layer type.
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
    # What was fixed is kept on the module: by layer type, the kind that it was and for what length.
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
            f"{fixed_length} tokens; load the model again for longer ones"
        )
    setattr(module, f"{prefix}inv_freq", new)
    setattr(module, f"{prefix}attention_scaling", scaling)
    fixed[layer_type] = (kind, max_length)
    # The update that transformers makes in each forward looks at the type alone: under the name
    # "default" it leaves the frequencies alone.
    if layer_type is None:
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
    """Raise `ModelError` where a model's own RoPE code would change with the length of its texts.
    Up to the length that it was trained for it does not."""
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
            f"text of a batch beyond {original} tokens; allowed: at most {original}"
        )
