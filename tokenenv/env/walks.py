"""Whole texts, token by token: what stepping would have seen of them, after one parallel forward.

Suffixes: B texts, K tokens of the policy's, R response tokens of all texts, whoever wrote them, S
response tokens of the longest text.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.trunks import Trunks
from tokenenv.rewards.seen import States, WholeTexts
from tokenenv.types import Scorer

if TYPE_CHECKING:
    from tokenenv.env.dynamics import Dynamics


@dataclass(frozen=True, slots=True)
class Walk:
    """The K tokens of the policy's in B whole texts, one text after the other."""

    row: np.ndarray
    """(K,) int64 on the host: the text that each token belongs to."""
    t: np.ndarray
    """(K,) int64 on the host: how many tokens of the policy's stand before it."""
    tokens: Tensor
    """(K,) int64."""
    before: States
    after: States
    next: States
    """As `Transitions.next`."""
    ends_turn: np.ndarray | None
    """(K,) bool on the host, as `Transitions.ends_turn`; None where nobody else writes."""

    @property
    def last(self) -> np.ndarray:
        """(K,) bool on the host: the policy's last token in each text."""
        return last_of(self.row)


@dataclass(frozen=True, slots=True)
class Path:
    """The R response tokens of B whole texts, whoever wrote them, one text after the other."""

    row: np.ndarray
    """(R,) int64 on the host: the text that each token belongs to."""
    t: np.ndarray
    """(R,) int64 on the host: how many tokens of the policy's stand before it."""
    own: np.ndarray | None
    """(R,) bool on the host: the policy's tokens; None: all are."""
    tokens: Tensor
    """(R,) int64."""
    before: States
    after: States


def walk_texts(
    dynamics: "Dynamics",
    texts: WholeTexts,
    statistics: dict[str, Tensor],
    trunks: Trunks,
    turn_reward: np.ndarray | None = None,
) -> Walk:
    """Return every token of the policy's in whole texts, with the states around it; `statistics`
    (B, p) are those that the texts begin with, and `turn_reward` (K,) float32 on the host what the
    task pays for the turn that each token of the policy's ends."""
    path = along(dynamics, texts, statistics, trunks, turn_reward)
    if path.own is None:
        return Walk(path.row, path.t, path.tokens, path.before, path.after, path.after, None)
    own = np.flatnonzero(path.own)
    # The last token, whoever wrote it, before the policy's next one, or of the text.
    closes = np.append(path.own[1:], True) | last_of(path.row)
    ends = np.flatnonzero(closes)
    upto = ends[np.searchsorted(ends, own)]
    before, after, next = (
        picked(states, at, dynamics.upload(at))
        for states, at in ((path.before, own), (path.after, own), (path.after, upto))
    )
    row = path.row[own]
    ends_turn = (upto != own) | last_of(row)
    tokens = path.tokens[dynamics.upload(own)]
    return Walk(row, path.t[own], tokens, before, after, next, ends_turn)


def along(
    dynamics: "Dynamics",
    texts: WholeTexts,
    statistics: dict[str, Tensor],
    trunks: Trunks,
    turn_reward: np.ndarray | None = None,
) -> Path:
    """Every response token of whole texts, whoever wrote it, with the states around it;
    `turn_reward` as for `walk_texts`."""
    prompt, response = texts.prompt_length, texts.length - texts.prompt_length
    rows, places = np.nonzero(np.arange(response.max()) < response[:, None])
    own, steps, moved = None, places, places + 1
    if texts.written is not None:
        by = [~mask[a:b] for mask, a, b in zip(texts.written, prompt, texts.length, strict=True)]
        own = np.concatenate(by)
        steps = np.concatenate([mask.cumsum() - mask for mask in by])
        moved = steps + own
        if turn_reward is not None:
            # What is written behind a token of the policy's still belongs to its turn.
            earned = turn_reward[np.maximum(own.cumsum() - 1, 0)]
            turn_reward = np.where(moved > 0, earned, np.float32(0))
    row, s, at = (
        dynamics.upload(rows),
        dynamics.upload(places),
        dynamics.upload(prompt[rows] + places),
    )
    hidden = trunks.states(texts.tokens[:, : int(texts.length.max())], texts.length.tolist())
    text, end = torch.arange(len(prompt), device=row.device), dynamics.upload(prompt - 1)
    begun = dynamics.first(
        texts,
        prompt,
        np.zeros_like(prompt),
        {key: h[text, end] for key, h in hidden.items()},
        statistics,
    )
    known = {name: numbers[row] for name, numbers in statistics.items()}
    t, t_after = dynamics.upload(steps), dynamics.upload(moved)
    before = States({key: h[row, at - 1] for key, h in hidden.items()}, t, statistics=known)
    after = States({key: h[row, at] for key, h in hidden.items()}, t_after, statistics=known)
    after.turn_reward = None if turn_reward is None else dynamics.upload(turn_reward)
    before.texts = dynamics.running(texts, rows, prompt[rows] + places)
    after.texts = dynamics.running(texts, rows, prompt[rows] + places + 1)
    tokens = texts.tokens[row, at]
    if dynamics.scorer is not None and begun.score is not None:
        # The head reads all states at once, so that only the recurrence goes along the texts.
        scores = dynamics.scorer.head(after.of(dynamics.scorer.model))
        if own is not None and dynamics.scorer.per_token:
            scores = torch.where(dynamics.upload(own), scores, 0.0)
        grid = scores.new_zeros(len(prompt), int(response.max()))
        tokens_BS = tokens.new_zeros(grid.shape).index_put((row, s), tokens)
        running = running_scores(
            dynamics.scorer, begun.score, grid.index_put((row, s), scores), tokens_BS
        )
        earlier = torch.cat([begun.score[:, None], running[:, :-1]], 1)
        before.score, after.score = earlier[row, s], running[row, s]
    if dynamics.with_memory:
        _remember_along(dynamics, begun, places, row, tokens, before, after)
    return Path(rows, steps, own, tokens, before, after)


