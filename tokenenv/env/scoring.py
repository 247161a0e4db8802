"""Whole texts, scored as stepping would have paid them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.actions import LOGPROB_SLACK
from tokenenv.env.engine import RewardEngine, in_eval_mode
from tokenenv.env.finite import require_finite_scores
from tokenenv.env.texts import TextBuffer
from tokenenv.errors import InvalidArgument
from tokenenv.models.batching import micro_batches
from tokenenv.models.prefix_scores import read_length, score_texts, sum_dtype
from tokenenv.prompts import read_continuation, read_prompt
from tokenenv.rewards.term import FinishedTexts, RewardTerm, RunningTexts, States, Transitions
from tokenenv.types import EpisodeScores, Scorer, TokenSpec


@torch.no_grad()
@in_eval_mode
def score_episodes(
    engine: RewardEngine,
    prompts: Sequence[Any],
    responses: Sequence[Any],
    *,
    logprobs: Sequence[Sequence[float]] | None,
    truncated: Sequence[bool] | None,
    weights: Mapping[str, float | Sequence[float]],
    gold: Callable[[str, str], float] | Literal["score"] | None,
    max_batch_tokens: int,
    learning: bool = False,
) -> EpisodeScores:
    """Rewards (B, T) of B finished texts in length-sorted parallel forwards; see
    `TokenVectorEnv.score_episodes`.

    With `learning`, terms with statistics take the texts in, but score all of them with those they
    had before.
    """
    spec = engine.context.spec
    prompt_ids, response_ids = _read_texts(prompts, responses, spec)
    cut = _read_truncated(truncated, response_ids, spec)
    _check_logprobs(engine, logprobs, response_ids)
    each = {name: _read_weight(name, weight, len(prompt_ids)) for name, weight in weights.items()}
    out = _nothing_yet(engine, response_ids, gold is not None)
    statistics, learned = engine.rewards.statistics(), engine.save_statistics()
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]
    try:
        for group in micro_batches(lengths, max_batch_tokens):
            texts = _pad(engine, [prompt_ids[i] for i in group], [response_ids[i] for i in group])
            texts.statistics, texts.learning = (
                {name: s.expand(len(group), -1) for name, s in statistics.items()},
                learning,
            )
            given = None if logprobs is None else [logprobs[i] for i in group]
            group_weights = {
                name: torch.from_numpy(weight[group]).to(engine.context.device)
                for name, weight in each.items()
            }
            _fill(out, group, texts, _score_group(engine, texts, given, cut[group], group_weights))
            if out.gold is not None and callable(gold):
                out.gold[group] = [
                    gold(prompt, response) for prompt, response in texts.prompt_and_response_texts()
                ]
        require_finite_scores(out)
    except BaseException:
        # A reward server that is down, or Ctrl-C: texts that are scored again must not teach twice.
        engine.load_statistics(learned)
        raise
    return (
        replace(out, gold=None if out.score is None else out.score.copy())
        if gold == "score"
        else out
    )


def _nothing_yet(engine: RewardEngine, responses: list[list[int]], has_gold: bool) -> EpisodeScores:
    """Zeros for so many texts."""
    count, width, names = (
        len(responses),
        engine.context.spec.max_new_tokens,
        list(engine.rewards.terms),
    )

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((count, *shape), np.float32)

    return EpisodeScores(
        token_rewards=zeros(width),
        step_rewards=zeros(width),
        terms={name: zeros(width) for name in names},
        token_reward_terms={name: zeros(width) for name in names},
        score=None if engine.context.scorer is None else zeros(),
        gold=zeros() if has_gold else None,
        lengths=np.asarray([len(response) for response in responses]),
        ref_logprobs=zeros(width),
        potentials=zeros(width + 1) if engine.rewards.has_potential else None,
    )


def _fill(out: EpisodeScores, group: np.ndarray, texts: FinishedTexts, scored: "_Scored") -> None:
    """Takes in a micro-batch: the rows `group`."""
    for name in scored.placed:
        out.terms[name][group] = scored.paid[name].cpu().numpy()
        out.token_reward_terms[name][group] = scored.placed[name].cpu().numpy()
        out.step_rewards[group] += out.terms[name][group]
        out.token_rewards[group] += out.token_reward_terms[name][group]
    out.ref_logprobs[group] = scored.ref_logprob.cpu().numpy()
    if out.potentials is not None and scored.potential is not None:
        out.potentials[group] = scored.potential.cpu().numpy()
    if out.score is not None and texts.score is not None:
        out.score[group] = texts.score.float().cpu().numpy()


@dataclass(slots=True)
class _Scored:
    """What one micro-batch of b texts has earned, on the device."""

    paid: dict[str, Tensor]
    """(b, T) each term as stepping pays it."""
    placed: dict[str, Tensor]
    """(b, T) each term where it belongs."""
    ref_logprob: Tensor
    """(b, T)."""
    potential: Tensor | None
    """(b, T + 1)."""


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
    for i, response in enumerate(response_ids):
        _check_response(response, spec, f"responses[{i}]")
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


def _check_response(ids: list[int], spec: TokenSpec, label: str) -> None:
    """Raises unless stepping could have written it."""
    if not 1 <= len(ids) <= spec.max_new_tokens:
        raise InvalidArgument(
            f"{label} has {len(ids)} tokens; allowed: 1 to max_new_tokens={spec.max_new_tokens}."
        )
    place = next((t for t, token in enumerate(ids[:-1]) if token in spec.stop_token_ids), None)
    if place is not None:
        raise InvalidArgument(
            f"{label} holds the stop token {ids[place]} as number {place + 1} of its {len(ids)} "
            f"tokens; "
            "allowed: as its last alone."
        )


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
    truncated: Sequence[bool] | None, responses: list[list[int]], spec: TokenSpec
) -> np.ndarray:
    stopped = np.asarray([response[-1] in spec.stop_token_ids for response in responses])
    if truncated is None:
        return ~stopped
    _check_listed("truncated", truncated)
    if len(truncated) != len(responses):
        raise InvalidArgument(
            f"truncated has {len(truncated)} entries; allowed: one a text ({len(responses)})."
        )
    cut = np.asarray(truncated, dtype=bool)
    for i in np.flatnonzero(cut & stopped):
        raise InvalidArgument(
            f"truncated[{i}]=True, but responses[{i}] ends by itself, in the stop token "
            f"{responses[i][-1]}."
        )
    return cut


def _check_logprobs(engine: RewardEngine, logprobs: Any, responses: list[list[int]]) -> None:
    policy_terms = [name for name, term in engine.rewards.terms.items() if term.kind == "policy"]
    if logprobs is None:
        if policy_terms:
            raise InvalidArgument(
                f"logprobs is missing; {policy_terms} need log pi of every response token (nats)."
            )
        return
    _check_listed("logprobs", logprobs)
    try:
        rows = [np.asarray(row, np.float32) for row in logprobs]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"logprobs={logprobs!r} is not allowed; it must hold numbers."
        ) from error
    if [values.shape for values in rows] != [(len(response),) for response in responses]:
        raise InvalidArgument(
            "logprobs must hold one number for every response token of every text."
        )
    for i, values in enumerate(rows):
        if not (np.isfinite(values) & (values <= LOGPROB_SLACK)).all():
            raise InvalidArgument(
                f"logprobs[{i}] holds a number that is not finite or above 0; allowed: 0 or less "
                f"(nats)."
            )


def _pad(
    engine: RewardEngine, prompts: list[list[int]], responses: list[list[int]]
) -> FinishedTexts:
    ids = [np.asarray([*p, *r], dtype=np.int64) for p, r in zip(prompts, responses, strict=True)]
    tokens = np.full(
        (len(ids), max(map(len, ids))), engine.context.spec.pad_token_id, dtype=np.int64
    )
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
    return FinishedTexts(
        tokens=torch.from_numpy(tokens).to(engine.context.device),
        length=np.asarray([len(text) for text in ids]),
        prompt_length=np.asarray([len(p) for p in prompts]),
        prefix_length=np.zeros(len(ids), dtype=np.int64),
        score=None,
        ids=ids,
        tokenizer=engine.context.spec.tokenizer,
    )


def _score_group(
    engine: RewardEngine,
    texts: FinishedTexts,
    logprobs: list[Sequence[float]] | None,
    truncated: np.ndarray,
    weights: dict[str, Tensor],
) -> _Scored:
    """What the texts have earned; sets their score."""
    device, spec = engine.context.device, engine.context.spec
    valid = texts.own_mask(spec.max_new_tokens)
    row, t = valid.nonzero(as_tuple=True)
    batch = _transitions(engine, texts, row, t)
    last = torch.from_numpy(texts.length - texts.prompt_length - 1).to(device)
    cut = torch.from_numpy(truncated).to(device)
    scored = torch.ones_like(cut) if spec.score_truncated else ~cut
    ends = t == last[row]
    batch.truncated, batch.terminated, batch.scored = (
        ends & cut[row],
        ends & ~cut[row],
        ends & scored[row],
    )
    batch.finished, batch.finished_at = texts, ends.nonzero().squeeze(1)
    texts.score = (
        None if batch.after.score is None else batch.after.score[batch.finished_at].float()
    )
    batch.learning = torch.ones_like(ends) if texts.learning else None
    engine.read_finished(texts)
    if logprobs is not None:
        batch.logprob = torch.tensor(
            [x for one in logprobs for x in one], dtype=torch.float32, device=device
        )
    each = {name: weight[row] for name, weight in weights.items()}
    paid = engine.rewards.paid(batch, each)
    nothing = torch.zeros(valid.shape, dtype=torch.float32, device=device)
    causal = {name: nothing.index_put((row, t), values) for name, values in paid.items()}
    placed = engine.rewards.placed(texts, scored, weights)
    at_end = {
        name: nothing.scatter(1, last[:, None], values.sum(1, keepdim=True))
        for name, values in placed.items()
    }
    assert batch.ref_logprob is not None
    ref_logprob = nothing.index_put((row, t), batch.ref_logprob)
    return _Scored(
        causal | at_end,
        causal | placed,
        ref_logprob,
        _potentials(engine, batch, each, valid.shape, row, t),
    )


def _potentials(
    engine: RewardEngine,
    batch: Transitions,
    weights: dict[str, Tensor],
    shape: Sequence[int],
    row: Tensor,
    t: Tensor,
) -> Tensor | None:
    """Phi (b, T + 1) before each token and of each last state, where it is zero if the text is
    scored there."""
    before, after = (
        engine.rewards.potential(batch.before, weights),
        engine.rewards.potential(batch.after, weights),
    )
    if before is None or after is None or batch.finished_at is None:
        return None
    last = batch.finished_at
    potential = before.new_zeros(shape[0], shape[1] + 1).index_put((row, t), before)
    return potential.index_put(
        (row[last], t[last] + 1), torch.where(batch.scored, 0.0, after)[last]
    )


def _transitions(engine: RewardEngine, texts: FinishedTexts, row: Tensor, t: Tensor) -> Transitions:
    """Every response token of the texts, with the states around it."""
    states = engine.trunks.states(texts.tokens, texts.length.tolist())
    at = torch.from_numpy(texts.prompt_length).to(row.device)[row] + t
    statistics = {name: s[row] for name, s in texts.statistics.items()}
    before = States(
        {key: hidden[row, at - 1] for key, hidden in states.items()}, t, statistics=statistics
    )
    after = States(
        {key: hidden[row, at] for key, hidden in states.items()}, t + 1, statistics=statistics
    )
    before.texts, after.texts = _running_texts(texts, row, t), _running_texts(texts, row, t + 1)
    before.score, after.score = _running_scores(
        engine.context.causal_scorer, texts, before, after, row, t
    )
    tokens = texts.tokens[row, at]
    for name, term in engine.rewards.with_memory.items():
        first = texts.tokens[row, at - 1]
        before.memory[name], after.memory[name] = _recall(
            term, before, after, first, tokens, row, t
        )
    ref_logprob = engine.ref_logprob(before.of(engine.context.reference), tokens)
    none = torch.zeros_like(tokens, dtype=torch.bool)
    return Transitions(tokens, before, after, none, none, none, ref_logprob=ref_logprob)


def _running_texts(texts: FinishedTexts, row: Tensor, count: Tensor) -> RunningTexts:
    """The texts `row` (K,) up to `count` (K,) response tokens."""
    rows = row.cpu().numpy()
    prompt_length = texts.prompt_length[rows]
    length = prompt_length + count.cpu().numpy()
    return RunningTexts(texts.ids, rows, prompt_length, length, texts.tokenizer)


@torch.no_grad()
def recall_prefixes(engine: RewardEngine, slots: np.ndarray, texts: TextBuffer) -> None:
    """Gives the terms with memory what they would carry if the prefixes of the texts that begin in
    `slots` had been written one token after the other, so that what follows is paid as in the same
    text written from its start."""
    prefixed = slots[texts.prefix_length[slots] > 0]
    if not len(prefixed) or not engine.rewards.with_memory:
        return
    assert engine.states is not None
    for group in micro_batches(texts.length[prefixed], engine.context.max_batch_tokens):
        rows = prefixed[group]
        ends = [
            (texts.tokens[row].tolist(), texts.prompt_length[row], texts.length[row])
            for row in rows
        ]
        begun = _pad(
            engine,
            [ids[:start] for ids, start, _ in ends],
            [ids[start:end] for ids, start, end in ends],
        )
        begun.statistics = {
            name: s.expand(len(rows), -1) for name, s in engine.rewards.statistics().items()
        }
        row, t = begun.own_mask(engine.context.spec.max_new_tokens).nonzero(as_tuple=True)
        last = t == texts.upload(texts.prefix_length[rows] - 1)[row]
        for name, memory in _transitions(engine, begun, row, t).after.memory.items():
            engine.states.memory[name][texts.upload(rows)] = memory[last]


def _recall(
    term: RewardTerm,
    before: States,
    after: States,
    first: Tensor,
    tokens: Tensor,
    row: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the term carries before and after each token (K,), one token of all texts after the
    other."""
    memory = term.remember(None, first[t == 0], before.at(t == 0)).float()
    both = memory.new_zeros(2, len(t))
    for step in range(int(t.max()) + 1):
        at = t == step
        both[0, at] = memory[row[at]]
        both[1, at] = term.remember(memory[row[at]], tokens[at], after.at(at)).float()
        memory = memory.index_copy(0, row[at], both[1, at])
    return both[0], both[1]


