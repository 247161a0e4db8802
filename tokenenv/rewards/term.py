"""The protocol of a reward term: what it may look at, and how it is paid.

A causal or policy-dependent term maps K transitions to K rewards. The K transitions are the rows of
one step, or every token of many finished texts: one formula serves both, so stepping equals scoring
by construction. A hindsight term places its sum over the tokens of a finished text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.encoding import decode_pairs
from tokenenv.models.trunks import trunk_of
from tokenenv.types import Scorer, Task, TextIds, TextScorer, TokenSpec

Kind = Literal["causal", "hindsight", "policy"]
Weight = float | Callable[[int], float]
"""A number, or a schedule over the tokens the env has seen; read when an episode begins."""


@dataclass(frozen=True, slots=True)
class RunningTexts:
    """K texts up to their last token so far, on the host: reading them does not wait for a GPU."""

    ids: Sequence[np.ndarray] | np.ndarray
    """Token ids of R texts; each may go on beyond what has been written so far."""
    row: np.ndarray
    """(K,) int64: which of the R each of the K texts is."""
    prompt_length: np.ndarray
    """(K,) int64."""
    length: np.ndarray
    """(K,) int64: tokens of prompt and response together, so far."""
    tokenizer: Any = None

    def prompt_and_response_ids(self) -> list[TextIds]:
        """K pairs of token id lists: the prompt, and the response so far."""
        return _split([self.ids[row] for row in self.row], self.prompt_length, self.length)

    def prompt_and_response_texts(self) -> list[tuple[str, str]]:
        """K pairs of texts, without special tokens, which joined are the whole text as the
        tokenizer decodes it."""
        return decode_pairs(self.prompt_and_response_ids(), self.tokenizer)

    def at(self, index: Tensor) -> "RunningTexts":
        """The texts of `index`, (n,) numbers or (K,) bool. Waits for the index's device."""
        chosen = index.cpu().numpy()
        lengths = self.prompt_length[chosen], self.length[chosen]
        return RunningTexts(self.ids, self.row[chosen], *lengths, self.tokenizer)


def _split(
    ids: Sequence[np.ndarray] | np.ndarray, prompt_length: np.ndarray, length: np.ndarray
) -> list[TextIds]:
    """Pairs of token id lists, prompt and response."""
    spans = zip(ids, prompt_length, length, strict=True)
    return [(row[:start].tolist(), row[start:end].tolist()) for row, start, end in spans]