def _remember_along(
    dynamics: "Dynamics",
    begun: States,
    places: np.ndarray,
    row: Tensor,
    tokens: Tensor,
    before: States,
    after: States,
) -> None:
    """Fill in the memories around R tokens, from those of the texts at their prompts' ends."""
    carried = {name: memory.clone() for name, memory in begun.memory.items()}
    for name, memory in carried.items():
        before.memory[name] = memory.new_empty(len(places), *memory.shape[1:])
        after.memory[name] = torch.empty_like(before.memory[name])
    bare = States(after.hidden, after.step, after.score, {}, after.statistics)
    bare.turn_reward = after.turn_reward
    # What is remembered follows from what was, so the texts go on side by side, a token at a
    # time; `at` are the tokens with so many response tokens before them, known to the host.
    order = np.argsort(places, kind="stable")
    for on_host in np.split(order, np.cumsum(np.bincount(places))[:-1]):
        at = dynamics.upload(on_host)
        texts, states = row[at], bare.at(at)
        states.texts = None if after.texts is None else after.texts.at(on_host)
        now = {name: memory[texts] for name, memory in carried.items()}
        dynamics.remember(now, tokens[at], states)
        for name, memory in states.memory.items():
            before.memory[name][at], after.memory[name][at] = now[name], memory
            carried[name][texts] = memory


def last_of(row: np.ndarray) -> np.ndarray:
    """Return (K,) bool: the last entry of each run of equal numbers in `row` (K,)."""
    return np.append(row[1:] != row[:-1], True)


def picked(states: States, on_host: np.ndarray, index: Tensor) -> States:
    """Return the states `on_host` (n,), which are `index` (n,) on the device, without waiting for
    the device."""
    texts, states.texts = states.texts, None
    chosen, states.texts = states.at(index), texts
    chosen.texts = None if texts is None else texts.at(on_host)
    return chosen


def at_rows(texts: WholeTexts, rows: np.ndarray, index: Tensor) -> WholeTexts:
    """Return the texts `rows` (n,), which are `index` (n,) on the device, alone."""
    return WholeTexts(
        tokens=texts.tokens[index],
        length=texts.length[rows],
        prompt_length=texts.prompt_length[rows],
        prefix_length=texts.prefix_length[rows],
        ids=[texts.ids[row] for row in rows],
        columns=[texts.columns[row] for row in rows] if texts.columns else (),
        written=None if texts.written is None else [texts.written[row] for row in rows],
    )


def running_scores(scorer: Scorer, first: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """Return the running score (B, S) of B texts after each of S tokens.

    A per-token scorer's is a sum, in float64, because in float32 thousands of tokens drift. Any
    other's is the score at the last token, and pad tokens that the scorer passes over leave it as
    it was.

    Args:
        scorer: gave the scores.
        first: (B,) the running score before the first token.
        scores: (B, S) the head's score at each token.
        tokens: (B, S) int64.
    """
    if scorer.per_token:
        return first[:, None] + scores.to(first.dtype).cumsum(1)
    if scorer.pad_token_id is None:
        return scores
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    read = torch.where(tokens == scorer.pad_token_id, 0, position).cummax(1).values
    return torch.cat([first[:, None], scores], 1).gather(1, read)
