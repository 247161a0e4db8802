"""TextGen-v0: bring your own model, reward model and prompts.

Any transformers causal language model: hub id, local directory or object. The reward is by default "token" for a
token-classification reward model and "terminal" for a sequence-classification one; without a reward model, `reward=` must
be a rule or a term of one's own.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenenv.errors import InvalidArgument, ModelError, check_choice
from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import check_same_tokens, load_causal_lm, load_reward_model, load_tokenizer
from tokenenv.models.trunks import vocab_size_of
from tokenenv.prompts import load_prompts
from tokenenv.types import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXTENDED_ROPE = {"dynamic", "linear", "yarn"}
"""RoPE types that reach beyond the positions named in the config."""

logger = logging.getLogger("tokenenv")


def task(
    *,
    model: Any,
    prompts: Any,
    reward_model: Any = None,
    reference: Any = None,
    tokenizer: Any = None,
    max_prompt_tokens: int = 256,
    max_new_tokens: int = 128,
    long_prompts: str = "refuse",
    chat_template: bool = False,
    prompt_column: str = "prompt",
    stop_token_ids: Sequence[int] | None = None,
    gold: Callable[[str, str], float] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """The task of one's own models on one's own prompts.

    Args:
        model: the policy's initial weights: hub id, local directory (safetensors), or an object, which will be frozen.
        prompts: texts or token ids in a list, a .jsonl or text file, or a `datasets` dataset (see `load_prompts`).
        reward_model: likewise, a causal sequence- or token-classification model with one label.
        reference: pi_ref, likewise; by default the model itself, which is then run once for both.
        tokenizer: by default the model's own; a model object brings none, and without one prompts are token ids.
        max_prompt_tokens: P.
        max_new_tokens: T.
        long_prompts: "refuse" or "truncate" (keep the last tokens of) prompts of more than P tokens.
        chat_template: apply the tokenizer's chat template to `prompts`; those given to `reset` are taken as they are.
        prompt_column: where a dataset's or a JSONL file's rows hold the prompt.
        stop_token_ids: ids that end a text; by default the model's end-of-text ids.
        gold: gold(prompt_text, response_text), the true metric, for evaluation only.
        device: of all models; by default where a model object is, else "cpu".
        dtype: "float32", "bfloat16" or "float16"; by default float32, and model objects keep theirs.
        attn_implementation: transformers' name of it; None lets transformers choose.
        trust_remote_code: run code that comes with a model or tokenizer.

    Raises:
        ModelError: a model or tokenizer cannot be loaded, lacks a head, or does not fit the others.
        InvalidArgument: a prompt cannot be used, or an argument is not allowed.
    """
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    options |= {"device": device, "dtype": _dtype(dtype)}
    length = max_prompt_tokens + max_new_tokens
    policy = _frozen(load_causal_lm(model, **options), "model", length)
    tokenizer = _tokenizer(model if tokenizer is None else tokenizer, trust_remote_code)
    if gold is not None and tokenizer is None:
        raise InvalidArgument("gold= reads texts; give a tokenizer= too.")
    stop_ids = _stop_ids(policy, tokenizer, stop_token_ids)
    ids = load_prompts(  # before more models are loaded, which may take minutes
        prompts,
        tokenizer,
        vocab_size=vocab_size_of(policy),
        max_prompt_tokens=max_prompt_tokens,
        long_prompts=long_prompts,
        chat_template=chat_template,
        column=prompt_column,
    )
    options["device"] = device or policy.device
    reference = None if reference == model else reference
    _check_tokenizer(tokenizer, reference, "reference", trust_remote_code)
    _check_tokenizer(tokenizer, reward_model, "reward model", trust_remote_code)
    frozen = policy if reference is None else _frozen(load_causal_lm(reference, **options), "reference", length)
    rewarder = None if reward_model is None else _frozen(load_reward_model(reward_model, **options), "reward model", length)
    scorer = None if rewarder is None else make_scorer(rewarder)
    return Task(
        tokenizer=tokenizer,
        reference=frozen,
        model=None if frozen is policy else policy,
        scorer=scorer,
        reward="token" if scorer is not None and scorer.per_token else "terminal",
        prompts=ids,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_ids,
        gold=gold,
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    check_choice("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _frozen(model: Any, role: str, length: int) -> Any:
    """The model, if it has positions for `length` tokens, in eval mode and without gradients."""
    positions = _positions(model.config.get_text_config())
    if positions is not None and length > positions:
        raise InvalidArgument(
            f"max_prompt_tokens + max_new_tokens = {length} tokens; allowed: at most {positions}, the {role}'s positions."
        )
    return model.eval().requires_grad_(False)


def _positions(config: Any) -> int | None:
    """How many tokens the model was made for; None where it has no such limit, or one that is not in the config."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [one for one in rope.values() if isinstance(one, dict)]
    kinds = {one.get("rope_type") for one in (rope, *by_layer_type)}
    return None if kinds & EXTENDED_ROPE else getattr(config, "max_position_embeddings", None)


def _tokenizer(source: Any, trust_remote_code: bool) -> Any:
    """A tokenizer object, or the one at a hub id or directory; None for a model object, which brings none."""
    if not isinstance(source, (str, Path)):
        return source if hasattr(source, "get_vocab") else None
    tokenizer = load_tokenizer(source, trust_remote_code)
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):  # what some families make up without files
        raise ModelError(f"{str(source)!r} brings no tokenizer; give one with tokenizer=.")
    return tokenizer


def _check_tokenizer(tokenizer: Any, source: Any, role: str, trust_remote_code: bool) -> None:
    """Raises `ModelError` if another model's own tokenizer has other tokens than the policy's."""
    if tokenizer is None or not isinstance(source, (str, Path)):
        return
    try:
        own = _tokenizer(source, trust_remote_code)
    except ModelError as error:
        logger.warning("the %s is taken to read the model's token ids: %s", role, error)
        return
    check_same_tokens(tokenizer, own, role)


def _stop_ids(model: Any, tokenizer: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    """The ids given, or the end-of-text ids of the generation config, the config or the tokenizer, the first that has any."""
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    found = [getattr(source, "eos_token_id", None) for source in sources] if given is None else [given]
    chosen = next((ids for ids in found if ids is not None), None)
    if chosen is None:
        raise InvalidArgument("the model names no end-of-text id; give the ids that end a text as stop_token_ids=.")
    ids = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    last = vocab_size_of(model) - 1
    if not ids or not all(isinstance(token, (int, np.integer)) and 0 <= token <= last for token in ids):
        raise InvalidArgument(f"stop_token_ids={ids}; allowed: one or more of the model's token ids, 0 to {last}.")
    return ids