@dataclass(slots=True)
class States:
    """K texts as the models see them after their last token."""

    hidden: dict[Any, Tensor]
    """A state (K, H) for every trunk, by the trunk itself."""
    step: Tensor
    """(K,) int64: response tokens so far."""
    score: Tensor | None = None
    """(K,) the scorer's score of the text so far: a running sum of token scores, in float64 where
    the device has it, or the score at the last token, float32. None without a scorer, and with one
    that scores finished texts only."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """(K,) what each term with `has_memory` carries along the text, by its name."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(K, p) each term's `statistics` when the text began, by its name."""
    texts: RunningTexts | None = None
    """The texts themselves. No tensor: `tensors` and `put` leave them aside."""

    def of(self, model: Any) -> Tensor:
        """The states (K, H) of `model`'s trunk; the term lists the model in `models`."""
        return self.hidden[trunk_of(model)]

    def tensors(self) -> list[Tensor]:
        """All of it, always in the same order."""
        score = [] if self.score is None else [self.score]
        return [
            *self.hidden.values(),
            self.step,
            *score,
            *self.memory.values(),
            *self.statistics.values(),
        ]

    def at(self, index: Tensor) -> "States":
        """The texts of `index` (n,) alone."""
        return States(
            {key: states[index] for key, states in self.hidden.items()},
            self.step[index],
            None if self.score is None else self.score[index],
            {name: memory[index] for name, memory in self.memory.items()},
            {name: statistics[index] for name, statistics in self.statistics.items()},
            None if self.texts is None else self.texts.at(index),
        )

    def put(self, rows: Tensor, other: "States") -> None:
        """Writes the texts of `other` over `rows` (n,)."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[rows] = theirs


@dataclass(slots=True)
class FinishedTexts:
    """B finished texts."""

    tokens: Tensor
    """(B, L) int64, right-padded: prompt and response."""
    length: np.ndarray
    """(B,) int64: tokens of prompt and response together."""
    prompt_length: np.ndarray
    """(B,) int64."""
    prefix_length: np.ndarray
    """(B,) int64: leading response tokens that earn nothing, because `reset` was given them as a
    prefix."""
    score: Tensor | None
    """(B,) the sequence score, or None without a scorer."""
    ids: Sequence[np.ndarray]
    """The same tokens on the host, one row of at least `length` a text."""
    tokenizer: Any = None
    token_scores: Tensor | None = None
    """(B, T) each response token's score, with a scorer that scores finished texts only
    (`TextScorer`)."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(B, p) each term's `statistics` when the texts began, by its name."""
    learning: bool = False
    """True where statistics may be learned from these texts: while stepping, not while scoring."""
    scored: Tensor | None = None
    """(B,) bool: texts whose sequence score is due; None while it is not yet known."""

    def prompt_and_response_ids(self) -> list[TextIds]:
        """B pairs of token id lists."""
        return _split(self.ids, self.prompt_length, self.length)

    def prompt_and_response_texts(self) -> list[tuple[str, str]]:
        """B pairs of texts, without special tokens, which joined are the whole text as the
        tokenizer decodes it."""
        return decode_pairs(self.prompt_and_response_ids(), self.tokenizer)

    def own_mask(self, max_new_tokens: int) -> Tensor:
        """(B, T) bool: the response tokens that rewards may be placed on."""
        position = np.arange(max_new_tokens)
        response = (self.length - self.prompt_length)[:, None]
        mask = (position >= self.prefix_length[:, None]) & (position < response)
        return torch.from_numpy(mask).to(self.tokens.device, non_blocking=True)

    def earning_mask(self, term: "RewardTerm", max_new_tokens: int) -> Tensor:
        """(B, T) bool: the tokens on which `term` pays; none of an unscored text where it pays the
        sequence score."""
        own = self.own_mask(max_new_tokens)
        return own if self.scored is None or not term.pays_score else own & self.scored[:, None]


@dataclass(slots=True)
class Transitions:
    """K tokens, each with the state before and after it."""

    tokens: Tensor
    """(K,) int64 the actions."""
    before: States
    after: States
    terminated: Tensor
    """(K,) bool: the token is a stop token."""
    truncated: Tensor
    """(K,) bool: the token is the last one allowed."""
    scored: Tensor
    """(K,) bool: the text ends here and its sequence score is due."""
    ref_logprob: Tensor | None = None
    """(K,) float32 log pi_ref(token | state), at temperature 1, unfiltered."""
    logprob: Tensor | None = None
    """(K,) float32 log pi(token | state), where the action carries it."""
    finished: FinishedTexts | None = None
    """The texts that end in these transitions..."""
    finished_at: Tensor | None = None
    """...and the transition (B,) each of them ends in."""
    learning: Tensor | None = None
    """(K,) bool: transitions that statistics may be learned from; None while scoring."""

    @property
    def statistics(self) -> dict[str, Tensor]:
        """(K, p) each term's `statistics` when the text began, by its name."""
        return self.before.statistics

    def final_score(self) -> Tensor:
        """(K,): the sequence score where a text ends and is scored, else 0."""
        if self.after.score is not None:
            return torch.where(self.scored, self.after.score, 0.0).float()
        if self.finished is None or self.finished.score is None:
            return torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        return self.at_end(self.finished.score)

    def at_end(self, values: Tensor) -> Tensor:
        """(K,) zeros, with `values` (B,) where a text ends and its score is due."""
        out = torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        if self.finished_at is None:
            return out
        return out.index_copy(0, self.finished_at, values.float()) * self.scored


