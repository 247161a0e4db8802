"""The models and reward terms of N running texts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.env.finite import RewardWatch, require_finite_weight
from tokenenv.env.saved_state import Layout
from tokenenv.env.texts import TextBuffer
from tokenenv.models.adapters import check_adapters_apart
from tokenenv.models.cached_lm import evaluating
from tokenenv.models.prefix_scores import read_length, score_texts, sum_dtype
from tokenenv.models.trunks import Trunks, logits_head, logprob_reader, trunk_of
from tokenenv.rewards.term import (
    Context,
    FinishedTexts,
    RewardSum,
    RewardTerm,
    RunningTexts,
    States,
    Transitions,
    weight_now,
)
from tokenenv.types import Head, Scorer, Slots


def in_eval_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the engine, or a function of it, that finds all models in eval mode; afterwards
    they are as they were."""

    @wraps(method)
    def run(engine: "RewardEngine", *args: Any, **kwargs: Any) -> Any:
        with evaluating(*engine.modules):
            return method(engine, *args, **kwargs)

    return run


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum (N,) of at least one term, always added in the same order."""
    first, *others = terms.values()
    return sum(others, start=first.clone())


@dataclass(slots=True)
class Ends:
    """Which rows of a step end, (N,) bool on the host."""

    terminated: np.ndarray
    """By a stop token."""
    truncated: np.ndarray
    """Cut at `max_new_tokens`."""
    scored: np.ndarray
    """Terminated, or truncated where truncated texts are scored: learners do not bootstrap
    there."""

    @property
    def ended(self) -> np.ndarray:
        """(N,) bool."""
        return self.terminated | self.truncated

    def flags(self, cut: str) -> tuple[np.ndarray, np.ndarray]:
        """Terminations and truncations as `step` returns them; `cut` names the flag of a scored
        cut."""
        terminations = self.scored if cut == "terminated" else self.terminated
        return terminations, self.ended & ~terminations


@dataclass(slots=True)
class Paid:
    """What one step paid, (N,) float32 on the device."""

    reward: Tensor
    terms: dict[str, Tensor]
    ref_logprob: Tensor
    score: Tensor | None
    """The score of each text that ended."""
    potential: Tensor | None
    finished: FinishedTexts | None
    """The texts that ended, in the order of their rows."""


class RewardEngine:
    """Advances every model by one token a step and adds up what the terms pay.

    An episode's weights are read when it starts and hold to its end, so that it earns the same
    whatever happens around it.
    """

    def __init__(
        self, context: Context, terms: dict[str, RewardTerm], num_rows: int, **model_options: Any
    ) -> None:
        for term in terms.values():
            term.bind(context)
        self.context = context
        self.rewards = RewardSum(terms, context.spec.max_new_tokens)
        check_adapters_apart(
            {"policy's model": context.task.model or context.reference, **self.frozen_models()}
        )
        self.ref_logprob = logprob_reader(
            context.reference, context.spec.vocab_size
        )  # before memory is taken: it may refuse
        models = [context.reference, *(m for term in terms.values() for m in term.models)]
        models += [context.causal_scorer.model] if context.causal_scorer else []
        parts_of = (part for model in models for part in (model, trunk_of(model)))
        self.modules = list(dict.fromkeys(part for part in parts_of if isinstance(part, nn.Module)))
        """The models, which may be put into train mode between steps; none of them is run in it."""
        max_length = context.spec.max_prompt_tokens + context.spec.max_new_tokens
        self.trunks = Trunks(models, num_rows, max_length, **model_options)
        self.weights = {name: np.zeros(num_rows, dtype=np.float32) for name in terms}
        self.token_terms = torch.zeros(
            num_rows,
            len(terms),
            context.spec.max_new_tokens,
            dtype=torch.float32,
            device=context.device,
        )
        """(N, S, T): what each of the S terms has paid for each token, in the order of
        `term_names`."""
        self.watch = RewardWatch(context.device)
        self.states: States | None = None
        self._device_weights: dict[str, Tensor] = {}

    def frozen_models(self) -> dict[str, Any]:
        """The models that are read, by role."""
        task = self.context.task
        found = {
            "reference": task.reference,
            "reward model": getattr(task.scorer, "model", None),
            "implicit model": task.implicit_model,
            "step scorer": getattr(task.step_scorer, "model", None),
        }
        for name, term in self.rewards.terms.items():
            found |= {
                f"model {i} of reward term {name!r}": model for i, model in enumerate(term.models)
            }
        return {role: model for role, model in found.items() if model is not None}

    @property
    def term_names(self) -> list[str]:
        """The causal terms, then the hindsight ones."""
        return [*self.rewards.causal, *self.rewards.hindsight]

    @property
    def started(self) -> bool:
        """Whether every row holds a text."""
        return self.states is not None

    def features(self) -> Tensor:
        """What `observation="features"` shows of each text, (N, F) float32."""
        assert self.states is not None
        if self.context.task.features is not None:
            return self.context.task.features(self.states.hidden, self.states.step)
        return self.states.of(self.context.reference).float()

    def start(self, slots: Slots, texts: TextBuffer, weights: dict[str, float]) -> None:
        """Begins the texts of `slots`, with the given weight of each term."""
        for name, weight in weights.items():
            self.weights[name][slots] = weight
        # index_fill_: on a GPU, assigning a number waits for the device.
        self.token_terms.index_fill_(0, texts.upload(np.asarray(slots)), 0.0)
        self._enter(slots, texts)

    def weights_now(self, tokens_seen: int, kl_coef: float) -> dict[str, float]:
        """The weights of an episode that begins now; `InvalidArgument` where a schedule gives
        none."""
        terms = self.rewards.terms.items()
        weights = {
            name: kl_coef if name == "kl" else weight_now(term.weight, tokens_seen)
            for name, term in terms
        }
        for name, weight in weights.items():
            require_finite_weight(name, weight, tokens_seen)
        return weights

    @in_eval_mode
    def step(
        self,
        tokens: Tensor,
        logprob: Tensor | None,
        active: np.ndarray,
        ends: Ends,
        texts: TextBuffer,
    ) -> Paid:
        """One token (N,) in each active row; `texts` already holds it."""
        assert self.states is not None
        before, weights = self.states, self._device_weights
        ref_logprob = self.ref_logprob(before.of(self.context.reference), tokens)
        self.states = after = self._advance(tokens, active, before, texts)
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
            learning=texts.upload(active) if self.states.statistics else None,
        )
        terms = self.rewards.paid(batch, weights)
        self._note(terms, before.step, active, texts)
        terms |= self._settle(finished, batch)
        reward = total(terms) if terms else torch.zeros_like(ref_logprob)
        self.watch.look(terms, reward, ref_logprob, tokens, before.step)
        return Paid(
            reward, terms, ref_logprob, self._scores(batch), self.potential(batch.scored), finished
        )

    @torch.no_grad()
    def ref_logprobs(self) -> Tensor:
        """log pi_ref of every next token, (N, V)."""
        assert self.states is not None
        return torch.log_softmax(
            self.ref_head(self.states.of(self.context.reference)).float(), dim=-1
        )

    @cached_property
    def ref_head(self) -> Head:
        """The reference's states (K, H) to logits (K, V); made once, since it is tried out when it
        is made."""
        return logits_head(self.context.reference, self.context.spec.vocab_size)

    @torch.no_grad()
    def potential(self, scored: Tensor | None = None) -> Tensor | None:
        """Phi (N,) of the texts as they stand, zero where `scored`; None where no term is
        potential-based."""
        assert self.states is not None
        potential = self.rewards.potential(self.states, self._device_weights)
        return (
            potential
            if potential is None or scored is None
            else torch.where(scored, 0.0, potential)
        )

    def _scores(self, batch: Transitions) -> Tensor | None:
        """The scores (N,) of the texts that ended; what is in other rows means nothing."""
        if batch.after.score is not None:
            return batch.after.score.float()
        if batch.finished is None or batch.finished.score is None:
            return None
        assert batch.finished_at is not None
        nothing = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=self.context.device)
        return nothing.index_copy(0, batch.finished_at, batch.finished.score)

    def fork(self, sources: Slots, targets: Slots, texts: TextBuffer) -> None:
        """Copies running episodes, caches included."""
        assert self.states is not None
        self.trunks.fork(sources, targets)
        for weights in self.weights.values():
            weights[targets] = weights[sources]
        source, target = texts.upload(np.asarray(sources)), texts.upload(np.asarray(targets))
        for tensor in [self.token_terms, *self.states.tensors()]:
            tensor[target] = tensor[source]
        self.states.texts = self._running(texts)
        self._refresh_weights(texts)

    def save(self, slots: Slots, texts: TextBuffer) -> dict[str, Any]:
        """What `load` needs beyond the texts (weights, rewards, running scores, memories,
        statistics), without caches; and what terms have learned, which belongs to all texts."""
        assert self.states is not None
        chosen = self.states.at(texts.upload(np.asarray(slots)))
        return {
            "weights": {name: weights[slots].copy() for name, weights in self.weights.items()},
            "token_terms": _host(self.token_terms[texts.upload(np.asarray(slots))]),
            "score": None if chosen.score is None else _host(chosen.score.double()),
            "memory": {name: _host(memory) for name, memory in chosen.memory.items()},
            "statistics": {
                name: _host(statistics) for name, statistics in chosen.statistics.items()
            },
            "learned": self.save_statistics(),
        }

    def save_statistics(self) -> dict[str, np.ndarray]:
        """What terms have learned, by name, of those that learn."""
        return {name: _host(learned) for name, learned in self.snapshot().items()}

    def snapshot(self) -> dict[str, Tensor | np.ndarray]:
        """The same where it is, on the device or on the host, so that nothing waits for it."""
        learned = {name: term.save_statistics() for name, term in self.rewards.every.items()}
        return {name: _copied(values) for name, values in learned.items() if values is not None}

    def load_statistics(self, saved: Mapping[str, Tensor | np.ndarray]) -> None:
        """Goes on from what `save_statistics` or `snapshot` returned."""
        for name, values in saved.items():
            self.rewards.every[name].load_statistics(_copied(values))

    def forget(self) -> None:
        """Holds no text any more, as before the first `start`, which must now be of every row."""
        self.states = None
        self.watch.clear()

    def layout(self, count: int) -> Layout:
        """The arrays that `save` returns for so many slots."""
        floats, doubles = ((count,), np.float32), ((count,), np.float64)
        return {
            "weights": dict.fromkeys(self.weights, floats),
            "token_terms": ((count, *self.token_terms.shape[1:]), np.float32),
            "score": doubles if self.context.causal_scorer else None,
            "memory": dict.fromkeys(self.rewards.with_memory, floats),
            "statistics": {
                name: ((count, len(s)), np.float32) for name, s in self.rewards.statistics().items()
            },
            "learned": {
                name: (array.shape, np.float64) for name, array in self.save_statistics().items()
            },
        }

    def load(self, slots: Slots, texts: TextBuffer, saved: dict[str, Any]) -> None:
        """Takes saved episodes up again; caches are filled from the texts."""
        for name, weights in saved["weights"].items():
            self.weights[name][slots] = weights
        self.token_terms[texts.upload(np.asarray(slots))] = texts.upload(saved["token_terms"])
        self._enter(slots, texts, saved)

    def _next_score(self, after: States, tokens: Tensor, before: Tensor | None) -> Tensor | None:
        """The scores (K,) of K texts from their states after `tokens` (K,) and the scores before
        them: a per-token scorer adds to the sum, in float64, as in float32 thousands of tokens
        drift; any other passes over pad tokens."""
        scorer = self.context.causal_scorer
        if scorer is None or before is None:
            return None
        scores = scorer.head(after.of(scorer.model))
        if scorer.per_token:
            return scores.to(before.dtype) + before
        return (
            scores
            if scorer.pad_token_id is None
            else torch.where(tokens == scorer.pad_token_id, before, scores)
        )

    def read_finished(self, texts: FinishedTexts) -> None:
        """Scores finished texts with a scorer that reads no prefixes; sets their `token_scores` and
        `score`."""
        scorer = self.context.scorer
        if scorer is None or isinstance(scorer, Scorer):
            return
        scores = scorer.token_scores(
            texts.prompt_and_response_ids(), self.context.spec.max_new_tokens
        )
        texts.token_scores = scores.to(self.context.device)
        texts.score = texts.token_scores.sum(1)

    @torch.no_grad()
    @in_eval_mode
    def _enter(self, slots: Slots, texts: TextBuffer, saved: dict[str, Any] | None = None) -> None:
        """Reads the texts of `slots` from their start; `saved` holds what cannot be read off
        them."""
        tokens, lengths = texts.rows(slots)
        hidden = self.trunks.prefill(slots, tokens, lengths)
        states = States(hidden, texts.upload(texts.response_length[slots]))
        states.texts = texts.running(slots, self.context.spec.tokenizer)
        if saved is None:
            states.score = self._first_score(slots, texts, states)
            states.statistics = {
                name: s.expand(len(slots), -1).clone()
                for name, s in self.rewards.statistics().items()
            }
            last = texts.upload(texts.tokens[slots, texts.length[slots] - 1])
            # Copies: a term may well return the scores themselves.
            first = {
                name: term.remember(None, last, states)
                for name, term in self.rewards.with_memory.items()
            }
            states.memory = {
                name: memory.to(torch.float32, copy=True) for name, memory in first.items()
            }
        else:
            states.score = self._loaded_score(saved["score"], texts)
            states.memory = {
                name: texts.upload(saved["memory"][name]) for name in self.rewards.with_memory
            }
            states.statistics = {
                name: texts.upload(saved["statistics"][name]) for name in self.rewards.statistics()
            }
        if self.states is None:
            self.states = states
        else:
            self.states.put(texts.upload(np.asarray(slots)), states)
            self.states.texts = self._running(texts)
        self._refresh_weights(texts)

    def _first_score(self, slots: Slots, texts: TextBuffer, states: States) -> Tensor | None:
        """The score of the texts that begin in `slots`, from their states: a per-token scorer has
        scored a prefix, but no prompt, and any other may have read the text at an earlier token
        than its last."""
        scorer = self.context.causal_scorer
        if scorer is None:
            return None
        if scorer.per_token:
            return self._prefix_scores(scorer, slots, texts)
        first = scorer.head(states.of(scorer.model)).clone()
        for row, slot in enumerate(slots):
            ids = texts.tokens[slot, : texts.length[slot]]
            if read_length(ids, scorer.pad_token_id) < len(ids):
                first[row] = score_texts(scorer, [(ids.tolist(), [])])[0]
        return first

    def _prefix_scores(self, scorer: Scorer, slots: Slots, texts: TextBuffer) -> Tensor:
        first = torch.zeros(
            len(slots), dtype=sum_dtype(self.context.device), device=self.context.device
        )
        for row, slot in enumerate(slots):
            if texts.prefix_length[slot]:
                tokens, lengths = texts.rows([slot])
                states = self.trunks.of(scorer.model).states(tokens, lengths)
                first[row] = (
                    scorer.head(states[0, texts.prompt_length[slot] :]).to(first.dtype).sum()
                )
        return first

    def _loaded_score(self, saved: np.ndarray | None, texts: TextBuffer) -> Tensor | None:
        scorer = self.context.causal_scorer
        if saved is None or scorer is None:
            return None
        dtype = sum_dtype(self.context.device) if scorer.per_token else torch.float32
        return texts.upload(saved.astype(np.float32) if dtype == torch.float32 else saved)

    def _advance(
        self, tokens: Tensor, active: np.ndarray, before: States, texts: TextBuffer
    ) -> States:
        hidden = self.trunks.append(tokens, active)
        after = States(hidden, before.step + 1, None, {}, before.statistics, self._running(texts))
        after.score = self._next_score(after, tokens, before.score)
        for name, term in self.rewards.with_memory.items():
            after.memory[name] = term.remember(before.memory[name], tokens, after).float()
        return after

    def _running(self, texts: TextBuffer) -> RunningTexts:
        """All N texts as they stand, for terms that read them on the host."""
        return texts.running(np.arange(len(texts.tokens)), self.context.spec.tokenizer)

    def _finished(self, rows: np.ndarray, texts: TextBuffer, after: States) -> FinishedTexts:
        index = texts.upload(rows)
        score = None if after.score is None else after.score[index].float()
        finished = texts.finished(rows, score, self.context.spec.tokenizer)
        finished.statistics = {
            name: statistics[index] for name, statistics in after.statistics.items()
        }
        finished.learning = True
        self.read_finished(finished)
        return finished

    def _note(
        self, terms: dict[str, Tensor], step: Tensor, active: np.ndarray, texts: TextBuffer
    ) -> None:
        """Writes the causal terms' rewards on the tokens of this step (N,), and nothing for rows
        that took no token."""
        if not active.all():
            mask = texts.upload(active)
            for name in terms:
                terms[name] = torch.where(mask, terms[name], 0.0)
        if terms:
            # Rows that took no token have ended: they begin anew, and with them their line here.
            at = step.clamp(max=self.token_terms.shape[2] - 1)
            causal_NS1 = torch.stack(list(terms.values()), 1)[:, :, None]
            self.token_terms.scatter_(2, at[:, None, None].expand_as(causal_NS1), causal_NS1)

    def _settle(self, finished: FinishedTexts | None, batch: Transitions) -> dict[str, Tensor]:
        """Places the hindsight terms on the finished texts' tokens; returns their sums (N,), due
        where a text ends."""
        nothing = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=self.context.device)
        sums = {name: nothing.clone() for name in self.rewards.hindsight}
        if finished is None or batch.finished_at is None:
            return sums
        rows = batch.finished_at
        weights = {name: weight[rows] for name, weight in self._device_weights.items()}
        for name, placed in self.rewards.placed(finished, batch.scored[rows], weights).items():
            self.token_terms[rows, self.term_names.index(name)] = placed
            sums[name][rows] = placed.sum(1)
        return sums

    def _refresh_weights(self, texts: TextBuffer) -> None:
        self._device_weights = {
            name: texts.upload(weights) for name, weights in self.weights.items()
        }


def _host(values: Tensor | np.ndarray) -> np.ndarray:
    """A copy on the host."""
    return values.cpu().numpy().copy() if isinstance(values, Tensor) else values.copy()


def _copied(values: Tensor | np.ndarray) -> Tensor | np.ndarray:
    return values.clone() if isinstance(values, Tensor) else values.copy()
