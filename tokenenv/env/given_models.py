"""Models that an env is given in place of those that its task has."""

from dataclasses import replace
from typing import Any

import torch

from tokenenv.env.config import EnvConfig
from tokenenv.models.own_models import Lengths, Loaded, Policy, load_language_model, load_scorer
from tokenenv.types import Scorer, Task

GIVEN_MODELS = ("reward_model", "implicit_model", "teacher")
"""The options of every env that name a model."""


def with_given_models(task: Task, config: EnvConfig, dtype: Any) -> Task:
    """Return the task with the models that `config` names, each checked against the task's tokens.

    Where a reward model scores in place of a scorer that was the truth, that scorer still gives the
    gold metric.

    Args:
        task: as its function made it.
        config: the env's.
        dtype: the data type in which models are loaded; None: float32.

    Raises:
        ModelError: a model cannot be loaded, or does not fit the task's tokens.
        InvalidArgument: a model has too few positions for the task's texts.
    """
    given = {name: getattr(config, name) for name in GIVEN_MODELS}
    if all(source is None for source in given.values()):
        return task
    policy = _policy(task, dtype)
    have = (policy.model, task.reference, task.implicit_model, task.teacher)
    known: Loaded = [(model, None, model) for model in have if model is not None]
    changes = {
        name: load_language_model(given[name], name, policy, known)
        for name in ("implicit_model", "teacher")
        if given[name] is not None
    }
    source = given["reward_model"]
    if source is None:
        return replace(task, **changes)
    if isinstance(source, Scorer):
        scorer: Any = source
    else:
        scorer = load_scorer(source, None, policy, config.max_batch_tokens)
    if task.gold == "score":
        changes["gold"] = task.scorer
    return replace(task, scorer=scorer, **changes)


def _policy(task: Task, dtype: Any) -> Policy:
    """What further models have to fit: the policy's tokens, and the lengths of the texts."""
    model = task.reference if task.model is None else task.model
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    longest = task.max_new_tokens
    if task.max_context_tokens is not None:
        longest = task.max_context_tokens - task.max_prompt_tokens
    return Policy(
        model=model,
        tokenizer=task.tokenizer,
        chats=task.chats,
        stop_token_ids=tuple(task.stop_token_ids),
        lengths=Lengths(task.max_prompt_tokens, task.max_prompt_tokens, longest),
        loading={
            "device": model.device,
            "dtype": dtype,
            "attn_implementation": None,
            "trust_remote_code": False,
        },
        revisions={},
    )
