"""Loading models and tokenizers from hub ids or local directories."""

import os
from contextlib import nullcontext
from typing import Any

import torch

from tokenenv.errors import InvalidArgument, ModelError, check_choice

from . import shapes
from .heads import make_scorer
from .hub import adapter_config, failed, hub_options, offline, undisturbed, without_bars
from .precision import convert
from .probing import looks_ahead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TASKS = {"TOKEN_CLS": "TokenClassification", "SEQ_CLS": "SequenceClassification"}
"""peft's names of the tasks of reward models."""

EXTENDED_ROPE = {"dynamic", "linear", "yarn"}
"""Types of RoPE with which a model reads texts longer than the positions that its config names."""


def load_causal_lm(
    source: Any,
    *,
    argument: str = "model",
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model, frozen and in eval mode.

    Args:
        source: a hub id or a local directory, with safetensors; or a model object, which is
            returned itself, as it is.
        argument: the name under which the user gave the source, for errors.
        revision: a branch, a tag or a commit of a hub id; None: the default branch.
        device: "cpu" by default. A model object is moved only if a device is given.
        dtype: float32 by default. A model object is converted only if a dtype is given.
        attn_implementation: transformers' name of the attention; None lets transformers choose.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: nothing at `source` can be used.
        InvalidArgument: the source is of another type, or the device cannot be used here.
    """
    if hasattr(source, "config"):
        return _moved(source, device, dtype)
    return _load(
        "AutoModelForCausalLM",
        source,
        argument,
        device,
        dtype,
        revision=revision,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def load_reward_model(source: Any, **options: Any) -> Any:
    """Load a causal sequence- or token-classification model with one label, frozen and in eval
    mode. The arguments are those of `load_causal_lm`.

    Raises:
        ModelError: nothing at `source` can be used, it has no trained scalar head, or it looks
            ahead.
    """
    model = load_classifier(source, **options)
    make_scorer(model)
    if looks_ahead(model):
        name = source if isinstance(source, str) else type(model).__name__
        raise ModelError(
            f"reward model {name!r} looks ahead (bidirectional attention); allowed: causal models"
        )
    return model


def load_classifier(
    source: Any,
    *,
    argument: str = "reward_model",
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a sequence- or token-classification model, frozen and in eval mode, whatever its
    attention and its labels are; of a directory of peft's, the base that it names with the adapter,
    which brings the head if the base is a language model. The arguments are those of
    `load_causal_lm`.

    Raises:
        ModelError: nothing at `source` can be used, or it has no trained head.
    """
    if hasattr(source, "config"):
        return _moved(source, device, dtype)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    adapter = adapter_config(str(source))
    if adapter is None:
        auto_class = _classifier(source, argument, **options)
    else:
        auto_class, labels = _classifier_of_adapter(adapter, source, argument)
        options |= labels
    options["attn_implementation"] = attn_implementation
    return _load(auto_class, source, argument, device, dtype, **options)


def is_classifier(source: Any, argument: str) -> bool:
    """Return whether the config at a hub id or in a local directory names a sequence- or
    token-classification model. Raise `ModelError` where there is no config."""
    return _kind(_from_pretrained("AutoConfig", source, argument)) is not None


def load_tokenizer(
    source: Any,
    trust_remote_code: bool = False,
    *,
    argument: str = "tokenizer",
    revision: str | None = None,
) -> Any:
    """Load a tokenizer from a hub id or a local directory. A tokenizer object is returned itself.
    The arguments are those of `load_causal_lm`. Raise `ModelError` where there is none."""
    if hasattr(source, "get_vocab"):
        return source
    return _from_pretrained(
        "AutoTokenizer", source, argument, revision, trust_remote_code=trust_remote_code
    )


def check_device(device: Any) -> None:
    """Raise `InvalidArgument` unless tensors can be put there."""
    if shapes.wanted():
        return
    try:
        torch.empty(0, device=device).tolist()  # which the device "meta" cannot
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InvalidArgument(f"device={device!r} cannot be used here: {reason}.") from error


def check_same_tokens(policy_tokenizer: Any, other_tokenizer: Any, role: str) -> None:
    """Raise `ModelError`, naming the other tokenizer's `role`, where `token_difference` finds
    something."""
    difference = token_difference(policy_tokenizer, other_tokenizer)
    if difference is not None:
        raise ModelError(
            f"the tokenizer of the {role} differs from the policy's: {difference}; allowed: the "
            "same token for every id"
        )


def token_difference(policy_tokenizer: Any, other_tokenizer: Any) -> str | None:
    """Return in words the first id that the policy's tokenizer and another one read differently, or
    that the other lacks; None if there is none.

    The other tokenizer may have ids beyond the policy's: nobody sends them to it.
    """
    theirs = {index: token for token, index in other_tokenizer.get_vocab().items()}
    ours = {index: token for token, index in policy_tokenizer.get_vocab().items()}
    for index, token in sorted(ours.items()):
        if theirs.get(index) != token:
            return f"id {index} is {theirs.get(index)!r}, not {token!r}"
    return None


def max_positions(config: Any) -> int | None:
    """Return how many tokens a model was made for, from its (text) config; None where it has no
    such limit, or the config does not name it."""
    # A model may have one kind of RoPE, or one for each type of layer.
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [one for one in rope.values() if isinstance(one, dict)]
    kinds = {one.get("rope_type") for one in (rope, *by_layer_type)}
    return None if kinds & EXTENDED_ROPE else getattr(config, "max_position_embeddings", None)


def _load(
    auto_class: str, source: Any, argument: str, device: Any, dtype: Any, **options: Any
) -> Any:
    if device is not None:
        check_device(device)  # before anything is read
    dtype = as_dtype(dtype)
    if shapes.wanted():
        return _shape_of(auto_class, source, argument, dtype, **options)
    model, info = _from_pretrained(
        auto_class,
        source,
        argument,
        dtype=dtype or torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    # transformers fills weights that are missing, or have another size, with random numbers.
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{argument}={str(source)!r} lacks trained weights for {type(model).__name__}: "
            f"{', '.join(missing[:5])}"
        )
    return _moved(model, device or "cpu", None).eval().requires_grad_(False)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return torch's dtype of a name, and anything but a name as it is.

    Raises:
        InvalidArgument: the name is none of `DTYPES`.
    """
    if not isinstance(dtype, str):
        return dtype
    check_choice("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _shape_of(
    auto_class: str,
    source: Any,
    argument: str,
    dtype: Any,
    *,
    revision: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> Any:
    """Return the model at a source without its weights (`shapes_only`)."""
    trust = {"trust_remote_code": trust_remote_code}
    config = _from_pretrained("AutoConfig", source, argument, revision, **trust)
    import transformers

    auto = getattr(transformers, auto_class)
    return shapes.made_of(auto, config, dtype or torch.float32, **trust)


def _from_pretrained(
    auto_class: str, source: Any, argument: str, revision: str | None = None, **options: Any
) -> Any:
    """Return what an auto class of transformers makes of a hub id or a local directory."""
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidArgument(
            f"{argument}= is of type {type(source).__name__}; allowed: a hub id, a local directory "
            "or an object of transformers."
        )
    source = os.fspath(source)
    options |= hub_options(source, argument, revision)  # an answer before a slow import
    import transformers

    auto = getattr(transformers, auto_class)
    # A config or a tokenizer is small, and is loaded with its model.
    loading = undisturbed(argument, source) if "AutoModel" in auto_class else without_bars()
    cached = offline() if options.get("local_files_only") else nullcontext()
    try:
        with loading, cached:
            return auto.from_pretrained(source, **options)
    # transformers, and code that comes with a model, may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise ModelError(failed(argument, source, reason)) from error


def _moved(model: Any, device: Any, dtype: str | torch.dtype | None) -> Any:
    dtype = as_dtype(dtype)
    model = model if device is None else model.to(device)
    return model if dtype is None else convert(model, dtype)


def _classifier(source: Any, argument: str, **options: Any) -> str:
    """Return the name of the auto class that loads a reward model, by the architecture that its
    config names."""
    config = _from_pretrained("AutoConfig", source, argument, **options)
    kind = _kind(config)
    if kind is None:
        raise ModelError(
            f"{argument}={str(source)!r} is {config.architectures}; allowed: sequence- or "
            "token-classification models with one label"
        )
    return f"AutoModelFor{kind}"


def _classifier_of_adapter(
    adapter: dict[str, Any], source: Any, argument: str
) -> tuple[str, dict[str, Any]]:
    """Return the name of the auto class that loads an adapter of peft's with its base, and further
    options. A base without a scalar head is a language model, and the adapter has to bring one."""
    base = adapter["base_model_name_or_path"]
    kind = _kind(_from_pretrained("AutoConfig", base, f"the base model of {argument}"))
    if kind is not None:
        return f"AutoModelFor{kind}", {}
    kind = TASKS.get(str(adapter.get("task_type")))
    if kind is None or not _brings_head(source):
        raise ModelError(
            f"{argument}={str(source)!r} is an adapter of {base!r}, which has no scalar head, and "
            "brings none; allowed: sequence- or token-classification models with one label"
        )
    return f"AutoModelFor{kind}", {"num_labels": 1}


def _brings_head(source: Any) -> bool:
    """Return whether an adapter's file holds the head of a classifier."""
    from safetensors import safe_open

    try:
        with safe_open(os.path.join(source, "adapter_model.safetensors"), "pt") as weights:
            names = ".".join(weights.keys())
    except OSError:
        return False
    return not {"score", "classifier"}.isdisjoint(names.split("."))


def _kind(config: Any) -> str | None:
    # A config is a file: what stands there may be of any type.
    named = config.architectures if isinstance(config.architectures, list) else []
    for architecture in (one for one in named if isinstance(one, str)):
        for kind in ("TokenClassification", "SequenceClassification"):
            if architecture.endswith(f"For{kind}"):
                return kind
    return None
