"""TextGen-v0: bring your own model, reward model and prompts.

## Description

Any causal language model of transformers continues any prompts: a hub id, a local directory or a
model object. What a text is worth is said by a reward model, by a Python rule, or by both.

```python
envs = gym.make_vec(
    "tokenenv/TextGen-v0",
    num_envs=16,
    model="Qwen/Qwen3-0.6B",
    prompts="prompts.jsonl",
    reward_model="path/to/reward-model",
)
```

`docs/your-model.md` goes through it step by step.

## Observation Space

`Dict(tokens=Box(0, V - 1, (P + T,), int64), length=Discrete(P + T + 1), prompt_length=Discrete(P +
T + 1))`: the prompt and the response so far, padded on the right. P is the length of the longest
prompt in tokens, after the chat template and with special tokens, or `max_prompt_tokens`. T is
`max_new_tokens`, 128 by default. With `observation="features"` it is the reference's last hidden
state, `Box(-inf, inf, (H,), float32)`.

## Action Space

`Discrete(V)`: the next token, where V is the number of token ids of `model`.

## Rewards

The design follows from what is given: "token" for a token-classification reward model, "terminal"
for a sequence-classification one, "implicit" for an `implicit_model` alone. `reward=` chooses
another design or a rule. With none of these the env pays only the KL term, and warns. A causal
reward model that reads the policy's tokens scores every prefix. One with other tokens, or one that
looks ahead, scores finished texts. To the reward the env adds the KL term with `kl_coef=0.05`.
`infos["gold"]` is what `gold=` returns, where it is given.

## Starting State

A prompt drawn uniformly from `prompts`.

## Episode End

A text ends with any of `stop_token_ids` (by default every id that the generation config, the
config, the tokenizer or its chat template names as the end of a text), or is cut after T tokens.

## Arguments

`model` and `prompts` are required. All arguments are described at the function
`tokenenv.envs.textgen.task` below; the options that every environment takes are the fields of
`tokenenv.env.config.EnvConfig`.

## Version History

* v0: initial version.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tokenenv.errors import InvalidArgument, check_given
from tokenenv.models.chats import Chats, end_of_turn
from tokenenv.models.loading import as_dtype, check_device, load_causal_lm
from tokenenv.models.own_models import (
    Lengths,
    Loaded,
    Policy,
    check_sources,
    frozen,
    load_language_model,
    load_scorer,
    read_tokenizer,
    revisions_of,
    token_ids,
)
from tokenenv.models.trunks import vocab_size_of
from tokenenv.prompts import check_limit, load_prompts
from tokenenv.rewards.rule import Rule
from tokenenv.tables import read_rows
from tokenenv.types import Scorer, Task, TextScorer

NEEDED: Any = inspect.Parameter.empty
"""The default of an argument that has to be given. `inspect` takes it for no default, and the task
says in a sentence what is missing."""


def task(
    *,
    model: Any = NEEDED,
    prompts: Any = NEEDED,
    reward_model: Any = None,
    reward_tokenizer: Any = None,
    reference: Any = None,
    implicit_model: Any = None,
    tokenizer: Any = None,
    revision: str | Mapping[str, str] | None = None,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 128,
    long_prompts: str = "refuse",
    chat_template: bool = False,
    prompt_column: str = "prompt",
    stop_token_ids: Sequence[int] | None = None,
    step_end_token_ids: Sequence[int] = (),
    gold: Callable[..., Any] | Rule | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    max_batch_tokens: int = 16384,
) -> Task:
    """Make the task of the user's own models on the user's own prompts.

    Args:
        model: the policy's initial weights: a hub id, a local directory (safetensors), or a model
            object, which is frozen in place.
        prompts: texts or token ids in a list, a table (a list of mappings, a `datasets` dataset,
            or a .jsonl, .json, .csv, .tsv or .parquet file) or a text file of one prompt a line
            (see `tokenenv.tables.read_rows`). A table's other columns go to the functions of
            `reward=` and `gold=` that name them. All rows are read when the env is made, those of a
            streamed dataset too.
        reward_model: a sequence- or token-classification model with one label, as a hub id, a
            directory or an object. A causal one that reads the policy's tokens scores every prefix;
            any other scores finished texts (see `make_aligned_scorer`). Also a `TextScorer` of the
            user's own, or the URL of a vLLM server (a `VLLMRewardModel`, which scores tokens by the
            policy's ids); both score finished texts.
        reward_tokenizer: the reward model's tokenizer, as a hub id, a directory or an object; by
            default the one saved with it. A reward model that brings none must have as many token
            ids as the policy.
        reference: pi_ref, as a hub id, a directory, a model object or a `TokenModel`; by default
            the policy's initial weights, which are then run once for both. Also the URL of a vLLM
            server, which scores whole texts only (a `VLLMReference`).
        implicit_model: a preference-tuned causal language model with the policy's tokens, for
            reward="implicit"; given as `reference` is.
        tokenizer: the policy's tokenizer, as a hub id, a directory or an object; by default the one
            saved with the model. A model object brings none, and without a tokenizer prompts are
            token ids.
        revision: a branch, a tag or a commit of the hub id `model`, for its tokenizer too and for
            whatever else names the same id. Other arguments get theirs in a mapping from their
            names, {"model": "v1.0", "reward_model": "refs/pr/2"}; a name that is left out has the
            default branch.
        max_prompt_tokens: P, the most tokens that a prompt may have, 1 or more. None, the default,
            takes the length of the longest prompt, special tokens and chat template included. Give
            a number where longer prompts will come later, to `reset` or `score_episodes`.
        max_new_tokens: T, the most tokens that a response may have, 1 or more.
        long_prompts: "refuse" prompts of more than `max_prompt_tokens` tokens, or "truncate" them,
            which needs `max_prompt_tokens`. Truncating keeps special tokens at the beginning and
            the last tokens; of a chat it keeps what the template writes around the longest message,
            and the end of that message. Prompts that come later are always refused if too long.
        chat_template: whether the tokenizer's chat template writes the prompts. A prompt that is a
            text is then one message of the user's, and a list of messages is taken too. The same
            holds for prompts given to `reset`, `score_episodes` and `generate`; token ids are taken
            as they are. A reward model whose tokenizer has another template reads the conversation
            by that one.
        prompt_column: the column of a table that holds the prompt.
        stop_token_ids: ids that end a text; by default the end-of-text ids of the generation
            config, of the config and of the tokenizer together, and the token that closes an answer
            in the tokenizer's chat template.
        step_end_token_ids: ids that end a step of the text, for designs that pay by step.
        gold: gold(prompt_text, response_text), the true metric, which also gets the columns that
            it names, as the function of a `Rule` does; it is reported for evaluation and never
            paid.
        device: where all models are put; by default where a model object is, else "cpu".
        dtype: "float32", "bfloat16" or "float16"; by default float32, and model objects keep
            theirs.
        attn_implementation: transformers' name of an attention implementation; None lets
            transformers choose.
        trust_remote_code: whether code that comes with a model or tokenizer may run.
        max_batch_tokens: the most tokens, padding included, of one forward over finished texts.

    Raises:
        ModelError: a model or tokenizer cannot be loaded, lacks a head, or does not fit the others.
        InvalidArgument: a prompt cannot be used, an argument is not allowed, or texts would be
            longer than a model's positions.
    """
    # Whatever can be refused is refused before any model is loaded, which may take minutes.
    needed = {"model": model, "prompts": prompts}
    check_given([name for name, given in needed.items() if given is None or given is NEEDED])
    check_limit(max_prompt_tokens, long_prompts)
    if device is not None:
        check_device(device)
    sources = {
        "model": model,
        "tokenizer": model if tokenizer is None else tokenizer,
        "reference": reference,
        "implicit_model": implicit_model,
        "reward_model": reward_model,
        "reward_tokenizer": reward_tokenizer,
    }
    loading: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "device": device,
        "dtype": as_dtype(dtype),
    }
    revisions = revisions_of(revision, sources)
    check_sources(sources, revisions)
    policy_model = load_causal_lm(model, revision=revisions.get("model"), **loading)
    tokenizer = read_tokenizer(
        *((model, "model") if tokenizer is None else (tokenizer, "tokenizer")),
        revisions.get("tokenizer"),
        trust_remote_code,
    )
    _require_tokenizer(tokenizer, {"gold": gold, "reward_tokenizer": reward_tokenizer})
    chats = Chats(tokenizer) if chat_template else None
    # The prompts are read before more models are loaded.
    rows = read_rows(prompts, prompt_column)
    ids = load_prompts(
        rows,
        tokenizer,
        vocab_size=vocab_size_of(policy_model),
        max_prompt_tokens=max_prompt_tokens,
        long_prompts=long_prompts,
        chat_template=chats or False,
    )
    longest = max(map(len, ids))
    policy = Policy(
        model=policy_model,
        tokenizer=tokenizer,
        chats=chats,
        stop_token_ids=_stop_ids(policy_model, tokenizer, stop_token_ids),
        lengths=Lengths(longest, max_prompt_tokens or longest, max_new_tokens),
        loading=loading | {"device": device or policy_model.device},
        revisions=revisions,
    )
    frozen(policy_model, "model", policy.lengths)
    known: Loaded = [(model, revisions.get("model"), policy_model)]
    other_reference = load_language_model(reference, "reference", policy, known)
    implicit = load_language_model(implicit_model, "implicit_model", policy, known)
    scorer = load_scorer(reward_model, reward_tokenizer, policy, max_batch_tokens)
    pi_ref = policy_model if other_reference is None else other_reference
    return Task(
        tokenizer=tokenizer,
        chats=chats,
        reference=pi_ref,
        model=None if pi_ref is policy_model else policy_model,
        scorer=scorer,
        implicit_model=implicit,
        step_end_token_ids=token_ids("step_end_token_ids", step_end_token_ids, policy_model),
        reward=_default_reward(scorer, implicit),
        prompts=ids,
        columns=[row.columns for row in rows] if any(row.columns for row in rows) else (),
        max_prompt_tokens=policy.lengths.max_prompt_tokens,
        max_prompt_tokens_from="prompts" if max_prompt_tokens is None else "option",
        max_new_tokens=max_new_tokens,
        stop_token_ids=policy.stop_token_ids,
        gold=gold,
    )


def _require_tokenizer(tokenizer: Any, readers: Mapping[str, Any]) -> None:
    """Raises `InvalidArgument` where an argument reads texts and tokens have none."""
    for argument, given in readers.items():
        if given is not None and tokenizer is None:
            raise InvalidArgument(f"{argument}= reads texts; give a tokenizer= too.")


def _default_reward(
    scorer: Scorer | TextScorer | None, implicit_model: Any
) -> str | Mapping[str, Any]:
    """The design that needs no more than what was given; no design where nothing was."""
    if scorer is not None:
        return "token" if scorer.per_token else "terminal"
    return {} if implicit_model is None else "implicit"


def _stop_ids(model: Any, tokenizer: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    """The given ids; by default every id that the generation config, the config, the tokenizer or
    its chat template names as the end of a text.

    They often disagree, and a policy may have learned any of them: a chat whose end is not among
    them never stops.
    """
    if given is not None:
        return token_ids("stop_token_ids", given, model, least=1)
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    named = [getattr(source, "eos_token_id", None) for source in sources] + [end_of_turn(tokenizer)]
    each = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named]
    every = [token for ids in each for token in ids if token is not None]
    found = dict.fromkeys(token for token in every if 0 <= token < vocab_size_of(model))
    if not found:
        raise InvalidArgument(
            "the model names no end-of-text id; give the ids that end a text as stop_token_ids=."
        )
    return tuple(found)
