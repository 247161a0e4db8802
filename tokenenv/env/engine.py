"""The models and reward terms of the texts in N slots.

Suffixes: N slots, S terms, C causal terms, T response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.env.dynamics import Dynamics
from tokenenv.env.finite import FiniteCheck, require_finite_weight
from tokenenv.env.replies import Replies
from tokenenv.env.saved_state import Layout
from tokenenv.env.texts import TextBuffer
from tokenenv.env.transitions import Ends, transitions
from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import check_adapters_apart
from tokenenv.models.cached_lm import evaluating
from tokenenv.models.memory import keep_freed_memory
from tokenenv.models.prefix_scores import sum_dtype
from tokenenv.models.same_texts import first_equals
from tokenenv.models.trunks import Trunks, logits_head, trunk_of
from tokenenv.rewards.gold import gold_of
from tokenenv.rewards.reward_sum import RewardSum, check_memory, weight_now
from tokenenv.rewards.seen import FinishedTexts, RunningTexts, States, Transitions, WholeTexts
from tokenenv.rewards.term import Context, Learned, RewardTerm
from tokenenv.tables import Columns, require_columns
from tokenenv.types import Head, Scorer, Slots


def in_eval_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of the engine, or a function of it, find all models in eval mode; afterwards
    they are as they were."""

    @wraps(method)
    def run(engine: "RewardEngine", *args: Any, **kwargs: Any) -> Any:
        with evaluating(*engine.modules):
            return method(engine, *args, **kwargs)

    return run


@dataclass(slots=True)
class Paid:
    """What one step paid, (N,) float32 on the device."""

    reward: Tensor
    terms: dict[str, Tensor]
    """The reward's terms, weighted; they add up to it."""
    watched: dict[str, Tensor]
    """The numbers of the watched terms that are not hindsight, unweighted."""
    ref_logprob: Tensor
    score: Tensor | None
    """The scores of the texts that ended; what is in other slots means nothing."""
    potential: Tensor | None
    finished: FinishedTexts | None
    """The texts that ended, in the order of their slots; None where none did."""


