"""Tiny random models and a tokenizer that fits them. Nothing is downloaded, and the same seed gives
the same weights.

`causal_lm(architecture)`, `reward_model(kind)` and `bidirectional_reward_model()` share VOCAB_SIZE
ids with `tokenizer()`; `saved(model, directory)` writes a folder that transformers loads.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 61
PAD, EOS, UNK = 0, 1, 2
_TEXT = (
    "a an the cat dog bird film book day night sun rain sea hill tree "
    "good bad warm cold old new red blue slow fast "
    "is was are were not very quite so and but or if when we you they it he she "
    "saw read liked hated found lost in on under over with for to of"
)
WORDS = _TEXT.split()
assert len(WORDS) == VOCAB_SIZE - 3

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
NO_GROUPS: dict[str, Any] = {
    key: value for key, value in SMALL.items() if key != "num_key_value_heads"
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_mha": (
        "LlamaConfig",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_mixed": (
        "Qwen2Config",
        {
            "num_hidden_layers": 3,
            "layer_types": MIXED,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "qwen2_sliding": (
        "Qwen2Config",
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 6, "head_dim": 8}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "layer_types": MIXED[:2],
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "layer_types": MIXED,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3_dynamic": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "layer_types": MIXED[:2],
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "max_position_embeddings": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": DYNAMIC,
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    "phi3_longrope": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
}
"""The name of each architecture, with its transformers config class and what it adds to SMALL."""
CACHED = tuple(name for name in ARCHITECTURES if name not in ("mamba", "bloom", "gpt_neo"))
"""The architectures that `CachedLM` must cache. It must recompute the others."""


def config(architecture: str = "llama", **changes: Any) -> Any:
    """Make the tiny transformers config of an architecture, with some fields changed."""
    class_name, extra = ARCHITECTURES[architecture]
    without_groups = ("gpt2", "gpt_neox", "gpt_neo", "bloom", "mamba", "opt")
    base = NO_GROUPS if architecture in without_groups else SMALL
    return getattr(transformers, class_name)(**{**base, **extra, **changes})


def causal_lm(
    architecture: str = "llama",
    *,
    seed: int = 0,
    attn_implementation: str | None = None,
    **changes: Any,
) -> Any:
    """Make a frozen random causal language model in eval mode, with weights so large that every
    error shows."""
    made = config(architecture, **changes)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return randomized(transformers.AutoModelForCausalLM.from_config(made, **kwargs), seed)


def reward_model(
    kind: str = "token", architecture: str = "llama", *, seed: int = 1, **changes: Any
) -> Any:
    """Make a frozen random reward model with one label; `kind` is "token" or "sequence"
    (classification)."""
    made = config(architecture, **{"num_labels": 1, "classifier_dropout": 0.1, **changes})
    auto = {
        "token": transformers.AutoModelForTokenClassification,
        "sequence": transformers.AutoModelForSequenceClassification,
    }[kind]
    return randomized(auto.from_config(made), seed)


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def seeing_lm(architecture: str = "llava") -> Any:
    """A model that takes images too; its vision tower has 4 or 5 positions, its language model
    64."""
    if architecture == "llava":
        vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
        text = {"model_type": "llama", **SMALL}
        made = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=60
        )
        return randomized(transformers.LlavaForConditionalGeneration(made))
    text = {"model_type": "gemma3_text", **SMALL, **ARCHITECTURES["gemma3"][1]}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    made = transformers.Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=4, image_token_index=60
    )
    return randomized(transformers.Gemma3ForConditionalGeneration(made))


def lm_that_looks_ahead(name: str) -> Any:
    """Make a model that `AutoModelForCausalLM` takes, but that is no causal language model with its
    default config."""
    small = {"dim_head": 8, "dim_ff": 48, "prompt_length": 4, "position_bias_num_buckets": 32}
    made = {
        "bert_generation": lambda: transformers.BertGenerationConfig(**NO_GROUPS),
        "cpmant": lambda: transformers.CpmAntConfig(**NO_GROUPS, **small),
        "xlm": lambda: transformers.XLMConfig(
            vocab_size=VOCAB_SIZE, emb_dim=32, n_layers=2, n_heads=4, pad_index=PAD
        ),
    }[name]()
    return randomized(transformers.AutoModelForCausalLM.from_config(made))


def bidirectional_reward_model(*, seed: int = 1) -> Any:
    """A BERT token classifier with one label: its attention looks ahead."""
    made = transformers.BertConfig(**NO_GROUPS, num_labels=1)
    return randomized(transformers.BertForTokenClassification(made), seed)


def randomized(model: Any, seed: int = 0) -> Any:
    """Give a model new weights: matrices that keep the size of what passes through them, and
    vectors (biases, norms) that moved by a tenth."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2 or "A_log" in name:
                parameter.add_(0.1 * noise)
            else:
                is_table = "embed" in name or "wte" in name or "wpe" in name
                fan_in = 1 if is_table else parameter.shape[1]
                parameter.copy_(1.3 * noise / fan_in**0.5)
    return model.eval().requires_grad_(False)


def tokenizer(words: list[str] | None = None) -> Any:
    """A word-level tokenizer: id 0 is <pad>, 1 <eos>, 2 <unk>, the others are words split at
    spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<eos>", "<unk>", *(WORDS if words is None else words)]
    ids = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def saved(model: Any, directory: Path, with_tokenizer: bool = True) -> str:
    """Saves `model` (and `tokenizer()`) as safetensors under `directory`; returns the path."""
    model.save_pretrained(directory)
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return str(directory)
