"""Whole texts, scored as stepping would have paid them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.actions import LOGPROB_SLACK
from tokenenv.env.engine import RewardEngine, in_eval_mode
from tokenenv.env.finite import require_finite_scores
from tokenenv.env.reset_options import read_own
from tokenenv.env.texts import to_device
from tokenenv.env.transitions import Ends, Walk
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.batching import micro_batches
from tokenenv.prompts import read_continuation, read_prompt
from tokenenv.rewards.seen import Transitions, WholeTexts
from tokenenv.tables import Columns, read_columns
from tokenenv.types import EpisodeScores, TokenSpec


@torch.no_grad()
@in_eval_mode
def score_episodes(
    engine: RewardEngine,
    prompts: Sequence[Any],
    responses: Sequence[Any],
    *,
    logprobs: Sequence[Sequence[float]] | None,
    truncated: Sequence[bool] | None,
    columns: Mapping[str, Sequence[Any]] | None,
    own: Sequence[Sequence[bool]] | None = None,
    turn_rewards: Sequence[Sequence[float]] | None = None,
    weights: Mapping[str, float | Sequence[float]],
    learning: bool = False,
) -> EpisodeScores:
    """Return the rewards (B, T) of B finished texts, from length-sorted parallel forwards; see
    `TokenVectorEnv.score_episodes`.

    With `learning`, terms with statistics take the texts in, but score all of them with those they
    had before.
    """
    spec = engine.context.spec
    prompt_ids, response_ids = _read_texts(prompts, responses, spec)
    masks = read_own_masks(own, response_ids, spec)
    steps = [sum(mask) for mask in masks] if masks else [len(ids) for ids in response_ids]
    for i, (ids, count) in enumerate(zip(response_ids, steps, strict=True)):
        _check_response(ids, count, spec, f"responses[{i}]")
    _check_context(prompt_ids, response_ids, spec)
    rows = read_columns(columns, range(len(prompt_ids)), len(prompt_ids), "columns")
    engine.require_columns(rows, "prompts to score (columns=)")
    cut = _read_truncated(truncated, response_ids, masks, spec)
    _check_logprobs(engine, logprobs, steps)
    turns = _read_turn_rewards(engine, turn_rewards, steps)
    each = {name: _read_weight(name, weight, len(prompt_ids)) for name, weight in weights.items()}
    out = _zeros(engine, steps)
    statistics = engine.rewards.statistics()
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]
    # Statistics were read once, above: with `learning` they change from one micro-batch to the
    # next, and all texts are scored with those that were there before.
    for group in micro_batches(lengths, engine.context.max_batch_tokens):
        begun, written = ([ids[i] for i in group] for ids in (prompt_ids, response_ids))
        by = [masks[i] for i in group] if masks else None
        texts = _pad(engine, begun, written, [rows[i] for i in group], by)
        known = {name: s.expand(len(group), -1) for name, s in statistics.items()}
        earned = None if turns is None else np.concatenate([turns[i] for i in group])
        walk = engine.dynamics.walk(texts, known, engine.trunks, earned)
        drawn = None if logprobs is None else [logprobs[i] for i in group]
        batch = _transitions(engine, texts, walk, cut[group], drawn, learning)
        now = {name: to_device(w[group], engine.context.device) for name, w in each.items()}
        _fill(out, group, engine, walk, batch, now)
        if out.gold is not None and engine.gold is not None:
            assert batch.finished is not None
            out.gold[group] = engine.gold.numbers(batch.finished, torch.device("cpu")).numpy()
    require_finite_scores(out)
    if engine.context.task.gold == "score":
        return replace(out, gold=None if out.score is None else out.score.copy())
    return out


def _zeros(engine: RewardEngine, steps: list[int]) -> EpisodeScores:
    """Zeros for texts of so many tokens of the policy's each."""
    count, width, rewards = len(steps), engine.context.spec.max_new_tokens, engine.rewards

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((count, *shape), np.float32)

    return EpisodeScores(
        token_rewards=zeros(width),
        step_rewards=zeros(width),
        terms={name: zeros(width) for name in rewards.terms},
        token_reward_terms={name: zeros(width) for name in rewards.terms},
        score=zeros() if engine.has_score else None,
        gold=None if engine.gold is None else zeros(),
        lengths=np.asarray(steps),
        ref_logprobs=zeros(width),
        potentials=zeros(width + 1) if rewards.shaped else None,
        watched={name: zeros(width) for name in rewards.watched},
    )


