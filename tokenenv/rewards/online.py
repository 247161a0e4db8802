"""A reward model that learns from outcomes while the policy trains, and pays each token.

Suffixes: B texts, T tokens of the policy's own, C texts that may wait.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv import ranks
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.adapters import adapter_layers, beside, train_adapters, with_lora
from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.trunks import log_ratio, logprob_reader
from tokenenv.rewards.gold import Gold, gold_of
from tokenenv.rewards.outcomes import (
    Texts,
    as_texts,
    nobody,
    outcome_loss,
    own_logprobs,
    pushed,
)
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context, RewardTerm, trainable

OUTCOMES = ("score", "gold")
MAX_GRAD_NORM = 1.0
"""The gradient of an update is scaled down to this norm."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What has been learned, and the texts that wait to be learned from.

    No array is changed once it is here: an update makes new ones. So an env may keep this object
    through a step, and go back to it where the step is interrupted.
    """

    weights: dict[str, Tensor]
    """The weights that are trained, by name."""
    mean: dict[str, Tensor]
    """AdamW's running means of their gradients."""
    square: dict[str, Tensor]
    """AdamW's running means of the squares."""
    waiting: dict[str, np.ndarray]
    """Of C texts, the newest last: the fields of `Texts`, `ref_logprob` (C, T) and `outcome`
    (C,)."""
    counts: np.ndarray
    """int64: the version, the texts that wait, the version that priced the first text since the
    policy's last update, and the policy's updates; -1 where there is none of the last two."""

    @property
    def version(self) -> int:
        """Updates that the model has had."""
        return int(self.counts[0])

    def counted(self, **changes: int) -> np.ndarray:
        """Return `counts` with some of them changed."""
        names = ("version", "waiting", "first", "policy")
        now = dict(zip(names, self.counts.tolist(), strict=True)) | changes
        return np.asarray([now[name] for name in names], dtype=np.int64)


