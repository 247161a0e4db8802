"""Whole texts, scored as stepping would have paid them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.engine import RewardEngine, in_eval_mode
from tokenenv.env.finite import require_finite_scores
from tokenenv.env.scoring_arguments import (
    check_logprobs,
    check_texts,
    read_own_masks,
    read_texts,
    read_truncated,
    read_turn_rewards,
    read_weight,
)
from tokenenv.env.texts import to_device
from tokenenv.env.transitions import Ends, transitions
from tokenenv.env.walks import Walk, walk_texts
from tokenenv.models.batching import micro_batches
from tokenenv.rewards.seen import Transitions, WholeTexts
from tokenenv.tables import Columns, read_columns
from tokenenv.types import EpisodeScores

CPU_TOKENS = 2048
"""Tokens of one forward of whole texts on a CPU, at the most. Its states stay in the processor's
cache: texts of 136 tokens take a third less time than in one forward of 8,704."""
CPU_FORWARD_TOKENS = 128
"""Tokens that cost as much as one more forward with all that is read of it, on a CPU: 32 texts of 1
to 40 tokens, cut by length, take half the time of one padded forward."""


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
    prompt_ids, response_ids = read_texts(prompts, responses, spec)
    masks = read_own_masks(own, response_ids, spec)
    steps = [sum(mask) for mask in masks] if masks else [len(ids) for ids in response_ids]
    check_texts(prompt_ids, response_ids, steps, spec)
    rows = read_columns(columns, range(len(prompt_ids)), len(prompt_ids), "columns")
    engine.require_columns(rows, "prompts to score (columns=)")
    cut = read_truncated(truncated, response_ids, masks, spec)
    check_logprobs(engine, logprobs, steps)
    turns = read_turn_rewards(engine, turn_rewards, steps)
    each = {name: read_weight(name, weight, len(prompt_ids)) for name, weight in weights.items()}
    if learning:
        engine.rewards.update_models()
    out = replace(_zeros(engine, steps), reward_version=engine.rewards.model_version)
    statistics = engine.rewards.statistics()
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]
    # Statistics were read once, above: with `learning` they change from one micro-batch to the
    # next, and all texts are scored with those that were there before.
    for group in micro_batches(lengths, *_sizes(engine)):
        begun, written = ([ids[i] for i in group] for ids in (prompt_ids, response_ids))
        by = [masks[i] for i in group] if masks else None
        texts = _pad(engine, begun, written, [rows[i] for i in group], by)
        known = {name: s.expand(len(group), -1) for name, s in statistics.items()}
        earned = None if turns is None else np.concatenate([turns[i] for i in group])
        walk = walk_texts(engine.dynamics, texts, known, engine.trunks, earned)
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


def _sizes(engine: RewardEngine) -> tuple[int, int | None]:
    """Tokens of one forward, and how many cost as much as another; see `micro_batches`."""
    most = engine.context.max_batch_tokens
    if engine.context.device.type != "cpu":
        return most, None
    return min(most, CPU_TOKENS), CPU_FORWARD_TOKENS


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
    return transitions(
        engine.dynamics,
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