@dataclass(frozen=True, slots=True)
class Context:
    """What an env offers its reward terms."""

    spec: TokenSpec
    task: Task
    device: torch.device
    kl_coef: float
    """beta that the env was made with, reward per nat."""
    max_batch_tokens: int = 16384
    """The largest forward a term should run, in tokens with padding."""

    @property
    def reference(self) -> Any:
        """pi_ref."""
        return self.task.reference

    @property
    def scorer(self) -> Scorer | TextScorer | None:
        """Where the sequence score comes from."""
        return self.task.scorer

    @property
    def causal_scorer(self) -> Scorer | None:
        """The scorer, if it scores every prefix."""
        return self.task.scorer if isinstance(self.task.scorer, Scorer) else None

    @property
    def step_scorer(self) -> Scorer | None:
        """What scores the steps of a text: the task's own step scorer, or else its causal
        scorer."""
        return self.task.step_scorer or self.causal_scorer

    def has(self, need: str) -> bool:
        """Whether the env has one of `NEEDS`."""
        scorer = self.scorer
        return {
            "scorer": scorer is not None,
            "token scorer": scorer is not None and scorer.per_token,
            "causal scorer": self.causal_scorer is not None,
            "transformer scorer": self.causal_scorer is not None
            and not hasattr(self.causal_scorer.model, "slots"),
            "reference": self.reference is not None,
            "tokenizer": self.spec.tokenizer is not None,
            "implicit model": self.task.implicit_model is not None,
            "step scorer": self.step_scorer is not None,
            "step ends": bool(self.task.step_end_token_ids),
            "oracle": self.task.oracle is not None,
        }[need]


NEEDS = {
    "scorer": "a reward model (reward_model=)",
    "token scorer": "a token-classification reward model (reward_model=)",
    "causal scorer": "a reward model that scores prefixes: causal, with the policy's own tokens",
    "transformer scorer": (
        "a causal transformers reward model with the policy's own tokens (reward_model=)"
    ),
    "reference": "a reference model",
    "tokenizer": "a tokenizer",
    "implicit model": "a preference-tuned language model (implicit_model=)",
    "step scorer": (
        "a causal reward model with the policy's own tokens, which scores steps (reward_model=)"
    ),
    "step ends": "tokens that end a step (step_end_token_ids=)",
    "oracle": "a task whose optimum is known, such as tokenenv/DelayedKey-v0",
}
"""What a term may need of an env, and how a user is told."""


class RewardTerm:
    """One named part of the reward. Subclasses set the class attributes and define `reward` or
    `place`."""

    name: str = ""
    kind: Kind = "causal"
    weight: Weight = 1.0
    needs: frozenset[str] = frozenset()
    """Of `NEEDS`: what the env must have."""
    preserves_return: bool | None = None
    """Whether the rewards of a scored text add up to its score, up to a constant of the prompt.
    None: not stated."""
    preserves_gradient: bool | None = None
    """Whether reward-to-go (and GAE) on these rewards estimates the gradient of the expected score
    without bias."""
    models: Sequence[Any] = ()
    """Causal models whose states the term reads; run once a step whoever reads them."""
    pays_score: bool = False
    """True for a term that pays or redistributes the sequence score: nothing is paid at an unscored
    truncation."""
    has_potential: bool = False
    """True where the term is potential-based and defines `potential`."""
    has_memory: bool = False
    """True where the term carries a number along each text and defines `remember`."""

    def bind(self, context: Context) -> None:
        """Called once by the env; checks `needs` and lets the term take what it wants from
        `context`."""
        if hasattr(self, "withheld"):
            raise InvalidArgument(
                f"{type(self).__name__} sets withheld, which is called pays_score now."
            )
        for need in sorted(self.needs):
            if not context.has(need):
                raise InvalidArgument(
                    f"reward={self.name!r} needs {NEEDS[need]}, which this env has not; "
                    "reward= also takes a rule or a term of your own."
                )

    def wrapped(self) -> Sequence["RewardTerm"]:
        """Return the terms that this one wraps, and those that they wrap. Their memory and their
        statistics stand under their own names, so each name must be an own one once bound."""
        return ()

    def reward(self, batch: Transitions) -> Tensor:
        """Causal and policy-dependent terms: rewards (K,) of K transitions, unweighted."""
        raise TypeError(f"{type(self).__name__} defines neither reward() nor place()")

    def potential(self, states: States) -> Tensor:
        """Potential-based terms: Phi (K,) of K running texts, unweighted."""
        raise TypeError(f"{type(self).__name__} sets has_potential but does not define potential()")

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """Terms with memory: the number (K,) carried from `states` on, which `tokens` (K,) led to;
        `memory` is the number before them, or None where the texts begin. Read it as
        `states.memory[self.name]`."""
        raise TypeError(f"{type(self).__name__} sets has_memory but does not define remember()")

    def statistics(self) -> Tensor | None:
        """Numbers (p,) on the env's device that change with training, such as a running scale, or
        None. An episode keeps those it began with: read them from the batch, never from `self`."""
        return None

    def save_statistics(self) -> Tensor | np.ndarray | None:
        """What `statistics` are computed from, float64, as a tensor on the env's device or as an
        array; None where there is nothing to save. Asked at every step, so that an interrupted one
        teaches nothing: it must not wait for the device."""
        return None

    def load_statistics(self, saved: Tensor | np.ndarray) -> None:
        """Goes on from what `save_statistics` returned, as a tensor or as an array."""
        raise TypeError(
            f"{type(self).__name__} has statistics but does not define load_statistics()"
        )

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """Hindsight terms: rewards (B, T) of the tokens of B finished texts, unweighted; their sum
        is paid at the end."""
        raise TypeError(f"{type(self).__name__} is a hindsight term and does not define place()")