def _running_scores(
    scorer: Scorer | None,
    texts: FinishedTexts,
    before: States,
    after: States,
    row: Tensor,
    t: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The score of each text before and after each of its tokens (K,); a per-token scorer's is a
    sum from the prompt's end, any other's stays as it was at tokens that it passes over."""
    if scorer is None:
        return None, None
    scores = scorer.head(after.of(scorer.model))
    if not scorer.per_token:
        scores = torch.cat([_prompt_scores(scorer, texts, before, t), scores])
        read = _read_at(scorer, texts, row, t)
        return scores[read[row, t]], scores[read[row, t + 1]]
    scores = scores.to(sum_dtype(scores.device))
    nothing = torch.zeros(
        int(row.max()) + 1, int(t.max()) + 1, dtype=scores.dtype, device=scores.device
    )
    sums = nothing.index_put((row, t), scores).cumsum(1)
    return torch.where(t > 0, sums[row, (t - 1).clamp(min=0)], 0.0), sums[row, t]


def _prompt_scores(scorer: Scorer, texts: FinishedTexts, before: States, t: Tensor) -> Tensor:
    """The scores (b,) of the prompts."""
    scores = scorer.head(before.of(scorer.model)[t == 0]).clone()
    for i, (ids, length) in enumerate(zip(texts.ids, texts.prompt_length, strict=True)):
        if read_length(ids[:length], scorer.pad_token_id) < length:
            scores[i] = score_texts(scorer, [(ids[:length].tolist(), [])])[0]
    return scores


def _read_at(scorer: Scorer, texts: FinishedTexts, row: Tensor, t: Tensor) -> Tensor:
    """(b, T + 1): where the score after 0, 1, ..., T tokens of each text stands among the b of the
    prompts and the K of the tokens: at the last token that is not passed over."""
    count, width = len(texts.ids), int(t.max()) + 2
    prompts = torch.arange(count, device=row.device)[:, None].expand(-1, width)
    own = prompts.index_put((row, t + 1), count + torch.arange(len(row), device=row.device))
    if scorer.pad_token_id is not None:
        at = torch.from_numpy(texts.prompt_length).to(row.device)[row] + t
        own[row, t + 1] = torch.where(
            texts.tokens[row, at] == scorer.pad_token_id, row, own[row, t + 1]
        )
    return own.cummax(1).values
