"""TextGen-v0: bring your own model, reward model and prompts.

Any transformers causal language model: hub id, local directory or object. The reward is by default
"token" for a token-classification reward model and "terminal" for a sequence-classification one;
without a reward model, `reward=` must be a rule or a term of one's own. A reward model with other
tokens than the policy's, or one that looks ahead, scores finished texts.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenenv.errors import InvalidArgument, ModelError, check_choice
from tokenenv.models.aligned_scorer import make_aligned_scorer
from tokenenv.models.chats import Chats, end_of_turn, same_frames
from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import (
    check_same_tokens,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    max_positions,
    token_difference,
)
from tokenenv.models.probing import looks_ahead
from tokenenv.models.trunks import vocab_size_of
from tokenenv.models.vllm_models import VLLMReference, VLLMRewardModel
from tokenenv.prompts import load_prompts
from tokenenv.types import Scorer, Task, TextScorer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger("tokenenv")


def task(
    *,
    model: Any,
    prompts: Any,
    reward_model: Any = None,
    reward_tokenizer: Any = None,
    reference: Any = None,
    implicit_model: Any = None,
    tokenizer: Any = None,
    max_prompt_tokens: int = 256,
    max_new_tokens: int = 128,
    long_prompts: str = "refuse",
    chat_template: bool = False,
    prompt_column: str = "prompt",
    stop_token_ids: Sequence[int] | None = None,
    step_end_token_ids: Sequence[int] = (),
    gold: Callable[[str, str], float] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    max_batch_tokens: int = 16384,
) -> Task:
    """The task of one's own models on one's own prompts.

    Args:
        model: the policy's initial weights: hub id, local directory (safetensors), or an object,
            which will be frozen.
        prompts: texts or token ids in a list, a .jsonl or text file, or a `datasets` dataset (see
            `load_prompts`).
        reward_model: likewise, a sequence- or token-classification model with one label. One that
            is causal and reads the policy's tokens scores every prefix; any other scores finished
            texts (see `make_aligned_scorer`), as does a `TextScorer` of one's own and the URL of a
            vLLM server (a `VLLMRewardModel`: tokens scored by the policy's ids).
        reward_tokenizer: the reward model's, as hub id, local directory or object; by default the
            one saved with it. A model that brings none must have as many token ids as the policy.
        reference: pi_ref, likewise; by default the model itself, which is then run once for both. A
            `TokenModel`, too; or the URL of a vLLM server, which scores whole texts only (a
            `VLLMReference`).
        implicit_model: likewise, a preference-tuned causal language model with the policy's tokens,
            for reward="implicit".
        tokenizer: by default the model's own; a model object brings none, and without one prompts
            are token ids.
        max_prompt_tokens: P.
        max_new_tokens: T.
        long_prompts: "refuse" or "truncate" prompts of more than P tokens: keep special tokens at
            the beginning and the last tokens, of a chat what the template writes around the longest
            message, and that one's end.
        chat_template: prompts that are texts are one message of the user's, lists of messages are
            taken too, and the tokenizer's chat template writes them; so with prompts given to
            `reset`, `score_episodes` and `generate`, where token ids are taken as they are. A
            reward model whose tokenizer has another template reads the conversation by that.
        prompt_column: where a dataset's or a JSONL file's rows hold the prompt.
        stop_token_ids: ids that end a text; by default the end-of-text ids of the generation
            config, of the config and of the tokenizer together, and the token that closes an answer
            in the tokenizer's chat template.
        step_end_token_ids: ids that end a step of the text, for the designs that pay by step.
        gold: gold(prompt_text, response_text), the true metric, for evaluation only.
        device: of all models; by default where a model object is, else "cpu".
        dtype: "float32", "bfloat16" or "float16"; by default float32, and model objects keep
            theirs.
        attn_implementation: transformers' name of it; None lets transformers choose.
        trust_remote_code: run code that comes with a model or tokenizer.
        max_batch_tokens: the env's own option; bounds the forwards over finished texts too.

    Raises:
        ModelError: a model or tokenizer cannot be loaded, lacks a head, or does not fit the others.
        InvalidArgument: a prompt cannot be used, or an argument is not allowed.
    """
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    options |= {"device": device, "dtype": _dtype(dtype)}
    length = max_prompt_tokens + max_new_tokens
    policy = _frozen(load_causal_lm(model, **options), "model", length)
    tokenizer = _tokenizer(model if tokenizer is None else tokenizer, trust_remote_code)
    if gold is not None and tokenizer is None:
        raise InvalidArgument("gold= reads texts; give a tokenizer= too.")
    if reward_tokenizer is not None and tokenizer is None:
        raise InvalidArgument("reward_tokenizer= reads texts; give a tokenizer= too.")
    stop_ids = _stop_ids(policy, tokenizer, stop_token_ids)
    chats = Chats(tokenizer) if chat_template else None
    ids = load_prompts(  # before more models are loaded, which may take minutes
        prompts,
        tokenizer,
        vocab_size=vocab_size_of(policy),
        max_prompt_tokens=max_prompt_tokens,
        long_prompts=long_prompts,
        chat_template=chats or False,
        column=prompt_column,
    )
    options["device"] = device or policy.device
    others = {"reference": reference, "implicit model": implicit_model}
    for role, source in others.items():
        if source != model and not _on_server(source):
            _check_tokens(tokenizer, source, role, trust_remote_code)
    loaded = {
        role: _other_model(source, role, policy, model, length, options)
        for role, source in others.items()
    }
    scorer: Scorer | TextScorer | None = None
    if _on_server(reward_model):
        scorer = VLLMRewardModel(reward_model)
    elif hasattr(reward_model, "token_scores"):
        scorer = _checked(reward_model)
    elif reward_model is not None:
        given = _tokenizer(reward_tokenizer, trust_remote_code)
        own = (
            _own_tokenizer(reward_model, "reward model", trust_remote_code)
            if given is None
            else given
        )
        classifier = load_classifier(reward_model, **options)
        if own is None:
            _check_size(classifier, policy, tokenizer)
        texts = {"chats": chats, "stop_token_ids": stop_ids, "max_batch_tokens": max_batch_tokens}
        scorer = _scorer(classifier, own, tokenizer, length, texts)
    reference = policy if loaded["reference"] is None else loaded["reference"]
    return Task(
        tokenizer=tokenizer,
        chats=chats,
        reference=reference,
        model=None if reference is policy else policy,
        scorer=scorer,
        implicit_model=loaded["implicit model"],
        step_end_token_ids=_token_ids("step_end_token_ids", step_end_token_ids, policy),
        reward="token" if scorer is not None and scorer.per_token else "terminal",
        prompts=ids,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_ids,
        gold=gold,
    )


def _other_model(
    source: Any, role: str, policy: Any, policy_source: Any, length: int, options: dict[str, Any]
) -> Any:
    """A further language model, which may be the policy's own; None where none was given."""
    if source is None or hasattr(source, "slots"):
        return source
    if _on_server(source):
        return VLLMReference(source)
    return (
        policy
        if source == policy_source
        else _frozen(load_causal_lm(source, **options), role, length)
    )


def _on_server(source: Any) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _checked(scorer: Any) -> TextScorer:
    """Raises `ModelError` where a scorer of one's own does not say what it scores."""
    if missing := [name for name in ("per_token", "looks_ahead") if not hasattr(scorer, name)]:
        raise ModelError(
            f"reward_model={type(scorer).__name__} has no {' and no '.join(missing)}; a "
            f"`tokenenv.types.TextScorer` says True "
            "or False there"
        )
    return scorer


def _check_size(classifier: Any, policy: Any, tokenizer: Any) -> None:
    """Raises `ModelError` where a reward model without a tokenizer cannot read the policy's ids."""
    theirs = (
        classifier.get_input_embeddings().num_embeddings,
        classifier.config.get_text_config().vocab_size,
    )
    ours = policy.get_input_embeddings().num_embeddings, vocab_size_of(policy)
    if not set(theirs) & set(ours):
        missing = "" if tokenizer is not None else "tokenizer= and "
        raise ModelError(
            f"the reward model ({type(classifier).__name__}) has {theirs[1]} token ids, the policy "
            f"{ours[1]}, and it brings no "
            f"tokenizer that says what they are; give {missing}reward_tokenizer="
        )


def _scorer(
    classifier: Any, own: Any, tokenizer: Any, length: int, texts: dict[str, Any]
) -> Scorer | TextScorer:
    """The reward model as a scorer of every prefix if it is causal and reads the policy's tokens,
    else of finished texts."""
    same_tokens = own is None or tokenizer is None or token_difference(tokenizer, own) is None
    chats = texts["chats"]
    if chats is not None and own is not None:
        if not same_frames(chats, own):
            logger.warning(
                "the reward model's chat template is not the policy's: it reads finished texts, by "
                "its own template; give the "
                "policy's tokenizer as reward_tokenizer= if it should read the policy's"
            )
            same_tokens = False
        elif not same_tokens and not getattr(own, "chat_template", None):
            logger.warning(
                "the reward model's tokenizer has no chat template: it reads the policy's, roles "
                "as plain words"
            )
    if same_tokens and not looks_ahead(classifier):
        return make_scorer(_frozen(classifier, "reward model", length))
    if tokenizer is None:
        raise ModelError(
            f"the reward model ({type(classifier).__name__}) looks ahead, so it has to be given "
            f"finished texts; give a "
            "tokenizer= to decode them"
        )
    own = tokenizer if own is None else own
    return make_aligned_scorer(classifier.eval().requires_grad_(False), own, tokenizer, **texts)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    check_choice("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _frozen(model: Any, role: str, length: int) -> Any:
    """The model, if it has positions for `length` tokens, in eval mode and without gradients."""
    positions = max_positions(model.config.get_text_config())
    if positions is not None and length > positions:
        raise InvalidArgument(
            f"max_prompt_tokens + max_new_tokens = {length} tokens; allowed: at most {positions}, "
            f"the {role}'s positions."
        )
    return model.eval().requires_grad_(False)


def _tokenizer(source: Any, trust_remote_code: bool) -> Any:
    """A tokenizer object, or the one at a hub id or directory; None for a model object, which
    brings none."""
    if not isinstance(source, (str, Path)):
        return source if hasattr(source, "get_vocab") else None
    tokenizer = load_tokenizer(source, trust_remote_code)
    if len(tokenizer.get_vocab()) <= len(
        set(tokenizer.all_special_ids)
    ):  # what some families make up without files
        raise ModelError(
            f"{str(source)!r} brings no tokenizer; give the policy's as tokenizer=, the reward "
            f"model's as reward_tokenizer="
        )
    return tokenizer


def _own_tokenizer(source: Any, role: str, trust_remote_code: bool) -> Any:
    """The tokenizer saved with a model; None, with a warning, where there is none."""
    try:
        return _tokenizer(source, trust_remote_code)
    except ModelError as error:
        logger.warning("the %s is taken to read the model's token ids: %s", role, error)
        return None


def _check_tokens(tokenizer: Any, source: Any, role: str, trust_remote_code: bool) -> None:
    """Raises `ModelError` if another model's own tokenizer has other tokens than the policy's."""
    own = None if tokenizer is None else _own_tokenizer(source, role, trust_remote_code)
    if own is not None:
        check_same_tokens(tokenizer, own, role)


def _stop_ids(model: Any, tokenizer: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    """The ids given, or all that end a text for the generation config, the config, the tokenizer or
    its chat template.

    They often disagree, and a policy may have learned any of them: a chat that ends in another
    never stops.
    """
    if given is not None:
        return _token_ids("stop_token_ids", given, model, least=1)
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    named = [getattr(source, "eos_token_id", None) for source in sources] + [end_of_turn(tokenizer)]
    each = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named]
    found = dict.fromkeys(
        token
        for ids in each
        for token in ids
        if token is not None and 0 <= token < vocab_size_of(model)
    )
    if not found:
        raise InvalidArgument(
            "the model names no end-of-text id; give the ids that end a text as stop_token_ids=."
        )
    return tuple(found)


def _token_ids(
    argument: str, given: int | Sequence[int], model: Any, least: int = 0
) -> tuple[int, ...]:
    """The ids, at least so many, if the model has all of them."""
    ids, last = (given,) if isinstance(given, int) else tuple(given), vocab_size_of(model) - 1
    if len(ids) < least or not all(
        isinstance(token, (int, np.integer)) and 0 <= token <= last for token in ids
    ):
        raise InvalidArgument(
            f"{argument}={ids}; allowed: {least} or more of the model's token ids, 0 to {last}."
        )
    return ids