@dataclass(slots=True)
class RewardSum:
    """The terms of an env, weighted and added."""

    terms: dict[str, RewardTerm]
    max_new_tokens: int
    every: dict[str, RewardTerm] = field(init=False)
    """The terms and those that they wrap, by name: whatever has a memory or learns."""
    causal: list[str] = field(init=False)
    hindsight: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.every = _with_wrapped(self.terms)
        self.hindsight = [name for name, term in self.terms.items() if term.kind == "hindsight"]
        self.causal = [name for name in self.terms if name not in self.hindsight]

    def paid(self, batch: Transitions, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The causal and policy-dependent terms' weighted rewards (K,); `weights` are (K,)."""
        return {
            name: weighted(weights[name], self.terms[name].reward(batch)) for name in self.causal
        }

    def placed(
        self, texts: FinishedTexts, scored: Tensor, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The hindsight terms' weighted rewards (B, T); `scored` and `weights` are (B,)."""
        texts.scored = scored
        return {
            name: weighted(weights[name][:, None], self._place(self.terms[name], texts))
            for name in self.hindsight
        }

    def _place(self, term: RewardTerm, texts: FinishedTexts) -> Tensor:
        return torch.where(
            texts.earning_mask(term, self.max_new_tokens),
            term.place(texts, self.max_new_tokens),
            0.0,
        )

    @property
    def has_potential(self) -> bool:
        """Whether a term is potential-based."""
        return any(term.has_potential for term in self.terms.values())

    @property
    def with_memory(self) -> dict[str, RewardTerm]:
        """The terms that carry a number along each text, wrapped ones included."""
        return {name: term for name, term in self.every.items() if term.has_memory}

    def statistics(self) -> dict[str, Tensor]:
        """The present statistics (p,) of the terms that have any, wrapped ones included."""
        every = ((name, term.statistics()) for name, term in self.every.items())
        return {name: statistics for name, statistics in every if statistics is not None}

    def potential(self, states: States, weights: Mapping[str, Tensor]) -> Tensor | None:
        """The weighted sum of the potentials (K,), or None where no term is potential-based."""
        shaped = {name: term for name, term in self.terms.items() if term.has_potential}
        parts = [weighted(weights[name], term.potential(states)) for name, term in shaped.items()]
        return torch.stack(parts).sum(0) if parts else None


def _with_wrapped(terms: Mapping[str, RewardTerm]) -> dict[str, RewardTerm]:
    """The terms and all that they wrap, by name; raises where two of them have one name."""
    every = dict(terms)
    for term in terms.values():
        for inner in term.wrapped():
            if inner.name in every:
                raise InvalidArgument(
                    f"reward= has a term called {inner.name!r}, which is the name of a wrapped "
                    "term; give one of them another name."
                )
            every[inner.name] = inner
    return every


def weighted(weight: Tensor, rewards: Tensor) -> Tensor:
    """Their product, float32; 0 of a term that is switched off, also where its reward is -inf (a
    token the reference has not)."""
    return torch.where(weight == 0, 0.0, weight * rewards).float()


def weight_now(weight: Weight, tokens_seen: int) -> float:
    """A weight's value now; a schedule is asked with the tokens the env has seen."""
    return float(weight(tokens_seen) if callable(weight) else weight)
