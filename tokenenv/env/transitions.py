"""How the states of texts begin and advance: one statement for stepping and for scoring.

A text begins at the end of its prompt. Every response token then moves on its running score and the
memory of each term, whoever wrote it. `Dynamics.advance` does that for one more token of the
policy's in each of the N slots, `Dynamics.read` for what the environment writes behind it, and
`Dynamics.walk` for all response tokens of whole texts after one parallel forward. All use the same
two recurrences (`running_scores` and `_remember`), and one function, `transitions`, makes what
reward terms see of the policy's tokens.

Suffixes: K transitions, B texts, S response tokens of the longest text, R response tokens of all
texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.texts import to_device
from tokenenv.models.batching import micro_batches
from tokenenv.models.prefix_scores import read_length, score_texts, sum_dtype
from tokenenv.models.trunks import Trunks, logprob_reader, trunk_of
from tokenenv.rewards.reward_sum import RewardSum, read_memory
from tokenenv.rewards.seen import FinishedTexts, RunningTexts, States, Transitions, WholeTexts
from tokenenv.rewards.term import Context
from tokenenv.types import Scorer, TrunkStates


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
class _Path:
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


class Dynamics:
    """Begins and advances the states of texts, and makes the transitions that terms see."""

    def __init__(self, context: Context, rewards: RewardSum) -> None:
        self.context, self.rewards = context, rewards
        self.reference, self.scorer = context.reference, context.causal_scorer
        self.ref_logprob = logprob_reader(context.reference, context.spec.vocab_size)
        self.with_memory = rewards.with_memory
        self.score_rule = None if context.scorer is not None else rewards.score_rule

    # -------------------------------------------------------------- beginning

    def begin(
        self,
        texts: WholeTexts,
        hidden: TrunkStates,
        statistics: dict[str, Tensor],
        trunks: Trunks,
    ) -> States:
        """Return the states (B,) of texts that begin with their prompt and, if they have one, with
        a prefix.

        Args:
            texts: the B texts.
            hidden: a state (B, H) for every trunk after each text's last token.
            statistics: (B, p) each term's present ones.
            trunks: run the uncached forward of texts with a prefix.
        """
        begun = self._first(texts, texts.length, texts.steps(), dict(hidden), statistics)
        prefixed = np.flatnonzero(texts.prefix_length)
        adds_up = self.scorer is not None and self.scorer.per_token
        if not len(prefixed) or not (adds_up or self.with_memory):
            return begun
        # Sums of token scores and memories are the work of every response token, so a prefix is
        # walked from the prompt's end, as if it had been written there.
        for group in micro_batches(texts.length[prefixed], self.context.max_batch_tokens):
            rows = prefixed[group]
            index = self._upload(rows)
            path = self._along(
                at_rows(texts, rows, index),
                {name: s[index] for name, s in statistics.items()},
                trunks,
            )
            end = self._upload(np.flatnonzero(last_of(path.row)))
            if begun.score is not None and path.after.score is not None:
                begun.score[index] = path.after.score[end]
            for name, memory in path.after.memory.items():
                begun.memory[name][index] = memory[end]
        return begun

    def _first(
        self,
        texts: WholeTexts,
        length: np.ndarray,
        steps: np.ndarray,
        hidden: dict[object, Tensor],
        statistics: dict[str, Tensor],
    ) -> States:
        """The states (B,) of texts whose first `length` (B,) tokens are what they begin with,
        `steps` (B,) of them the policy's."""
        states = States(hidden, self._upload(steps), statistics=statistics)
        states.texts = self._running(texts, np.arange(len(length)), length)
        states.score = self._first_score(texts, length, states)
        last = texts.tokens[
            torch.arange(len(length), device=self.context.device), self._upload(length - 1)
        ]
        for name, term in self.with_memory.items():
            memory = term.remember(None, last, states)
            states.memory[name] = read_memory(term, memory, last)
        return states

    def _first_score(self, texts: WholeTexts, length: np.ndarray, states: States) -> Tensor | None:
        """The running score (B,) before the first token: no token has been scored by a per-token
        scorer, and any other has scored what is there."""
        scorer = self.scorer
        if scorer is None:
            return None
        if scorer.per_token:
            device = self.context.device
            return torch.zeros(len(length), dtype=sum_dtype(device), device=device)
        scores = scorer.head(states.of(scorer.model)).clone()
        if scorer.pad_token_id is not None:
            for row, (ids, n) in enumerate(zip(texts.ids, length, strict=True)):
                # The scorer passes over pad tokens, so it read this text at an earlier token.
                if read_length(ids[:n], scorer.pad_token_id) < n:
                    scores[row] = score_texts(scorer, [(ids[:n].tolist(), [])])[0]
        return scores

    # -------------------------------------------------------------- advancing

    def advance(
        self,
        before: States,
        hidden: dict[object, Tensor],
        tokens: Tensor,
        texts: RunningTexts,
        turn_reward: Tensor | None = None,
    ) -> States:
        """Return the states (K,) of K texts after one more token (K,) each, which `texts` already
        holds; `hidden` is a state (K, H) after it for every trunk, and `turn_reward` (K,) what the
        task pays for the turn that it ends."""
        after = States(hidden, before.step + 1, statistics=before.statistics, texts=texts)
        after.turn_reward = turn_reward
        if self.scorer is not None and before.score is not None:
            scores = self.scorer.head(after.of(self.scorer.model))
            after.score = running_scores(
                self.scorer, before.score, scores[:, None], tokens[:, None]
            )[:, 0]
        if self.with_memory:
            self._remember(before.memory, tokens, after)
        return after

    def read(
        self,
        after: States,
        hidden: TrunkStates,
        slots: np.ndarray,
        tokens: Tensor,
        lengths: np.ndarray,
        texts: RunningTexts,
    ) -> States:
        """Return the states of the K texts after what the environment wrote into some of them.

        Args:
            after: the states (K,) before it wrote.
            hidden: a state (n, S, H) after each written token for every trunk.
            slots: (n,) int64 on the host, the texts that it wrote into.
            tokens: (n, S) int64, right-padded.
            lengths: (n,) on the host: how many tokens it wrote, 1 or more each.
            texts: the K texts with what was written.
        """
        index, row = self._upload(slots), torch.arange(len(slots), device=self.context.device)
        end = self._upload(lengths - 1)
        moved = {
            key: h.index_copy(0, index, hidden[key][row, end].to(h.dtype))
            for key, h in after.hidden.items()
        }
        out = States(moved, after.step, after.score, dict(after.memory), after.statistics, texts)
        # A sum of token scores is of the policy's own tokens, and stays as it is.
        scores = None
        if self.scorer is not None and after.score is not None and not self.scorer.per_token:
            flat = self.scorer.head(hidden[trunk_of(self.scorer.model)].flatten(0, 1))
            scores = running_scores(
                self.scorer, after.score[index], flat.view(tokens.shape), tokens
            )
            out.score = after.score.index_copy(0, index, scores[row, end].to(after.score.dtype))
        if not self.with_memory:
            return out
        now = {name: memory[index] for name, memory in after.memory.items()}
        for j in range(tokens.shape[1]):
            rows = np.flatnonzero(lengths > j)
            at = self._upload(rows)
            some = index[at]
            states = States(
                {key: h[at, j] for key, h in hidden.items()},
                after.step[some],
                None if after.score is None else after.score[some],
                statistics={name: s[some] for name, s in after.statistics.items()},
                turn_reward=None if after.turn_reward is None else after.turn_reward[some],
                texts=shortened(texts.at(slots[rows]), (lengths[rows] - 1 - j)),
            )
            if scores is not None:
                states.score = scores[at, j]
            self._remember(
                {name: memory[at] for name, memory in now.items()}, tokens[at, j], states
            )
            for name, memory in states.memory.items():
                now[name][at] = memory
        for name, memory in now.items():
            out.memory[name] = after.memory[name].index_copy(0, index, memory)
        return out

    def walk(
        self,
        texts: WholeTexts,
        statistics: dict[str, Tensor],
        trunks: Trunks,
        turn_reward: np.ndarray | None = None,
    ) -> Walk:
        """Return every token of the policy's in whole texts, with the states around it;
        `statistics` (B, p) are those that the texts begin with, and `turn_reward` (K,) float32 on
        the host what the task pays for the turn that each token of the policy's ends."""
        path = self._along(texts, statistics, trunks, turn_reward)
        if path.own is None:
            return Walk(path.row, path.t, path.tokens, path.before, path.after, path.after, None)
        own = np.flatnonzero(path.own)
        # The last token, whoever wrote it, before the policy's next one, or of the text.
        closes = np.append(path.own[1:], True) | last_of(path.row)
        ends = np.flatnonzero(closes)
        upto = ends[np.searchsorted(ends, own)]
        before, after, next = (
            picked(states, at, self._upload(at))
            for states, at in ((path.before, own), (path.after, own), (path.after, upto))
        )
        row = path.row[own]
        ends_turn = (upto != own) | last_of(row)
        tokens = path.tokens[self._upload(own)]
        return Walk(row, path.t[own], tokens, before, after, next, ends_turn)

    def _along(
        self,
        texts: WholeTexts,
        statistics: dict[str, Tensor],
        trunks: Trunks,
        turn_reward: np.ndarray | None = None,
    ) -> "_Path":
        """Every response token of whole texts, whoever wrote it, with the states around it."""
        prompt, response = texts.prompt_length, texts.length - texts.prompt_length
        rows, places = np.nonzero(np.arange(response.max()) < response[:, None])
        own, steps, moved = None, places, places + 1
        if texts.written is not None:
            by = [
                ~mask[a:b] for mask, a, b in zip(texts.written, prompt, texts.length, strict=True)
            ]
            own = np.concatenate(by)
            steps = np.concatenate([mask.cumsum() - mask for mask in by])
            moved = steps + own
            if turn_reward is not None:
                # What is written behind a token of the policy's still belongs to its turn.
                earned = turn_reward[np.maximum(own.cumsum() - 1, 0)]
                turn_reward = np.where(moved > 0, earned, np.float32(0))
        row, s, at = self._upload(rows), self._upload(places), self._upload(prompt[rows] + places)
        hidden = trunks.states(texts.tokens[:, : int(texts.length.max())], texts.length.tolist())
        text, end = torch.arange(len(prompt), device=row.device), self._upload(prompt - 1)
        begun = self._first(
            texts,
            prompt,
            np.zeros_like(prompt),
            {key: h[text, end] for key, h in hidden.items()},
            statistics,
        )
        known = {name: numbers[row] for name, numbers in statistics.items()}
        t, t_after = self._upload(steps), self._upload(moved)
        before = States({key: h[row, at - 1] for key, h in hidden.items()}, t, statistics=known)
        after = States({key: h[row, at] for key, h in hidden.items()}, t_after, statistics=known)
        after.turn_reward = None if turn_reward is None else self._upload(turn_reward)
        before.texts = self._running(texts, rows, prompt[rows] + places)
        after.texts = self._running(texts, rows, prompt[rows] + places + 1)
        tokens = texts.tokens[row, at]
        if self.scorer is not None and begun.score is not None:
            # The head reads all states at once, so that only the recurrence goes along the texts.
            scores = self.scorer.head(after.of(self.scorer.model))
            if own is not None and self.scorer.per_token:
                scores = torch.where(self._upload(own), scores, 0.0)
            grid = scores.new_zeros(len(prompt), int(response.max()))
            tokens_BS = tokens.new_zeros(grid.shape).index_put((row, s), tokens)
            running = running_scores(
                self.scorer, begun.score, grid.index_put((row, s), scores), tokens_BS
            )
            earlier = torch.cat([begun.score[:, None], running[:, :-1]], 1)
            before.score, after.score = earlier[row, s], running[row, s]
        if self.with_memory:
            self._remember_along(begun, places, row, tokens, before, after)
        return _Path(rows, steps, own, tokens, before, after)

    def _remember_along(
        self,
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
            at = self._upload(on_host)
            texts, states = row[at], bare.at(at)
            states.texts = None if after.texts is None else after.texts.at(on_host)
            now = {name: memory[texts] for name, memory in carried.items()}
            self._remember(now, tokens[at], states)
            for name, memory in states.memory.items():
                before.memory[name][at], after.memory[name][at] = now[name], memory
                carried[name][texts] = memory

    def _remember(self, before: Mapping[str, Tensor], tokens: Tensor, after: States) -> None:
        """Fill in the memories of `after`, K texts after `tokens` (K,)."""
        for name, term in self.with_memory.items():
            memory = term.remember(before[name], tokens, after)
            after.memory[name] = read_memory(term, memory, tokens)

    # ------------------------------------------------------------ what terms see

    def transitions(
        self,
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
        scored, finished, finished_at = self._upload(ends.scored), None, None
        if ended is not None:
            finished_at = self._upload(np.flatnonzero(ends.ended))
            score = None if next.score is None else next.score[finished_at].float()
            if self.score_rule is not None and self.score_rule.dense:
                score = next.memory[self.score_rule.name][finished_at]
            statistics = {name: s[finished_at] for name, s in after.statistics.items()}
            finished = self._finish(ended, score, statistics, scored[finished_at], learning)
        return Transitions(
            tokens=tokens,
            before=before,
            after=after,
            terminated=self._upload(ends.terminated),
            truncated=self._upload(ends.truncated),
            scored=scored,
            ref_logprob=self.ref_logprob(before.of(self.reference), tokens),
            logprob=logprob,
            finished=finished,
            finished_at=finished_at,
            learning=self._upload(active) if learning and before.statistics else None,
            ends_turn=None if ends_turn is None else self._upload(ends_turn),
            turn_reward=after.turn_reward,
            next=next,
        )

    def _finish(
        self,
        texts: WholeTexts,
        score: Tensor | None,
        statistics: dict[str, Tensor],
        scored: Tensor,
        learning: bool,
    ) -> FinishedTexts:
        """The texts with all that terms may know of them; a `TextScorer`, or a single rule, reads
        them here."""
        spec, scorer, token_scores = self.context.spec, self.context.scorer, None
        if scorer is not None and not isinstance(scorer, Scorer):
            pairs, width = texts.prompt_and_response_ids(), spec.max_new_tokens
            width = max(width, *(len(response) for _, response in pairs))
            token_scores = scorer.token_scores(pairs, width).to(self.context.device)
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
        if self.score_rule is None or score is not None:
            return finished
        return replace(finished, score=self.score_rule.numbers(finished, self.context.device))

    def _running(self, texts: WholeTexts, rows: np.ndarray, length: np.ndarray) -> RunningTexts:
        """The texts `rows` (K,) up to `length` (K,) tokens."""
        tokenizer = self.context.spec.tokenizer
        lengths = texts.prompt_length[rows], length
        return RunningTexts(texts.ids, rows, *lengths, tokenizer, texts.columns, texts.written)

    def _upload(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.context.device)


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


def shortened(texts: RunningTexts, by: np.ndarray) -> RunningTexts:
    """Return the K texts without their last `by` (K,) tokens."""
    return replace(texts, length=texts.length - by)


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
