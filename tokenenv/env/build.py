"""How an env is built from its task and its options."""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from tokenenv.env.config import EnvConfig
from tokenenv.env.engine import RewardEngine
from tokenenv.env.frozen_dtype import with_frozen_dtype
from tokenenv.env.given_models import GIVEN_MODELS, with_given_models
from tokenenv.env.render import RENDER_MODES
from tokenenv.errors import InvalidArgument, check_choice, check_given
from tokenenv.models.loading import check_device, max_positions
from tokenenv.models.prefix_scores import is_scorer
from tokenenv.models.trunks import hidden_size_of, vocab_size_of
from tokenenv.plugins import load_name
from tokenenv.rewards.designs import make_terms
from tokenenv.rewards.kl import PolicyKL, ReferenceKL
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.term import KINDS, Context, RewardTerm
from tokenenv.rewards.terminal import MissingEOS
from tokenenv.types import Scorer, Task, TokenSpec

NO_REWARD = (
    "this env has no reward_model= and no reward=, so it pays nothing but the KL term; give "
    "reward_model=, or a function of prompt and response as reward=, or reward={} if that is meant."
)

TaskSource = str | Task | Callable[..., Task]


def split_options(task: TaskSource, options: dict[str, Any]) -> tuple[EnvConfig, Task]:
    """Return an env's config and its task from the keywords given to the env; an unknown keyword is
    an error."""
    fields = {field.name for field in dataclasses.fields(EnvConfig)}
    # NumPy's numbers are as good as Python's, and are taken out here for all options at once.
    options = {
        key: value.item() if isinstance(value, np.generic) else value
        for key, value in options.items()
    }
    # A task that takes such a model itself, as TextGen-v0 does, is given it.
    own = _parameters(task)
    fields -= set(own) & set(GIVEN_MODELS)
    config = EnvConfig(**{key: value for key, value in options.items() if key in fields})
    shared = {"max_batch_tokens": config.max_batch_tokens}
    shared |= {} if config.max_new_tokens is None else {"max_new_tokens": config.max_new_tokens}
    others = {key: value for key, value in options.items() if key not in fields}
    built = _build_task(task, others | shared, fields)
    known = callable(built.gold) or isinstance(built.gold, Rule) or is_scorer(built.gold)
    if not known and built.gold not in (None, "score"):
        raise InvalidArgument(
            f"gold={built.gold!r} must be a function of (prompt, response); a name is not looked "
            "up; on the command line, give --gold module:function."
        )
    if len(built.columns) not in (0, len(built.prompts)):
        raise InvalidArgument(
            f"the task has {len(built.prompts)} prompts and {len(built.columns)} rows of columns; "
            "give one for each prompt, or none."
        )
    check_replies(built)
    built = with_max_new_tokens(built, config.max_new_tokens)
    if config.max_new_tokens is not None:
        check_room(built)
    built = with_given_models(built, config, options.get("dtype"))
    return config, with_beta(with_frozen_dtype(built, config.frozen_dtype), config)


def check_replies(task: Task) -> None:
    """Raise `InvalidArgument` unless what the task says of its replies fits together."""
    ends, context, vocab_size = (
        task.turn_end_token_ids,
        task.max_context_tokens,
        vocab_size_of(task.model or task.reference),
    )
    if task.respond is None:
        if ends is not None or context is not None:
            raise InvalidArgument(
                "turn_end_token_ids and max_context_tokens are of no use without respond."
            )
        return
    if not callable(task.respond):
        raise InvalidArgument(f"respond={task.respond!r} must be a function of a TextSoFar.")
    if ends is not None and not (ends and all(0 <= token < vocab_size for token in ends)):
        raise InvalidArgument(
            f"turn_end_token_ids={ends} must be token ids, 0 to {vocab_size - 1}, at least one; "
            "None asks after every token."
        )
    if context is not None and context <= task.max_prompt_tokens:
        raise InvalidArgument(
            f"max_context_tokens={context} must be more than "
            f"max_prompt_tokens={task.max_prompt_tokens}."
        )


def with_max_new_tokens(task: Task, max_new_tokens: int | None) -> Task:
    """Return the task with texts of at most so many tokens; None leaves it as it is. Raises
    `InvalidArgument` where the task has an oracle, which was made for its own number."""
    if max_new_tokens in (None, task.max_new_tokens):
        return task
    if task.oracle is not None:
        raise InvalidArgument(
            f"max_new_tokens={max_new_tokens}: this task has an oracle, which was made for "
            f"{task.max_new_tokens} tokens; give "
            "max_new_tokens to the function that makes the task."
        )
    return dataclasses.replace(task, max_new_tokens=max_new_tokens)


