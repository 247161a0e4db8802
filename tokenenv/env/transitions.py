"""What reward terms see: the transitions of a step, or of whole texts, and the texts that end."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.dynamics import Dynamics
from tokenenv.env.texts import to_device
from tokenenv.rewards.seen import FinishedTexts, States, Transitions, WholeTexts
from tokenenv.types import Scorer


@dataclass(frozen=True, slots=True)
class Ends:
    """Which of K transitions end a text, (K,) bool on the host."""

    terminated: np.ndarray
    """By a stop token, or by the task."""
    truncated: np.ndarray
    """Cut, at `max_new_tokens` or at the context's end."""
    scored: np.ndarray
    """Terminated, or truncated where truncated texts are scored: learners do not bootstrap
    there."""
    ended: np.ndarray
    """Terminated or truncated."""


# ------------------------------------------------------------ what terms see


def transitions(
    dynamics: Dynamics,
    tokens: Tensor,
    before: States,
    after: States,
    ends: Ends,
    ended: WholeTexts | None,
    *,
    next: States,
    active: np.ndarray,
    learning: bool,
    logprob: Tensor | None,
    ends_turn: np.ndarray | None = None,
) -> Transitions:
    """Return K transitions as reward terms see them.

    Args:
        tokens: (K,) the actions.
        before: the states (K,) before them.
        after: the states (K,) after them.
        ends: which of them end a text.
        ended: the texts that end, in the order of the transitions that end them; None where
            none does.
        next: the states (K,) in which the policy acts next; see `Transitions`.
        active: (K,) bool: the transitions that are data.
        learning: whether terms may learn statistics from them.
        logprob: (K,) log pi of the tokens in nats, where it is known.
        ends_turn: (K,) bool on the host, where the environment may write.
    """
    scored, finished, finished_at = dynamics.upload(ends.scored), None, None
    if ended is not None:
        finished_at = dynamics.upload(np.flatnonzero(ends.ended))
        score = None if next.score is None else next.score[finished_at].float()
        if dynamics.score_rule is not None and dynamics.score_rule.dense:
            score = next.memory[dynamics.score_rule.name][finished_at]
        statistics = {name: s[finished_at] for name, s in after.statistics.items()}
        finished = _finish(dynamics, ended, score, statistics, scored[finished_at], learning)
    return Transitions(
        tokens=tokens,
        before=before,
        after=after,
        terminated=dynamics.upload(ends.terminated),
        truncated=dynamics.upload(ends.truncated),
        scored=scored,
        ref_logprob=dynamics.ref_logprob(before.of(dynamics.reference), tokens),
        logprob=logprob,
        finished=finished,
        finished_at=finished_at,
        learning=dynamics.upload(active) if learning and before.statistics else None,
        ends_turn=None if ends_turn is None else dynamics.upload(ends_turn),
        turn_reward=after.turn_reward,
        next=next,
    )


def _finish(
    dynamics: Dynamics,
    texts: WholeTexts,
    score: Tensor | None,
    statistics: dict[str, Tensor],
    scored: Tensor,
    learning: bool,
) -> FinishedTexts:
    """The texts with all that terms may know of them; a `TextScorer`, or a single rule, reads
    them here."""
    spec, scorer, token_scores = dynamics.context.spec, dynamics.context.scorer, None
    if scorer is not None and not isinstance(scorer, Scorer):
        pairs, width = texts.prompt_and_response_ids(), spec.max_new_tokens
        width = max(width, *(len(response) for _, response in pairs))
        token_scores = scorer.token_scores(pairs, width).to(dynamics.context.device)
        if texts.written is not None:
            token_scores = own_columns(token_scores, texts, scorer.per_token)
        token_scores = token_scores[:, : spec.max_new_tokens]
        score = token_scores.sum(1)
    finished = FinishedTexts(
        **{field.name: getattr(texts, field.name) for field in fields(WholeTexts)},
        score=score,
        tokenizer=spec.tokenizer,
        token_scores=token_scores,
        statistics=statistics,
        learning=learning,
        scored=scored,
    )
    if dynamics.score_rule is None or score is not None:
        return finished
    return replace(finished, score=dynamics.score_rule.numbers(finished, dynamics.context.device))


def own_columns(scores: Tensor, texts: WholeTexts, per_token: bool) -> Tensor:
    """Return the scores (B, S) of response tokens, whoever wrote them, as scores of the policy's
    tokens alone, (B, S) with its tokens first.

    A text's own score, which stands on its last token, moves to the policy's last token. Scores of
    single tokens that the environment wrote are left out.
    """
    width, steps = scores.shape[1], to_device(texts.steps(), scores.device)
    column = torch.arange(width, device=scores.device)
    if not per_token:
        return torch.where(column == steps[:, None] - 1, scores.sum(1, keepdim=True), 0.0)
    places = to_device(texts.positions(width) - texts.prompt_length[:, None], scores.device)
    picked_BS = scores.gather(1, places.clamp(max=width - 1))
    return torch.where(column < steps[:, None], picked_BS, 0.0)
