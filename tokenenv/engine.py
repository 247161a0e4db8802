"""The models and reward terms of N running texts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.heads import token_logprobs
from tokenenv.models.trunks import Trunks, logits_head, trunk_of
from tokenenv.rewards.base import FinishedTexts, Parts, RewardSum, RewardTerm, States, Transitions, weight_at
from tokenenv.texts import TextBuffer
from tokenenv.types import Slots


@dataclass(slots=True)
class Ends:
    """Which rows of a step end, (N,) bool on the host."""

    terminated: np.ndarray
    truncated: np.ndarray
    scored: np.ndarray
    """Terminated, or truncated where truncated texts are scored: learners do not bootstrap there."""

    @property
    def ended(self) -> np.ndarray:
        """(N,) bool."""
        return self.terminated | self.truncated


@dataclass(slots=True)
class Paid:
    """What one step paid, (N,) float32 on the device."""

    reward: Tensor
    terms: dict[str, Tensor]
    ref_logprob: Tensor
    score: Tensor | None
    """The score of each text so far."""
    potential: Tensor | None
    finished: FinishedTexts | None
    """The texts that ended, in the order of their rows."""


class RewardEngine:
    """Advances every model by one token a step and adds up what the terms pay.

    An episode's weights are read when it starts and hold to its end, so that it earns the same whatever happens around it.
    """

    def __init__(self, parts: Parts, terms: dict[str, RewardTerm], num_rows: int, **model_options: Any) -> None:
        for term in terms.values():
            term.bind(parts)
        self.parts = parts
        self.rewards = RewardSum(terms, parts.spec.max_new_tokens)
        models = [parts.reference, *(m for term in terms.values() for m in term.models)]
        models += [parts.scorer.model] if parts.scorer else []
        max_length = parts.spec.max_prompt_tokens + parts.spec.max_new_tokens
        self.trunks = Trunks(models, num_rows, max_length, **model_options)
        self.reference_head = logits_head(parts.reference, parts.spec.vocab_size)
        self.weights = {name: np.zeros(num_rows, dtype=np.float32) for name in terms}
        self.token_rewards = torch.zeros(num_rows, parts.spec.max_new_tokens, device=parts.device)
        self.states: States | None = None
        self._device_weights: dict[str, Tensor] = {}

    @property
    def started(self) -> bool:
        """Whether every row holds a text."""
        return self.states is not None

    def reference_states(self) -> Tensor:
        """The reference's state (N, H) of each text."""
        assert self.states is not None
        return self.states.of(self.parts.reference)

    def start(self, slots: Slots, texts: TextBuffer, weights: dict[str, float]) -> None:
        """Begins the texts of `slots`, with the given weight of each term."""
        for name, weight in weights.items():
            self.weights[name][slots] = weight
        self.token_rewards[texts.upload(np.asarray(slots))] = 0.0
        self._enter(slots, texts, score=None)

    def weights_now(self, tokens_seen: int, kl_coef: float) -> dict[str, float]:
        """The weights of an episode that begins now."""
        terms = self.rewards.terms.items()
        return {name: kl_coef if name == "kl" else weight_at(term, tokens_seen) for name, term in terms}

    @torch.no_grad()
    def step(self, tokens: Tensor, logprob: Tensor | None, active: np.ndarray, ends: Ends, texts: TextBuffer) -> Paid:
        """One token (N,) in each active row; `texts` already holds it."""
        assert self.states is not None
        before, weights = self.states, self._device_weights
        ref_logprob = token_logprobs(before.of(self.parts.reference), tokens, self.reference_head)
        self.states = after = self._advance(tokens, active, before)
        rows = np.flatnonzero(ends.ended)
        finished = self._finished(rows, texts, after) if len(rows) else None
        batch = Transitions(
            tokens=tokens,
            before=before,
            after=after,
            terminated=texts.upload(ends.terminated),
            truncated=texts.upload(ends.truncated),
            scored=texts.upload(ends.scored),
            ref_logprob=ref_logprob,
            logprob=logprob,
            finished=finished,
            finished_at=texts.upload(rows) if len(rows) else None,
        )
        terms = self.rewards.paid(batch, weights)
        self._note(terms, active, texts)
        terms |= self._settle(finished, batch)
        reward = torch.stack(list(terms.values())).sum(0) if terms else torch.zeros_like(ref_logprob)
        return Paid(reward, terms, ref_logprob, after.score, self.potential(batch.scored), finished)

    @torch.no_grad()
    def potential(self, scored: Tensor | None = None) -> Tensor | None:
        """Phi (N,) of the texts as they stand, zero where `scored`; None where no term is potential-based."""
        assert self.states is not None
        potential = self.rewards.potential(self.states, self._device_weights)
        return potential if potential is None or scored is None else torch.where(scored, 0.0, potential)

    def fork(self, sources: Slots, targets: Slots, texts: TextBuffer) -> None:
        """Copies running episodes, caches included."""
        assert self.states is not None
        self.trunks.fork(sources, targets)
        for weights in self.weights.values():
            weights[targets] = weights[sources]
        source, target = texts.upload(np.asarray(sources)), texts.upload(np.asarray(targets))
        held = [self.token_rewards, *self.states.hidden.values()]
        for tensor in held + ([] if self.states.score is None else [self.states.score]):
            tensor[target] = tensor[source]
        self._refresh_weights(texts)

    def save(self, slots: Slots, texts: TextBuffer) -> dict[str, Any]:
        """What `load` needs beyond the texts: weights, rewards so far and running scores; no caches."""
        assert self.states is not None
        rows = texts.upload(np.asarray(slots))
        score = self.states.score
        return {
            "weights": {name: weights[slots].copy() for name, weights in self.weights.items()},
            "token_rewards": self.token_rewards[rows].cpu().numpy(),
            "score": None if score is None else score[rows].cpu().numpy(),
        }

    def load(self, slots: Slots, texts: TextBuffer, saved: dict[str, Any]) -> None:
        """Takes saved episodes up again; caches are filled from the texts."""
        for name, weights in saved["weights"].items():
            self.weights[name][slots] = weights
        self.token_rewards[texts.upload(np.asarray(slots))] = texts.upload(saved["token_rewards"])
        self._enter(slots, texts, None if saved["score"] is None else texts.upload(saved["score"]))

    def read_score(self, hidden: dict[int, Tensor], running: Tensor | float) -> Tensor | None:
        """The score (K,) of K texts so far from their states; a per-token scorer adds to the `running` sum."""
        scorer = self.parts.scorer
        if scorer is None:
            return None
        scores = scorer.head(hidden[id(trunk_of(scorer.model))])
        return scores + running if scorer.per_token else scores

    @torch.no_grad()
    def _enter(self, slots: Slots, texts: TextBuffer, score: Tensor | None) -> None:
        tokens, lengths = texts.rows(slots)
        hidden = self.trunks.prefill(slots, tokens, lengths)
        score = self._first_score(slots, texts, hidden) if score is None else score
        if self.states is None:
            self.states = States(hidden, score)
        else:
            rows = texts.upload(np.asarray(slots))
            for key, states in hidden.items():
                self.states.hidden[key][rows] = states
            if score is not None and self.states.score is not None:
                self.states.score[rows] = score
        self._refresh_weights(texts)

    def _first_score(self, slots: Slots, texts: TextBuffer, hidden: dict[int, Tensor]) -> Tensor | None:
        """The score of the texts that begin in `slots`: a per-token scorer has scored a prefix, but no prompt."""
        scorer = self.parts.scorer
        if scorer is None or not scorer.per_token:
            return self.read_score(hidden, 0.0)
        first = torch.zeros(len(slots), device=self.parts.device)
        for row, slot in enumerate(slots):
            if texts.unpaid[slot]:
                tokens, lengths = texts.rows([slot])
                states = self.trunks.of(scorer.model).states(tokens, lengths)
                first[row] = scorer.head(states[0, texts.prompt_length[slot] :]).sum()
        return first

    def _advance(self, tokens: Tensor, active: np.ndarray, before: States) -> States:
        hidden = self.trunks.append(tokens, active)
        return States(hidden, self.read_score(hidden, 0.0 if before.score is None else before.score))

    def _finished(self, rows: np.ndarray, texts: TextBuffer, after: States) -> FinishedTexts:
        score = None if after.score is None else after.score[texts.upload(rows)]
        return texts.finished(rows, score, self.parts.spec.tokenizer)

    def _note(self, terms: dict[str, Tensor], active: np.ndarray, texts: TextBuffer) -> None:
        """Writes the causal terms' rewards on the tokens of this step, and nothing for rows that took no token."""
        if not active.all():
            mask = texts.upload(active)
            for name in terms:
                terms[name] = torch.where(mask, terms[name], 0.0)
        if terms:
            rows = np.flatnonzero(active)
            at = texts.upload(rows), texts.upload(texts.response_length[rows] - 1)
            self.token_rewards[at] = torch.stack(list(terms.values())).sum(0)[at[0]]

    def _settle(self, finished: FinishedTexts | None, batch: Transitions) -> dict[str, Tensor]:
        """Places the hindsight terms on the finished texts' tokens; returns their sums (N,), due where a text ends."""
        sums = {name: torch.zeros(batch.tokens.shape, device=self.parts.device) for name in self.rewards.hindsight}
        if finished is None or batch.finished_at is None:
            return sums
        rows = batch.finished_at
        weights = {name: weight[rows] for name, weight in self._device_weights.items()}
        for name, placed in self.rewards.placed(finished, batch.scored[rows], weights).items():
            self.token_rewards[rows] += placed
            sums[name][rows] = placed.sum(1)
        return sums

    def _refresh_weights(self, texts: TextBuffer) -> None:
        self._device_weights = {name: texts.upload(weights.copy()) for name, weights in self.weights.items()}
