"""The models that training begins from: made, loaded, and given a head of one label."""

import copy
from typing import Any

import torch
from torch import nn

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.fit.config import FitConfig
from tokenenv.models.adapters import adapter_layers, with_lora
from tokenenv.models.cached_lm import text_part
from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import (
    is_classifier,
    load_causal_lm,
    load_classifier,
    max_positions,
)
from tokenenv.models.probing import looks_ahead
from tokenenv.models.rope import fix_rope
from tokenenv.models.trunks import trunk_of

HEAD_SIZE = 32
"""Numbers of an attention head of a new model."""
POSITIONS = 256
"""The least number of positions of a new model."""
TASKS = {"token": "TokenClassification", "value": "SequenceClassification"}
"""The kind of classifier that a readout is saved as."""


def make_classifier(config: FitConfig, readout: str, vocab_size: int, tokenizer: Any) -> Any:
    """Return a classifier with one label, in eval mode, whose parameters require gradients where
    they are to be trained: the head always, and all of the trunk, adapters in it or nothing.

    A classifier of the readout's kind goes on with its head. Any other trunk gets a new one.
    """
    if config.is_new:
        model = _new(config, TASKS[readout], vocab_size, tokenizer)
        reset_head(model, config.seed)
    else:
        start = load_start(config.model, "model", config)
        goes_on = not is_language_model(start) and make_scorer(start).per_token == (
            readout == "token"
        )
        model = start if goes_on else with_head(start, TASKS[readout], config.seed)
    check_fits(model, "model", config, vocab_size)
    # Whatever the trunk's dtype is: small steps are lost on the coarse grid of bfloat16.
    head_of(model).float().requires_grad_(True)
    return _prepared(model, config)


def make_language_model(config: FitConfig, vocab_size: int, tokenizer: Any) -> Any:
    """Return a frozen causal language model, in eval mode, that a log-ratio begins from."""
    if config.is_new:
        model = _new(config, "CausalLM", vocab_size, tokenizer)
    else:
        model = load_start(config.model, "model", config)
    if not is_language_model(model):
        raise ModelError(
            f"model={_name(config.model)} is a classifier; objective={config.objective!r} trains a "
            "causal language model"
        )
    check_fits(model, "model", config, vocab_size)
    return model.requires_grad_(False)


def check_settings(config: FitConfig) -> None:
    """Raise `InvalidArgument` where no model can be made as the settings say."""
    if config.is_new and (config.lora_rank or config.freeze):
        option = f"lora_rank={config.lora_rank}" if config.lora_rank else "freeze=True"
        raise InvalidArgument(
            f"{option} leaves the trunk's weights as they are, and those of model='new' are "
            "random; give a trained model."
        )
    if config.hidden_size % HEAD_SIZE:
        raise InvalidArgument(
            f"hidden_size={config.hidden_size} is not allowed; it must be a multiple of "
            f"{HEAD_SIZE}."
        )


def load_start(source: Any, argument: str, config: FitConfig) -> Any:
    """Return a causal language model or a classifier with one label: frozen, in eval mode, and a
    copy where an object was given.

    Raises:
        ModelError: nothing at `source` can be used.
        InvalidArgument: the source is of another type, or it has adapters.
    """
    stays = config.freeze or config.lora_rank > 0
    dtype = getattr(torch, config.dtype) if stays else torch.float32
    options: dict[str, Any] = {"argument": argument, "device": config.device, "dtype": dtype}
    if hasattr(source, "config"):
        source = copy.deepcopy(source).eval().requires_grad_(False)
        load = load_causal_lm
    else:
        load = load_classifier if is_classifier(source, argument) else load_causal_lm
    model = load(source, **options)
    if adapter_layers(model):
        raise InvalidArgument(
            f"{argument}={_name(source)} has an adapter; give a model that it is merged into "
            "(model.merge_and_unload(), or what save_pretrained writes with merge=True)."
        )
    return model


def is_language_model(model: Any) -> bool:
    """Return whether a transformers model has a head over the vocabulary."""
    return model.get_output_embeddings() is not None


