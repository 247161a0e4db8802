"""How the states of texts begin and advance, token by token.

A text begins at the end of its prompt. Every response token then moves on its running score and the
memory of each term, whoever wrote it. `Dynamics.advance` does that for one more token of the
policy's in each of the N slots, `Dynamics.read` for what the environment writes behind it, and
`tokenenv.env.walks` for all response tokens of whole texts after one parallel forward. All use the
same two recurrences, `running_scores` and `Dynamics.remember`, so that stepping equals scoring.

Suffixes: K texts, B texts that begin, S tokens.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.texts import to_device
from tokenenv.env.walks import along, at_rows, last_of, running_scores
from tokenenv.models.batching import micro_batches
from tokenenv.models.prefix_scores import read_length, score_texts, sum_dtype
from tokenenv.models.trunks import Trunks, logprob_reader, trunk_of
from tokenenv.rewards.reward_sum import RewardSum, read_memory
from tokenenv.rewards.seen import RunningTexts, States, WholeTexts
from tokenenv.rewards.term import Context
from tokenenv.types import TrunkStates


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
        begun = self.first(texts, texts.length, texts.steps(), dict(hidden), statistics)
        prefixed = np.flatnonzero(texts.prefix_length)
        adds_up = self.scorer is not None and self.scorer.per_token
        if not len(prefixed) or not (adds_up or self.with_memory):
            return begun
        # Sums of token scores and memories are the work of every response token, so a prefix is
        # walked from the prompt's end, as if it had been written there.
        for group in micro_batches(texts.length[prefixed], self.context.max_batch_tokens):
            rows = prefixed[group]
            index = self.upload(rows)
            path = along(
                self,
                at_rows(texts, rows, index),
                {name: s[index] for name, s in statistics.items()},
                trunks,
            )
            end = self.upload(np.flatnonzero(last_of(path.row)))
            if begun.score is not None and path.after.score is not None:
                begun.score[index] = path.after.score[end]
            for name, memory in path.after.memory.items():
                begun.memory[name][index] = memory[end]
        return begun

    def first(
        self,
        texts: WholeTexts,
        length: np.ndarray,
        steps: np.ndarray,
        hidden: dict[object, Tensor],
        statistics: dict[str, Tensor],
    ) -> States:
        """The states (B,) of texts whose first `length` (B,) tokens are what they begin with,
        `steps` (B,) of them the policy's."""
        states = States(hidden, self.upload(steps), statistics=statistics)
        states.texts = self.running(texts, np.arange(len(length)), length)
        states.score = self._first_score(texts, length, states)
        last = texts.tokens[
            torch.arange(len(length), device=self.context.device), self.upload(length - 1)
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
            self.remember(before.memory, tokens, after)
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
        index, row = self.upload(slots), torch.arange(len(slots), device=self.context.device)
        end = self.upload(lengths - 1)
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
            at = self.upload(rows)
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
            self.remember({name: memory[at] for name, memory in now.items()}, tokens[at, j], states)
            for name, memory in states.memory.items():
                now[name][at] = memory
        for name, memory in now.items():
            out.memory[name] = after.memory[name].index_copy(0, index, memory)
        return out

    def remember(self, before: Mapping[str, Tensor], tokens: Tensor, after: States) -> None:
        """Fill in the memories of `after`, K texts after `tokens` (K,)."""
        for name, term in self.with_memory.items():
            memory = term.remember(before[name], tokens, after)
            after.memory[name] = read_memory(term, memory, tokens)

    def running(self, texts: WholeTexts, rows: np.ndarray, length: np.ndarray) -> RunningTexts:
        """The texts `rows` (K,) up to `length` (K,) tokens."""
        tokenizer = self.context.spec.tokenizer
        lengths = texts.prompt_length[rows], length
        return RunningTexts(texts.ids, rows, *lengths, tokenizer, texts.columns, texts.written)

    def upload(self, array: np.ndarray) -> Tensor:
        """Return a copy of a host array on the device, without waiting for the device."""
        return to_device(array, self.context.device)


def shortened(texts: RunningTexts, by: np.ndarray) -> RunningTexts:
    """Return the K texts without their last `by` (K,) tokens."""
    return replace(texts, length=texts.length - by)