class RewardEngine:
    """Advances every model by one token a step and adds up what the terms pay.

    An episode's weights are read when it starts and hold to its end, so that it earns the same
    whatever happens around it.
    """

    def __init__(
        self,
        context: Context,
        terms: dict[str, RewardTerm],
        num_slots: int,
        watched: dict[str, RewardTerm] | None = None,
        **model_options: Any,
    ) -> None:
        keep_freed_memory()
        self.context, watched = context, watched or {}
        for term in terms.values():
            term.bind(context)
        for term in watched.values():
            try:
                term.bind(replace(context, watched=True))
            except InvalidArgument as error:
                # A term says what it lacks as one of reward=; the message names what was given.
                raise InvalidArgument(str(error).replace("reward=", "watch=")) from error
        self.rewards = RewardSum(terms, context.spec.max_new_tokens, watched)
        # Whatever may refuse the terms or the models comes before memory is taken for caches.
        for term in self.rewards.with_memory.values():
            check_memory(term, context.device)
        check_adapters_apart(
            {"policy's model": context.task.model or context.reference, **self.frozen_models()}
        )
        self.dynamics = Dynamics(context, self.rewards)
        self.has_score = context.scorer is not None or self.dynamics.score_rule is not None
        self.gold = gold_of(context)
        """The task's true metric, where it is not the score."""
        models = [context.reference, *(m for t in self._bound().values() for m in t.models)]
        models += [context.causal_scorer.model] if context.causal_scorer else []
        # Where another model scores, oracle and features still read the states of the task's own.
        models += [context.task.gold.model] if isinstance(context.task.gold, Scorer) else []
        parts_of = (part for model in models for part in (model, trunk_of(model)))
        self.modules = list(dict.fromkeys(part for part in parts_of if isinstance(part, nn.Module)))
        """The models, which may be put into train mode between steps; none of them is run in it."""
        self.trunks = Trunks(models, num_slots, context.spec.max_length, **model_options)
        self.weights = {name: np.zeros(num_slots, dtype=np.float32) for name in terms}
        # The slots stand last, because a step writes a number for each of them.
        shape = (len(self.rewards.names), context.spec.max_new_tokens, num_slots)
        self._numbers_STN = torch.zeros(shape, dtype=torch.float32, device=context.device)
        paid = [i for i, name in enumerate(self.rewards.names) if name in terms]
        # On the device from the start: an index that came from the host at each end of a text
        # would have the step wait for the device.
        self._paid = torch.tensor(paid, dtype=torch.int64, device=context.device)
        self.finite = FiniteCheck(context.device)
        self.states: States | None = None
        """Of all slots; None before texts have begun in every slot."""
        self._device_weights: dict[str, Tensor] = {}
        self._nonzero: frozenset[str] = frozenset()
        """The terms whose weights are 0 in no slot."""

    @property
    def token_terms(self) -> Tensor:
        """(N, S, T): the number of each term for each token, watched ones included, in the order of
        `RewardSum.names`. A view of the engine's own."""
        return self._numbers_STN.permute(2, 0, 1)

    def require_columns(self, rows: Sequence[Columns], whose: str) -> None:
        """Raise `InvalidArgument` unless prompts that were given have the columns, `rows`, that
        the terms and `gold=` ask for."""
        require_columns(rows, sorted(self.rewards.columns), "reward= or watch=", whose)
        if self.gold is not None:
            require_columns(rows, self.gold.columns, "gold=", whose)

    def _bound(self) -> dict[str, RewardTerm]:
        return self.rewards.terms | self.rewards.watched

    def frozen_models(self) -> dict[str, Any]:
        """Return the models that are read, by role."""
        task = self.context.task
        found = {
            "reference": task.reference,
            "reward model": getattr(task.scorer, "model", None),
            "implicit model": task.implicit_model,
            "teacher": task.teacher,
            "step scorer": getattr(task.step_scorer, "model", None),
        }
        for name, term in self._bound().items():
            kind = "watched" if name in self.rewards.watched else "reward"
            found |= {f"model {i} of {kind} term {name!r}": m for i, m in enumerate(term.models)}
        return {role: model for role, model in found.items() if model is not None}

    def features(self) -> Tensor:
        """Return what `observation="features"` shows of each text, (N, F) float32."""
        assert self.states is not None
        if self.context.task.features is not None:
            return self.context.task.features(self.states.hidden, self.states.step)
        return self.states.of(self.context.reference).float()

    # -------------------------------------------------------------- beginning

    def weights_now(self, tokens_seen: int, kl_coef: float) -> dict[str, float]:
        """Return the weights of an episode that begins now; `InvalidArgument` where a schedule
        gives none."""
        weights = {
            name: kl_coef if name == "kl" else weight_now(term.weight, tokens_seen)
            for name, term in self.rewards.terms.items()
        }
        for name, weight in weights.items():
            require_finite_weight(name, weight, tokens_seen)
        return weights

    @torch.no_grad()
    @in_eval_mode
    def start(self, slots: Slots, texts: TextBuffer, weights: dict[str, float]) -> None:
        """Begin the texts of `slots`, with the given weight of each term."""
        for name, weight in weights.items():
            self.weights[name][slots] = weight
        if len(slots) == self._numbers_STN.shape[2]:
            self._numbers_STN.zero_()
        else:
            # index_fill_: on a GPU, assigning a number waits for the device.
            self._numbers_STN.index_fill_(2, texts.upload(np.asarray(slots)), 0.0)
        given = texts.whole(slots, int(texts.length[slots].max()))
        statistics = {
            name: s.expand(len(slots), -1).clone() for name, s in self.rewards.statistics().items()
        }
        hidden = self._read(slots, given)
        states = self.dynamics.begin(given, hidden, statistics, self.trunks)
        self._put(slots, texts, states)

    @torch.no_grad()
    @in_eval_mode
    def load(self, slots: Slots, texts: TextBuffer, saved: dict[str, Any]) -> None:
        """Take saved episodes up again; caches are filled from the texts."""
        for name, weights in saved["weights"].items():
            self.weights[name][slots] = weights
        self.token_terms[texts.upload(np.asarray(slots))] = texts.upload(saved["token_terms"])
        given = texts.whole(slots, int(texts.length[slots].max()))
        hidden = self._read(slots, given)
        states = States(hidden, texts.upload(given.steps()))
        scorer, score = self.context.causal_scorer, saved["score"]
        if score is not None and scorer is not None:
            # float64 on disk, where a sum is float32 on a device without float64.
            wide = scorer.per_token and sum_dtype(self.context.device) == torch.float64
            states.score = texts.upload(score if wide else score.astype(np.float32))
        for name in self.rewards.with_memory:
            states.memory[name] = texts.upload(saved["memory"][name])
        for name in self.rewards.statistics():
            states.statistics[name] = texts.upload(saved["statistics"][name])
        self._put(slots, texts, states)

    def _read(self, slots: Slots, texts: WholeTexts) -> dict[Any, Tensor]:
        """Fill the caches of `slots` (n,) with texts, each different one read once. Return the
        state (n, H) after each text, by trunk."""
        # The host knows the texts, so nothing waits for the device.
        first = first_equals(torch.from_numpy(np.asarray(texts.ids)), texts.length)
        return self.trunks.prefill(slots, texts.tokens, texts.length.tolist(), first)

    def _put(self, slots: Slots, texts: TextBuffer, states: States) -> None:
        if self.states is None:
            self.states = states
        else:
            self.states.put(texts.upload(np.asarray(slots)), states)
        self.states.texts = texts.running(self.context.spec.tokenizer)
        self._upload_weights(texts)

    def _upload_weights(self, texts: TextBuffer) -> None:
        self._device_weights = {name: texts.upload(w) for name, w in self.weights.items()}
        self._nonzero = frozenset(name for name, w in self.weights.items() if w.all())

    def forget(self) -> None:
        """Hold no text any more, as before the first `start`, which must now be of every slot."""
        self.states = None
        self.finite.clear()

    # -------------------------------------------------------------- advancing

    @in_eval_mode
    def step(
        self,
        tokens: Tensor,
        logprob: Tensor | None,
        active: np.ndarray,
        ends: Ends,
        texts: TextBuffer,
        replies: Replies | None = None,
    ) -> Paid:
        """Advance each active slot by one token (N,), and by what the environment wrote behind it.
        `texts` already holds both; `replies` is None where the environment never writes."""
        assert self.states is not None
        # Models first, since terms read the states before and after the token; then the texts that
        # end, which must be whole before a term sees the transitions.
        before, dynamics = self.states, self.dynamics
        hidden = self.trunks.append(tokens, active)
        whole = texts.running(self.context.spec.tokenizer)
        running = whole if replies is None else replace(whole, length=replies.length)
        earned = None if replies is None else texts.upload(replies.reward)
        after = dynamics.advance(before, hidden, tokens, running, earned)
        self.states = next = self._read_replies(after, replies, texts, whole)
        slots = np.flatnonzero(ends.ended)
        ended = texts.whole(slots) if len(slots) else None
        batch = transitions(
            dynamics,
            tokens,
            before,
            after,
            ends,
            ended,
            next=next,
            active=active,
            learning=True,
            logprob=logprob,
            ends_turn=None if replies is None else replies.wrote | ends.ended,
        )
        assert batch.ref_logprob is not None
        if batch.finished is not None:
            # Before the texts are priced: a model is not asked about what it has learned from.
            self.rewards.update_models()
        terms = self._pay(batch, active, texts)
        watched = {name: terms.pop(name) for name in self.rewards.watched if name in terms}
        first, *others = terms.values() or [torch.zeros_like(batch.ref_logprob)]
        reward = sum(others, start=first.clone())  # always in the same order
        # What is watched is left out: a number that is never paid stops no run.
        self.finite.look(terms, reward, batch.ref_logprob, tokens, before.step)
        score, potential = None, None
        if batch.finished is not None:
            score = self._scores(batch)
        if self.rewards.shaped:
            potential = self.potential(batch.scored)
        return Paid(reward, terms, watched, batch.ref_logprob, score, potential, batch.finished)

    def _read_replies(
        self, after: States, replies: Replies | None, texts: TextBuffer, whole: RunningTexts
    ) -> States:
        """Have the models read what the environment wrote, in one forward; return the states (N,)
        in which the policy acts next."""
        if replies is None or not len(replies.slots):
            return after
        lengths = np.asarray([len(ids) for ids in replies.tokens], dtype=np.int64)
        tokens = texts.upload(replies.padded())
        hidden = self.trunks.extend(replies.slots, tokens, lengths)
        return self.dynamics.read(after, hidden, replies.slots, tokens, lengths, whole)

    def _pay(self, batch: Transitions, active: np.ndarray, texts: TextBuffer) -> dict[str, Tensor]:
        """The number (N,) of each term for this step, zero in slots that took no token.

        A causal term's number is written on the step's token. A hindsight term is placed on all
        tokens of the texts that end; its sum is paid now, unless it is watched.
        """
        terms = self.rewards.paid(batch, self._device_weights, self._nonzero)
        if terms:
            if not active.all():
                mask = texts.upload(active)
                terms = {name: torch.where(mask, values, 0.0) for name, values in terms.items()}
            # A slot that took no token has ended, and its step may be beyond the last token. What
            # is written there does not matter: the slot begins anew, and its numbers with it.
            at = batch.before.step.clamp(max=self._numbers_STN.shape[1] - 1)
            causal_C1N = torch.stack(list(terms.values()))[:, None]
            self._numbers_STN.scatter_(1, at.expand_as(causal_C1N), causal_C1N)
        for name in self.rewards.hindsight:
            if name in self.rewards.terms:
                terms[name] = torch.zeros(
                    len(active), dtype=torch.float32, device=self.context.device
                )
        if batch.finished is not None and self.rewards.hindsight:
            slots = batch.finished_at
            weights = {name: weight[slots] for name, weight in self._device_weights.items()}
            for name, placed in self.rewards.placed(batch.finished, weights).items():
                self.token_terms[slots, self.rewards.names.index(name)] = placed
                if name in terms:
                    terms[name][slots] = placed.sum(1)
        return terms

    def _scores(self, batch: Transitions) -> Tensor | None:
        """The scores (N,) of the texts that ended, in their slots, as a copy."""
        assert batch.finished is not None
        assert batch.finished_at is not None
        if batch.finished.score is None:
            return None
        nothing = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=self.context.device)
        return nothing.index_copy(0, batch.finished_at, batch.finished.score)

    @torch.no_grad()
    def potential(self, scored: Tensor | None = None) -> Tensor | None:
        """Return Phi (N,) of the texts as they stand, zero where `scored`; None where no term is
        potential-based."""
        assert self.states is not None
        potential = self.rewards.potential(self.states, self._device_weights, self._nonzero)
        if potential is None or scored is None:
            return potential
        return torch.where(scored, 0.0, potential)

    def token_numbers(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return as copies the reward (N, T) of each token, watched terms left out, and the numbers
        (N, T) of each term by name, watched ones included."""
        # Turned round once for all terms. `clone`, because `contiguous` gives no copy of one slot.
        numbers_SNT = self._numbers_STN.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        paid = numbers_SNT.index_select(0, self._paid) if self.rewards.watched else numbers_SNT
        return paid.sum(0), dict(zip(self.rewards.names, numbers_SNT, strict=True))

    @torch.no_grad()
    def ref_logprobs(self) -> Tensor:
        """Return log pi_ref of every next token, (N, V) in nats."""
        assert self.states is not None
        logits = self.ref_head(self.states.of(self.context.reference)).float()
        # `log_softmax` is 2e-5 off at large vocabularies.
        return logits - logits.logsumexp(-1, keepdim=True)

    @cached_property
    def ref_head(self) -> Head:
        """The reference's states (K, H) to logits (K, V); made once, since it is tried out when it
        is made."""
        return logits_head(self.context.reference, self.context.spec.vocab_size)

    # ------------------------------------------------------- copying and saving

    def fork(self, sources: Slots, targets: Slots, texts: TextBuffer) -> None:
        """Copy running episodes, caches included."""
        assert self.states is not None
        self.trunks.fork(sources, targets)
        for weights in self.weights.values():
            weights[targets] = weights[sources]
        source, target = texts.upload(np.asarray(sources)), texts.upload(np.asarray(targets))
        for tensor in [self.token_terms, *self.states.tensors()]:
            tensor[target] = tensor[source]
        self.states.known.clear()
        self.states.texts = texts.running(self.context.spec.tokenizer)
        self._upload_weights(texts)

    def save(self, slots: Slots, texts: TextBuffer) -> dict[str, Any]:
        """Return what `load` needs beyond the texts (weights, rewards, running scores, memories,
        statistics), without caches, and what terms have learned, which belongs to all texts."""
        assert self.states is not None
        chosen = self.states.at(texts.upload(np.asarray(slots)))
        return {
            "weights": {name: weights[slots].copy() for name, weights in self.weights.items()},
            "token_terms": _host(self.token_terms[texts.upload(np.asarray(slots))]),
            "score": None if chosen.score is None else _host(chosen.score.double()),
            "memory": {name: _host(memory) for name, memory in chosen.memory.items()},
            "statistics": {name: _host(numbers) for name, numbers in chosen.statistics.items()},
            "learned": self.save_statistics(),
        }

    def layout(self, count: int) -> Layout:
        """Return the shapes and dtypes of the arrays that `save` returns for `count` slots."""
        with_memory = self.rewards.with_memory.items()
        return {
            "weights": dict.fromkeys(self.weights, ((count,), np.float32)),
            "token_terms": ((count, *self.token_terms.shape[1:]), np.float32),
            "score": ((count,), np.float64) if self.context.causal_scorer else None,
            "memory": {
                name: ((count, *term.memory_shape), numpy_dtype(term.memory_dtype))
                for name, term in with_memory
            },
            "statistics": {
                name: ((count, len(s)), np.float32) for name, s in self.rewards.statistics().items()
            },
            "learned": {name: _layout(learned) for name, learned in self.snapshot().items()},
        }

    def save_statistics(self) -> dict[str, Any]:
        """Return what terms have learned, by name, of those that learn: arrays, or nested mappings
        of arrays."""
        return {name: _host(learned) for name, learned in self.snapshot().items()}

    def snapshot(self) -> dict[str, Learned]:
        """Return what terms have learned, by name, each where it is, on the device or on the host,
        so that nothing waits for the device. Arrays are copies; what a mapping holds is the term's,
        which does not change it."""
        found: dict[str, Learned] = {}
        for name, term in self.rewards.every.items():
            learned = term.save_statistics()
            if learned is not None:
                found[name] = learned if isinstance(learned, Mapping) else _copied(learned)
        return found

    def load_statistics(self, saved: Mapping[str, Learned]) -> None:
        """Go on from what `save_statistics` or `snapshot` returned."""
        for name, values in saved.items():
            self.rewards.every[name].load_statistics(_copied(values))


def numpy_dtype(dtype: torch.dtype) -> type[np.generic]:
    """Return NumPy's name of a dtype."""
    return torch.empty(0, dtype=dtype).numpy().dtype.type


def _layout(learned: Learned) -> Any:
    """The shape and dtype of what a term has learned, as a state holds it."""
    if isinstance(learned, Mapping):
        return {name: _layout(part) for name, part in learned.items()}
    if isinstance(learned, np.ndarray):
        return tuple(learned.shape), learned.dtype.type
    return tuple(learned.shape), numpy_dtype(learned.dtype)


def _host(values: Learned) -> Any:
    """A copy on the host."""
    if isinstance(values, Mapping):
        return {name: _host(part) for name, part in values.items()}
    return values.cpu().numpy().copy() if isinstance(values, Tensor) else values.copy()


def _copied(values: Learned) -> Learned:
    if isinstance(values, Mapping):
        return {name: _copied(part) for name, part in values.items()}
    return values.clone() if isinstance(values, Tensor) else values.copy()
