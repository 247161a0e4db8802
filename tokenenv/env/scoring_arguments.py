"""Reading and checking what `score_episodes` is given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenenv.env.actions import LOGPROB_SLACK
from tokenenv.env.engine import RewardEngine
from tokenenv.env.reset_options import read_own
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.prompts import read_continuation, read_prompt
from tokenenv.types import TokenSpec


def read_texts(
    prompts: Sequence[Any], responses: Sequence[Any], spec: TokenSpec
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of as many prompts and responses."""
    for key, texts in (("prompts", prompts), ("responses", responses)):
        if isinstance(texts, str):
            raise InvalidArgument(
                f"{key}={texts!r} is one text; give a list of texts or of token id sequences."
            )
        _check_listed(key, texts)
    if len(prompts) != len(responses) or not len(prompts):
        raise InvalidArgument(
            f"got {len(prompts)} prompts and {len(responses)} responses; allowed: as many, at "
            f"least one."
        )
    prompt_ids = [read_prompt(text, spec, f"prompts[{i}]") for i, text in enumerate(prompts)]
    response_ids = [
        read_continuation(text, spec, f"responses[{i}]") for i, text in enumerate(responses)
    ]
    return prompt_ids, response_ids


def _check_listed(key: str, values: Any) -> None:
    """Raises unless `values` is something like a list."""
    listed = (
        hasattr(values, "__len__")
        and hasattr(values, "__getitem__")
        and not isinstance(values, str | Mapping)
    )
    if not listed or getattr(values, "ndim", 1) == 0:
        raise InvalidArgument(f"{key}={values!r} is not allowed; it must be a list.")


def read_own_masks(
    own: Sequence[Sequence[bool]] | None, responses: list[list[int]], spec: TokenSpec
) -> list[list[bool]] | None:
    """Return for each response which of its tokens are the policy's; None where all are."""
    if own is None:
        return None
    if not spec.responds:
        raise InvalidArgument(
            "own= is given, and in this env the policy alone writes; leave it out."
        )
    _check_listed("own", own)
    if len(own) != len(responses):
        raise InvalidArgument(
            f"own has {len(own)} entries; allowed: one a text ({len(responses)})."
        )
    pairs = zip(own, responses, strict=True)
    return [read_own(mask, len(ids), f"own[{i}]") for i, (mask, ids) in enumerate(pairs)]


def _check_response(ids: list[int], steps: int, spec: TokenSpec, label: str) -> None:
    """Raises unless stepping could have written it, with `steps` tokens of the policy's."""
    if not 1 <= steps <= spec.max_new_tokens:
        raise InvalidArgument(
            f"{label} has {steps} tokens{' of the policy' if spec.responds else ''}; allowed: 1 to "
            f"max_new_tokens={spec.max_new_tokens}."
        )
    place = next((t for t, token in enumerate(ids[:-1]) if token in spec.stop_token_ids), None)
    if place is not None and not spec.responds:
        raise InvalidArgument(
            f"{label} holds the stop token {ids[place]} as number {place + 1} of its {len(ids)} "
            f"tokens; "
            "allowed: as its last alone."
        )


def check_texts(
    prompts: list[list[int]], responses: list[list[int]], steps: list[int], spec: TokenSpec
) -> None:
    """Raise `InvalidArgument` unless stepping could have written the responses, with so many tokens
    of the policy's each."""
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        _check_response(response, steps[i], spec, f"responses[{i}]")
        if len(prompt) + len(response) > spec.max_length:
            raise InvalidArgument(
                f"prompts[{i}] and responses[{i}] have {len(prompt) + len(response)} tokens "
                f"together; allowed: at most {spec.max_length}."
            )


def read_weights(
    now: dict[str, float],
    weights: Mapping[str, float | Sequence[float]] | None,
    kl_coef: float | Sequence[float] | None,
    kl: str,
) -> dict[str, Any]:
    """Return the weight of each term for texts to score: the given ones, or those of `now`. `kl` is
    the env's option."""
    if kl_coef is not None and kl == "none":
        raise InvalidArgument(
            f"kl_coef={kl_coef} has no term to weigh: this env was made with kl='none'."
        )
    weights = {} if weights is None else weights
    if not isinstance(weights, Mapping):
        raise InvalidArgument(
            f"weights={weights!r} is not allowed; it must map names of terms to weights."
        )
    for name in weights:
        check_choice("weights key", name, now)
    chosen: dict[str, Any] = {**now, **({} if kl_coef is None else {"kl": kl_coef}), **weights}
    return {name: chosen[name] for name in now}