class Prime(RewardTerm):
    """The log-ratio of a language model to the reference, where the model learns from the outcomes
    of the policy's own texts while the policy trains (PRIME, Cui et al. 2025, arXiv 2502.01456):
    r_t = coef (log pi_phi - log pi_ref)(y_t | s_t) + mix [outcome at the end].

    phi is trained by cross-entropy of sigmoid(sum of the log-ratio rewards) on outcomes, 0 or 1: no
    token is labelled. Because it goes on learning from what the policy writes now, it is harder to
    exploit than a frozen model. It is `Implicit` otherwise, and preserves neither return nor
    gradient.

    A text is priced where it ends (hindsight), by one version of the model and in one forward of
    the whole text. The version that prices it has not seen it. Each token's reward depends on
    nothing that comes after it. `infos["reward_version"]` says which version it was. Texts wait
    until the model's next update, which learns once from all that wait; a text that is cut and not
    scored has no outcome and is left out. In `watch=` the term learns nothing.

    Args:
        model: the causal language model, with the reference's tokens, that training begins from; it
            is copied. None takes the task's `implicit_model`, or else the reference: all rewards
            are then 0 before the first update.
        coef: reward per nat.
        mix: the weight of the outcome, which is paid where a scored text ends.
        outcome: what gives a text's outcome: "score", "gold" (the task's true metric) or a function
            of (prompt, response), or a `Rule`.
        threshold: the outcome is 1 where that number is at least this, else 0.
        every: texts that wait before the model is updated, 1 or more.
        max_lag: the most updates that may lie between the version that priced a text and the
            present one when the policy learns from that text, 0 or more. While another update would
            be too much, more texts wait. None sets no limit. It holds for learners that call
            `envs.unwrapped.policy_updated`, as the bundled agents do.
        capacity: texts that may wait at most; the oldest are dropped beyond it.
        lr: of AdamW, without weight decay; 1e-6 in the paper, at 7 billion weights.
        lora_rank: the rank of low-rank adapters that are trained in place of all weights; those
            weights are then shared with the task's model. 0 trains a full copy.
        seed: of the adapters' first weights.
    """

    name = "prime"
    kind = "hindsight"
    preserves_return = False
    preserves_gradient = False

    def __init__(
        self,
        model: Any = None,
        *,
        coef: float = 0.05,
        mix: float = 1.0,
        outcome: str | Rule | Callable[..., Any] = "score",
        threshold: float = 0.5,
        every: int = 32,
        max_lag: int | None = 0,
        capacity: int = 512,
        lr: float = 1e-4,
        lora_rank: int = 0,
        seed: int = 0,
    ) -> None:
        if not (callable(outcome) or isinstance(outcome, Rule)):
            check_choice("outcome", outcome, OUTCOMES)
        check_counts(every=every, max_lag=max_lag, capacity=capacity)
        if every > capacity:
            raise InvalidArgument(
                f"every={every} is more than capacity={capacity}: so many texts never wait."
            )
        if not lr > 0:
            raise InvalidArgument(f"lr={lr} is not allowed; it must be more than 0.")
        self.model, self.coef, self.mix = model, coef, mix
        self.outcome, self.threshold = outcome, threshold
        self.every, self.max_lag, self.capacity = every, max_lag, capacity
        self.lr, self.lora_rank, self.seed = lr, lora_rank, seed
        needs = {"reference": True, "trainable model": model is None, "scorer": outcome == "score"}
        self.needs = frozenset(need for need, needed in needs.items() if needed)
        if outcome not in OUTCOMES:
            self.columns = as_rule(outcome).columns

    # ------------------------------------------------------------------- making it

    def bind(self, context: Context) -> None:
        """Makes the copy that is trained."""
        super().bind(context)
        spec, task = context.spec, context.task
        self._watched, self._device = context.watched, context.device
        self._max_batch_tokens = context.max_batch_tokens
        self._rule = self._bound_rule(context)
        base = context.trainable_model if self.model is None else self.model
        if trainable(base) is None:
            raise InvalidArgument(f"model={type(base).__name__} has no weights to train.")
        # Whoever gave another model may train it, so nothing is shared with that one.
        frozen = base is task.reference or base is task.implicit_model
        self._trained = copy_to_train(
            base if frozen else copy.deepcopy(base), self.lora_rank, self.seed
        )
        self._reference = task.reference
        self._logprob, self._ref_logprob = (
            logprob_reader(one, spec.vocab_size) for one in (self._trained, task.reference)
        )
        weights = {name: weight.detach() for name, weight in self._parameters().items()}
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._learned = Learned(
            weights,
            mean=zeros,
            square=zeros,
            waiting=nobody(self.capacity, spec.max_length, spec.max_new_tokens),
            counts=np.asarray([0, 0, -1, -1], dtype=np.int64),
        )

    def _bound_rule(self, context: Context) -> Gold | None:
        """What gives outcomes; None where the score does."""
        if self.outcome == "gold":
            if context.task.gold is None:
                raise InvalidArgument(
                    f"reward={self.name!r}: outcome='gold' and the task has no gold."
                )
            gold = gold_of(context)
            if gold is None and context.task.scorer is None:
                raise InvalidArgument(
                    f"reward={self.name!r}: outcome='gold', and the gold is the score here, which "
                    "needs a reward model; give the env reward_model=."
                )
            return gold
        if self.outcome == "score":
            return None
        rule = as_rule(self.outcome)
        # A number that is not finite is no outcome, and no error: as of a watched rule.
        rule.bind(replace(context, watched=True))
        return rule

    def _parameters(self) -> dict[str, Tensor]:
        named = self._trained.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}

    # ------------------------------------------------------------------- pricing

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the rewards of the tokens, by the model's present version."""
        given = as_texts(texts, max_new_tokens)
        learning = texts.learning and not self._watched
        with torch.no_grad():
            logprob, ref_logprob = (
                self._in_order(given, *reader)
                for reader in (
                    (self._trained, self._logprob),
                    (self._reference, self._ref_logprob),
                )
            )
        paid = self.coef * log_ratio(logprob, ref_logprob)
        if not (learning or self.mix):
            return paid
        outcome = self._outcomes(texts)
        if learning:
            self._wait(given, ref_logprob.cpu().numpy(), paid.isfinite().all(1), outcome)
        at_end = np.zeros(given.own.shape, dtype=np.float32)
        at_end[np.arange(len(outcome)), texts.steps() - 1] = np.nan_to_num(outcome)
        return paid + self.mix * upload(at_end, paid.device)

    def _in_order(self, texts: Texts, model: Any, logprob: Callable[..., Tensor]) -> Tensor:
        """The log-probs (B, T) of the own tokens."""
        out = torch.zeros(texts.own.shape, dtype=torch.float32, device=self._device)
        for rows in micro_batches(texts.length, self._max_batch_tokens):
            out[upload(rows, out.device)] = own_logprobs(texts, rows, model, logprob, out.device)
        return out

    def _outcomes(self, texts: FinishedTexts) -> np.ndarray:
        """(B,) float32: 0 or 1, and NaN for a text without an outcome."""
        if self._rule is None:
            assert texts.score is not None
            number = texts.score.cpu().numpy()
        else:
            number = self._rule.numbers(texts, torch.device("cpu")).numpy()
        scored = True if texts.scored is None else texts.scored.cpu().numpy()
        outcome = (number >= self.threshold).astype(np.float32)
        return np.where(np.isfinite(number) & scored, outcome, np.float32(np.nan))

    # ------------------------------------------------------------------- learning

    @property
    def model_version(self) -> int | None:
        """Updates that the model has had; None where it is watched, and never has any."""
        return None if self._watched else self._learned.version

    def policy_updated(self, updates: int) -> None:
        """Takes in how many updates the policy has had: what has been priced is learned from."""
        if updates != self._learned.counts[3]:
            counts = self._learned.counted(first=-1, policy=updates)
            self._learned = replace(self._learned, counts=counts)

    def _wait(
        self, texts: Texts, ref_logprob: np.ndarray, finite: Tensor, outcome: np.ndarray
    ) -> None:
        """Has the texts that have an outcome wait for the next update."""
        version, waiting, first, _ = self._learned.counts.tolist()
        known = np.isfinite(outcome) & finite.cpu().numpy()
        new = {field.name: getattr(texts, field.name)[known] for field in fields(Texts)}
        new |= {"ref_logprob": ref_logprob[known], "outcome": outcome[known]}
        self._learned = replace(
            self._learned,
            waiting={name: pushed(old, new[name]) for name, old in self._learned.waiting.items()},
            counts=self._learned.counted(
                waiting=min(waiting + int(known.sum()), self.capacity),
                first=version if first < 0 else first,
            ),
        )

    def update_model(self) -> None:
        """Takes the update that is due: where enough texts wait, and the limit of the lag allows
        it."""
        waiting = int(self._learned.counts[1])
        # Processes that train one policy have one model: it learns where they join.
        if ranks.count() > 1 or self._watched or waiting < self.every:
            return
        if self._allowed(self._learned.counts):
            texts = {name: rows[-waiting:] for name, rows in self._learned.waiting.items()}
            self._learned = self._updated(self._learned, texts)

    def _allowed(self, counts: np.ndarray) -> bool:
        """Whether the limit of the lag allows an update."""
        version, _, first, policy = counts.tolist()
        lag = 0 if first < 0 else version + 1 - first
        # Who never says when the policy learns cannot be kept to a limit.
        return self.max_lag is None or policy < 0 or lag <= self.max_lag

    def join(self, before: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> None:
        """Takes the update that is due on the texts that wait in all processes, in each of them.
        Without parts no text waits."""
        if not parts:
            self._learned = replace(self._learned, counts=self._learned.counted(waiting=0))
        waiting = [int(part["counts"][1]) for part in parts]
        allowed = all(self._allowed(part["counts"]) for part in parts)
        if not self._watched and sum(waiting) >= self.every and allowed:
            names = self._learned.waiting
            texts = {
                name: np.concatenate(
                    [
                        part["waiting"][name][self.capacity - count :]
                        for part, count in zip(parts, waiting, strict=True)
                    ]
                )
                for name in names
            }
            self._learned = self._updated(self._learned, texts)

    def _updated(self, before: Learned, texts: Mapping[str, np.ndarray]) -> Learned:
        """Take one step of AdamW on texts that have waited, and return what is then learned, with
        none waiting."""
        version = before.version
        self._take(before.weights)
        weights = self._parameters()
        optimizer = torch.optim.AdamW(weights.values(), lr=self.lr, weight_decay=0.0)
        for name, weight in weights.items():
            optimizer.state[weight] = {
                "step": torch.tensor(float(version)),
                "exp_avg": before.mean[name].clone(),
                "exp_avg_sq": before.square[name].clone(),
            }
        self._add_gradients(texts)
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        moments = {name: optimizer.state[weight] for name, weight in weights.items()}
        return Learned(
            {name: weight.detach() for name, weight in weights.items()},
            mean={name: both["exp_avg"] for name, both in moments.items()},
            square={name: both["exp_avg_sq"] for name, both in moments.items()},
            waiting=before.waiting,
            counts=before.counted(version=version + 1, waiting=0),
        )

    def _add_gradients(self, waiting: Mapping[str, np.ndarray]) -> None:
        """Compute the gradient of the mean loss over the texts that wait."""
        texts = Texts(**{field.name: waiting[field.name] for field in fields(Texts)})
        for rows in micro_batches(texts.length, self._max_batch_tokens):
            ref_logprob, outcome = (
                upload(waiting[name][rows], self._device) for name in ("ref_logprob", "outcome")
            )
            with torch.enable_grad():
                own = own_logprobs(texts, rows, self._trained, self._logprob, self._device)
                total = self.coef * log_ratio(own, ref_logprob).sum(1)
                (outcome_loss(total, outcome).sum() / len(texts.length)).backward()

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model copies of these weights, and no gradients."""
        for name, weight in self._parameters().items():
            weight.data, weight.grad = weights[name].clone(), None

    # ------------------------------------------------------------------- keeping it

    def save_statistics(self) -> Mapping[str, Any] | None:
        """Return what has been learned, and what waits, as nested mappings of arrays that are not
        changed afterwards; None where the term is watched, and learns nothing."""
        if self._watched:
            return None
        return {field.name: getattr(self._learned, field.name) for field in fields(Learned)}

    def load_statistics(self, saved: Any) -> None:
        """Go on from what `save_statistics` returned, as tensors or as arrays."""
        on_device = {
            part: {name: torch.as_tensor(one).to(self._device) for name, one in saved[part].items()}
            for part in ("weights", "mean", "square")
        }
        self._learned = Learned(**on_device, waiting=saved["waiting"], counts=saved["counts"])
        self._take(self._learned.weights)


def check_counts(**counts: int | None) -> None:
    """Raise `InvalidArgument` unless they are whole numbers: a `max_lag` of 0 or more, or None; the
    others 1 or more."""
    for name, count in counts.items():
        least = 0 if name == "max_lag" else 1
        if count is None and name == "max_lag":
            continue
        if not isinstance(count, int | np.integer) or count < least:
            raise InvalidArgument(f"{name}={count!r} must be a whole number, {least} or more.")


def as_rule(given: Any) -> Rule:
    """Return a function as a `Rule`, and a copy of one that is a `Rule`."""
    return copy.copy(given) if isinstance(given, Rule) else Rule(given)


def copy_to_train(model: Any, lora_rank: int, seed: int) -> Any:
    """Return a copy of a model, in eval mode and with weights that are trained in float32. The
    weights beneath adapters are shared."""
    if lora_rank:
        return with_lora(model, lora_rank, seed).eval()
    if adapter_layers(model):
        copied = beside(model)
        train_adapters(copied)
        return copied.eval()
    return copy.deepcopy(model).float().requires_grad_(True).eval()