def with_head(start: Any, task: str, seed: int) -> Any:
    """Return a classifier with one label on the trunk of another model, with a new head.

    Raises:
        ModelError: transformers has no such classifier for this kind of model.
    """
    import transformers

    config = copy.deepcopy(start.config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    trunk = trunk_of(start)
    auto_class = getattr(transformers, f"AutoModelFor{task}")
    try:
        # On no device: the weights are those of the trunk, and a head that is made below.
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers {transformers.__version__} has no {task} model of type "
            f"{config.model_type!r}, which this objective is saved as"
        ) from error
    prefix = model.base_model_prefix
    if type(getattr(model, prefix)) is not type(trunk):
        raise ModelError(
            f"the trunk of {type(start).__name__} is a {type(trunk).__name__}, and that of "
            f"{type(model).__name__} is a {type(getattr(model, prefix)).__name__}"
        )
    setattr(model, prefix, trunk)
    head_of(model).to_empty(device=trunk.device)
    reset_head(model, seed)
    return model.eval()


def head_of(model: Any) -> nn.Module:
    """Return the head of a classifier, which ends in a linear layer.

    Raises:
        ModelError: it does not.
    """
    head: Any = getattr(model, "score", None) or getattr(model, "classifier", None)
    last = head[-1] if isinstance(head, nn.Sequential) else head
    if not isinstance(last, nn.Linear):
        raise ModelError(
            f"the head of {type(model).__name__} ends in a {type(last).__name__}; allowed: heads "
            "that end in a linear layer, so that rewards can be scaled in its weights"
        )
    return head


def scale_head(model: Any, factor: float) -> None:
    """Multiply what a classifier's head gives, in its weights."""
    head = head_of(model)
    last = head[-1] if isinstance(head, nn.Sequential) else head
    with torch.no_grad():
        for weight in last.parameters():
            weight.mul_(factor)


def reset_head(model: Any, seed: int) -> None:
    """Give a classifier's head small random weights, and a bias of 0.

    The standard deviation is 1 / (H + 1) (Stiennon et al. 2020, arXiv 2009.01325), so that first
    rewards are small whatever the hidden size H.
    """
    linear: Any = head_of(model)
    weight = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        linear.weight.copy_(weight / (linear.in_features + 1))
        if linear.bias is not None:
            linear.bias.zero_()


def check_fits(model: Any, argument: str, config: FitConfig, vocab_size: int) -> None:
    """Raise `ModelError` where a model cannot read the data: it looks ahead, lacks token ids, or
    has fewer positions than `max_length`."""
    name = f"{argument}={_name(getattr(config, argument))}"
    if looks_ahead(model):
        raise ModelError(f"{name} looks ahead (bidirectional attention); allowed: causal models")
    known = trunk_of(model).get_input_embeddings().num_embeddings
    if known < vocab_size:
        raise ModelError(f"{name} has {known} token ids, and the tokenizer {vocab_size}")
    positions = max_positions(model.config.get_text_config())
    if config.max_length is None:
        return
    if positions is not None and positions < config.max_length:
        raise ModelError(
            f"max_length={config.max_length}: {name} has {positions} positions; allowed: at most "
            "that many"
        )
    fix_rope(text_part(trunk_of(model)), config.max_length)


def _prepared(model: Any, config: FitConfig) -> Any:
    """Make a classifier's trunk trainable: all of it, by adapters, or not at all."""
    prefix, trunk = model.base_model_prefix, trunk_of(model)
    if config.lora_rank:
        setattr(model, prefix, with_lora(trunk, config.lora_rank, config.seed))
    elif not config.freeze:
        trunk.requires_grad_(True)
    return model.eval()


def _new(config: FitConfig, task: str, vocab_size: int, tokenizer: Any) -> Any:
    """Make a small Llama with random weights, frozen."""
    import transformers

    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    shape = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        # 8/3 of the hidden size, as in LLaMA, rounded up to a multiple of 32.
        intermediate_size=-(-config.hidden_size // 12) * 32,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // HEAD_SIZE,
        num_key_value_heads=1,
        max_position_embeddings=max(POSITIONS, config.max_length or 0),
        tie_word_embeddings=True,
        num_labels=1,
        classifier_dropout=0.0,
        **{name: getattr(tokenizer, name, None) for name in special},
    )
    # The weights come from the seed alone; torch's own stream goes on untouched.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = getattr(transformers, f"AutoModelFor{task}").from_config(shape)
    return model.to(config.device).eval()


def _name(source: Any) -> str:
    return type(source).__name__ if hasattr(source, "config") else repr(str(source))