def check_room(task: Task) -> None:
    """Raise `InvalidArgument` where a model of the task has fewer positions than its texts may have
    tokens. Where the environment writes into texts, the task says how long they may become."""
    if task.max_context_tokens is not None:
        return
    models = {
        "model": task.model,
        "reference": task.reference,
        "implicit model": task.implicit_model,
        "teacher": task.teacher,
    }
    scorers = {"scorer": task.scorer, "gold scorer": task.gold, "step scorer": task.step_scorer}
    models |= {role: one.model for role, one in scorers.items() if isinstance(one, Scorer)}
    for role, model in models.items():
        config = getattr(model, "config", None)  # models of one's own have none
        positions = max_positions(config.get_text_config()) if config is not None else None
        if positions is not None and task.max_prompt_tokens + task.max_new_tokens > positions:
            raise InvalidArgument(
                f"max_new_tokens={task.max_new_tokens}: the {role} has {positions} positions, and "
                f"prompts have up to {task.max_prompt_tokens} tokens; allowed: at most "
                f"{positions - task.max_prompt_tokens}."
            )


def with_beta(task: Task, config: EnvConfig) -> Task:
    """Return the task with the teacher for the env's beta, where the teacher depends on it."""
    if not hasattr(task.teacher, "at_beta"):
        return task
    # Under kl="none" too: agents may then pay for the KL in their losses.
    return dataclasses.replace(task, teacher=task.teacher.at_beta(beta_of(task, config)))


def beta_of(task: Task, config: EnvConfig) -> float:
    """Return beta at the env's construction, reward per nat."""
    return task.kl_coef if config.kl_coef is None else config.kl_coef


def token_spec_of(task: Task, score_truncated: bool) -> TokenSpec:
    """Return what agents may know of the task. Where the tokenizer has no pad id, or one that the
    model lacks (an added [PAD]), a stop id is the pad."""
    pad, vocab_size = (
        getattr(task.tokenizer, "pad_token_id", None),
        vocab_size_of(task.model or task.reference),
    )
    stand_in = next(iter(task.stop_token_ids), 0)
    return TokenSpec(
        tokenizer=task.tokenizer,
        vocab_size=vocab_size,
        pad_token_id=pad if pad is not None and 0 <= pad < vocab_size else stand_in,
        stop_token_ids=tuple(task.stop_token_ids),
        max_prompt_tokens=task.max_prompt_tokens,
        max_prompt_tokens_from=task.max_prompt_tokens_from,
        max_new_tokens=task.max_new_tokens,
        score_truncated=score_truncated,
        chats=task.chats,
        max_context_tokens=task.max_context_tokens,
        responds=task.respond is not None,
        turn_end_token_ids=task.turn_end_token_ids,
    )


def watched_terms(config: EnvConfig, terms: Mapping[str, RewardTerm]) -> dict[str, RewardTerm]:
    """Return the terms of `watch=` by name; none may be called like one of the reward's `terms`."""
    if config.watch is None:
        return {}
    given = config.watch if isinstance(config.watch, Mapping) else {}
    for name, value in given.items():
        if isinstance(value, tuple):
            raise InvalidArgument(
                f"watch= gives a weight at {name!r}; what is watched has none: give the term alone."
            )
    try:
        watched = make_terms(config.watch)
    except InvalidArgument as error:
        # What is checked is as of reward=; the message names the option that was given.
        raise InvalidArgument(str(error).replace("reward=", "watch=")) from error
    for name in watched:
        if name in terms:
            raise InvalidArgument(
                f"watch= has a term called {name!r}, as reward= has; give a mapping with another "
                "name."
            )
    return watched


def all_terms(task: Task, config: EnvConfig) -> dict[str, RewardTerm]:
    """Return the terms of `reward=`, the KL term and the missing-EOS penalty, by name."""
    if config.reward is None and not task.reward:
        warnings.warn(NO_REWARD, UserWarning, stacklevel=2)
    terms = make_terms(task.reward if config.reward is None else config.reward)
    if config.missing_eos_penalty:
        terms["missing_eos"] = MissingEOS()
        terms["missing_eos"].weight = config.missing_eos_penalty
    if config.kl == "reference":
        terms["kl"] = ReferenceKL()
    elif config.kl == "policy":
        terms["kl"] = PolicyKL(config.kl_estimator, config.kl_clamp)
    return terms