def _transitions(
    engine: RewardEngine,
    texts: WholeTexts,
    walk: Walk,
    cut: np.ndarray,
    logprobs: list[Sequence[float]] | None,
    learning: bool,
) -> Transitions:
    """What terms see of whole texts, of which those of `cut` (b,) were cut."""
    # On the host, where cuts are known: which token ends a text needs no copy from the device.
    cut_K = cut[walk.row]
    scored = walk.last if engine.context.spec.score_truncated else walk.last & ~cut_K
    ends = Ends(walk.last & ~cut_K, walk.last & cut_K, scored, walk.last)
    drawn = None
    if logprobs is not None:
        drawn = np.asarray([x for one in logprobs for x in one], dtype=np.float32)
    responds = engine.context.spec.responds
    return engine.dynamics.transitions(
        walk.tokens,
        walk.before,
        walk.after,
        ends,
        texts,
        next=walk.next,
        active=np.ones(len(walk.t), dtype=bool),
        learning=learning,
        logprob=None if drawn is None else to_device(drawn, engine.context.device),
        ends_turn=(walk.last if walk.ends_turn is None else walk.ends_turn) if responds else None,
    )


def _fill(
    out: EpisodeScores,
    group: np.ndarray,
    engine: RewardEngine,
    walk: Walk,
    batch: Transitions,
    weights: dict[str, Tensor],
) -> None:
    """Take in what a micro-batch, the texts `group` (b,), has earned; `weights` are (b,)."""
    rewards, texts = engine.rewards, batch.finished
    assert texts is not None
    assert batch.ref_logprob is not None
    row, t = (to_device(index, engine.context.device) for index in (walk.row, walk.t))
    steps = texts.steps()
    last = to_device(steps - 1, engine.context.device)
    zeros = torch.zeros(
        len(group), out.token_rewards.shape[1], dtype=torch.float32, device=row.device
    )

    def at_tokens(values: Tensor) -> np.ndarray:
        return zeros.index_put((row, t), values).cpu().numpy()

    each = {name: weight[row] for name, weight in weights.items()}
    placed = {name: at_tokens(values) for name, values in rewards.paid(batch, each).items()}
    paid = dict(placed)
    for name, values in rewards.placed(texts, weights).items():
        placed[name] = values.cpu().numpy()
        # A hindsight term is placed on all tokens, and paid at the last one.
        paid[name] = zeros.scatter(1, last[:, None], values.sum(1, keepdim=True)).cpu().numpy()
    for name in rewards.names:
        if name in rewards.watched:
            out.watched[name][group] = placed[name]
            continue
        out.terms[name][group], out.token_reward_terms[name][group] = paid[name], placed[name]
        # Terms are added in the order in which a step adds them, so that rounding is the same.
        out.step_rewards[group] += paid[name]
        out.token_rewards[group] += placed[name]
    out.ref_logprobs[group] = at_tokens(batch.ref_logprob)
    if out.score is not None and texts.score is not None:
        out.score[group] = texts.score.float().cpu().numpy()
    before, next = (rewards.potential(states, each) for states in (batch.before, batch.next))
    if out.potentials is not None and before is not None and next is not None:
        assert batch.finished_at is not None
        out.potentials[group, :-1] = at_tokens(before)
        # Phi of the last state, which is zero where the text is scored.
        end = torch.where(batch.scored, 0.0, next)[batch.finished_at]
        out.potentials[group, steps] = end.cpu().numpy()


def _read_texts(
    prompts: Sequence[Any], responses: Sequence[Any], spec: TokenSpec
) -> tuple[list[list[int]], list[list[int]]]:
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


def _check_context(prompts: list[list[int]], responses: list[list[int]], spec: TokenSpec) -> None:
    """Raises where a text has more tokens than the context."""
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
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


def _read_weight(name: str, weight: float | Sequence[float], count: int) -> np.ndarray:
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


def _read_truncated(
    truncated: Sequence[bool] | None,
    responses: list[list[int]],
    masks: list[list[bool]] | None,
    spec: TokenSpec,
) -> np.ndarray:
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


def _read_turn_rewards(
    engine: RewardEngine, turn_rewards: Any, steps: list[int]
) -> list[np.ndarray] | None:
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


def _check_logprobs(engine: RewardEngine, logprobs: Any, steps: list[int]) -> None:
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


def _pad(
    engine: RewardEngine,
    prompts: list[list[int]],
    responses: list[list[int]],
    columns: list[Columns],
    own: list[list[bool]] | None,
) -> WholeTexts:
    ids = [np.asarray([*p, *r], dtype=np.int64) for p, r in zip(prompts, responses, strict=True)]
    tokens = np.full(
        (len(ids), max(map(len, ids))), engine.context.spec.pad_token_id, dtype=np.int64
    )
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
    return WholeTexts(
        tokens=torch.from_numpy(tokens).to(engine.context.device),
        length=np.asarray([len(text) for text in ids]),
        prompt_length=np.asarray([len(p) for p in prompts]),
        prefix_length=np.zeros(len(ids), dtype=np.int64),
        ids=ids,
        columns=columns,
        written=_written(prompts, own),
    )


def _written(prompts: list[list[int]], own: list[list[bool]] | None) -> list[np.ndarray] | None:
    """For each text the mask of what the environment wrote, or None where it is nothing."""
    if own is None or all(map(all, own)):
        return None
    return [
        np.asarray([*[False] * len(prompt), *(not mine for mine in mask)])
        for prompt, mask in zip(prompts, own, strict=True)
    ]