def read_weight(name: str, weight: float | Sequence[float], count: int) -> np.ndarray:
    """Return a term's weight for each text, (B,) float32."""
    try:
        array = np.asarray(weight, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"the weight of {name!r} is {weight!r}; allowed: a number, or one a text ({count})."
        ) from error
    if array.shape not in ((), (count,)):
        raise InvalidArgument(
            f"the weight of {name!r} has shape {array.shape}; allowed: a number, or one a text "
            f"({count})."
        )
    if not np.isfinite(array).all() or (name == "kl" and (array < 0).any()):
        allowed = (
            "kl_coef=) must be finite and 0 or more" if name == "kl" else "weights=) must be finite"
        )
        raise InvalidArgument(f"the weight of {name!r} is {array.tolist()}; it ({allowed}.")
    return np.broadcast_to(array, count).copy()


def read_truncated(
    truncated: Sequence[bool] | None,
    responses: list[list[int]],
    masks: list[list[bool]] | None,
    spec: TokenSpec,
) -> np.ndarray:
    """Return which texts count as cut, (B,) bool; `masks` say whose tokens those of the responses
    are."""
    stopped = np.asarray([response[-1] in spec.stop_token_ids for response in responses])
    if masks is not None:
        stopped &= np.asarray([mask[-1] for mask in masks])
    if truncated is None:
        return ~stopped
    _check_listed("truncated", truncated)
    if len(truncated) != len(responses):
        raise InvalidArgument(
            f"truncated has {len(truncated)} entries; allowed: one a text ({len(responses)})."
        )
    cut = np.asarray(truncated, dtype=bool)
    # A stop token that the environment would have answered, had there been room, ends no text.
    for i in np.flatnonzero(cut & stopped & (not spec.responds)):
        raise InvalidArgument(
            f"truncated[{i}]=True, but responses[{i}] ends by itself, in the stop token "
            f"{responses[i][-1]}."
        )
    return cut


def read_turn_rewards(
    engine: RewardEngine, turn_rewards: Any, steps: list[int]
) -> list[np.ndarray] | None:
    """Return the task's rewards of turns, one number a token of the policy's; None where they are
    not given."""
    if turn_rewards is None:
        return None
    if not engine.context.spec.responds:
        raise InvalidArgument(
            "turn_rewards= is given, and in this env the policy alone writes; leave it out."
        )
    rows = _numbers("turn_rewards", turn_rewards, steps)
    for i, values in enumerate(rows):
        if not np.isfinite(values).all():
            raise InvalidArgument(f"turn_rewards[{i}] holds a number that is not finite.")
    return rows


def _numbers(key: str, values: Any, steps: list[int]) -> list[np.ndarray]:
    """Return one array of float32 for each text, with a number for each of its `steps` tokens."""
    _check_listed(key, values)
    try:
        rows = [np.asarray(row, np.float32) for row in values]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{key}={values!r} is not allowed; it must hold numbers.") from error
    if [row.shape for row in rows] != [(count,) for count in steps]:
        raise InvalidArgument(f"{key} must hold one number for every response token of every text.")
    return rows


def check_logprobs(engine: RewardEngine, logprobs: Any, steps: list[int]) -> None:
    """Raise `InvalidArgument` unless there is a log-prob for each token of the policy's, where a
    term reads them."""
    both = engine.rewards.terms | engine.rewards.watched
    policy_terms = [name for name, term in both.items() if term.kind == "policy"]
    if logprobs is None:
        if policy_terms:
            raise InvalidArgument(
                f"logprobs is missing; {policy_terms} need log pi of every response token (nats)."
            )
        return
    rows = _numbers("logprobs", logprobs, steps)
    for i, values in enumerate(rows):
        if not (np.isfinite(values) & (values <= LOGPROB_SLACK)).all():
            raise InvalidArgument(
                f"logprobs[{i}] holds a number that is not finite or above 0; allowed: 0 or less "
                f"(nats)."
            )