def check_terms(
    terms: Mapping[str, RewardTerm], watched: Mapping[str, RewardTerm], config: EnvConfig
) -> None:
    """Raise `InvalidArgument` unless every term is of a kind that is known, and that actions carry
    what it reads."""
    for name, term in {**terms, **watched}.items():
        check_choice(f"the term {name!r}: kind", term.kind, KINDS)
        if term.kind == "policy" and config.kl != "policy":
            kind = "watched" if name in watched else "reward"
            raise InvalidArgument(
                f"{kind} term {name!r} reads log pi, which actions carry only with kl='policy', "
                f"not {config.kl!r}."
            )


def single_spaces(
    task: Task, spec: TokenSpec, config: EnvConfig
) -> tuple[spaces.Space, spaces.Space]:
    """Return the observation and the action space of one text."""
    length = spec.max_length
    observation: spaces.Space
    if config.observation == "features":
        size = task.num_features if task.features is not None else hidden_size_of(task.reference)
        observation = spaces.Box(-math.inf, math.inf, (size,), np.float32)
    else:
        own: dict[str, Any] = {"own_mask": spaces.MultiBinary(length)} if spec.responds else {}
        observation = spaces.Dict(
            tokens=spaces.Box(0, spec.vocab_size - 1, (length,), np.int64),
            length=spaces.Discrete(length + 1),
            prompt_length=spaces.Discrete(length + 1),
            **own,
        )
    token = spaces.Discrete(spec.vocab_size)
    if config.kl != "policy":
        return observation, token
    return observation, spaces.Dict(token=token, logprob=spaces.Box(-math.inf, 0.0, (), np.float32))


def make_engine(task: Task, spec: TokenSpec, config: EnvConfig, num_envs: int) -> RewardEngine:
    """Return the engine: the models and reward terms of `num_envs` texts."""
    context = Context(
        spec=spec,
        task=task,
        device=torch.device((task.model or task.reference).device),
        kl_coef=0.0 if config.kl == "none" else beta_of(task, config),
        max_batch_tokens=config.max_batch_tokens,
    )
    terms = all_terms(task, config)
    watched = watched_terms(config, terms)
    check_terms(terms, watched, config)
    options = {"max_batch_tokens": config.max_batch_tokens, "compile": config.compile}
    return RewardEngine(context, terms, num_envs, watched, **options)


def check_arguments(render_mode: str | None, max_episode_steps: int | None) -> None:
    """Raise on constructor arguments of Gymnasium's that this env does not take."""
    if max_episode_steps is not None:
        raise InvalidArgument(
            f"max_episode_steps={max_episode_steps} is not taken: a time limit from outside cuts a "
            f"text without its "
            "score. Use max_new_tokens."
        )
    if render_mode is not None:
        check_choice("render_mode", render_mode, RENDER_MODES)


def check_num_envs(num_envs: int, config: EnvConfig) -> int:
    """Return N as an int; raise unless there is at least one env and the groups fit."""
    if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
        raise InvalidArgument(f"num_envs={num_envs!r} must be a whole number, 1 or more.")
    if num_envs % config.group_size:
        raise InvalidArgument(f"group_size={config.group_size} must divide num_envs={num_envs}.")
    return int(num_envs)


def _build_task(source: TaskSource, options: dict[str, Any], env_options: set[str]) -> Task:
    task, parameters = _loaded(source), _parameters(source)
    known = set(parameters)
    for key in options:
        check_choice("option", key, known | env_options)
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in options
    ]
    check_given(missing)
    if options.get("device") is None:  # the task's own
        known -= {"device"}
    else:
        check_device(options["device"])
    if isinstance(task, Task):
        return task
    built = task(**{key: value for key, value in options.items() if key in known})
    if not isinstance(built, Task):
        raise InvalidArgument(
            f"the task's function returned {type(built).__name__}; it must return a tokenenv.Task."
        )
    return built


def _loaded(source: TaskSource) -> Task | Callable[..., Task]:
    return load_task(source) if isinstance(source, str) else source


def _parameters(source: TaskSource) -> Mapping[str, inspect.Parameter]:
    """The parameters of the function that makes a task; none where the task is made already."""
    task = _loaded(source)
    return {} if isinstance(task, Task) else inspect.signature(task).parameters


def load_task(name: str) -> Callable[..., Task]:
    """Return the task function that "module:function" names. That is code, which no file may name
    (`tokenenv.safety.trust`)."""
    label = f"task={name!r}"
    found = load_name(name, label)
    if not callable(found) or isinstance(found, type):
        what = found.__name__ if isinstance(found, type) else f"of type {type(found).__name__}"
        raise InvalidArgument(f"{label} is {what}; it must be a function that returns a Task.")
    return found
