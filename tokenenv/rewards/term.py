"""The protocol of a reward term: what it may look at, and how it is paid.

A causal or policy-dependent term maps K transitions to K rewards. The K transitions are those of
the N slots in one step, or all tokens of many finished texts. One formula serves both, so stepping
equals scoring by construction. A hindsight term places its sum on the tokens of a finished text.

`docs/contract.md` defines the words slot, row, paid, placed, scored, own, watched, potential and
hindsight.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.encoding import decode_pairs
from tokenenv.models.trunks import trunk_of
from tokenenv.types import Scorer, Task, TextIds, TextScorer, TokenSpec

Kind = Literal["causal", "hindsight", "policy"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
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
    """The task's tokenizer, or None where tokens have no text."""

    def prompt_and_response_ids(self) -> list[TextIds]:
        """Return K pairs of token id lists: the prompt, and the response so far."""
        return _split([self.ids[row] for row in self.row], self.prompt_length, self.length)

    def prompt_and_response_texts(self) -> list[tuple[str, str]]:
        """Return K pairs of texts, without special tokens. A pair joined is the whole text so far
        as the tokenizer decodes it."""
        return decode_pairs(self.prompt_and_response_ids(), self.tokenizer)

    def at(self, index: Tensor | np.ndarray) -> "RunningTexts":
        """Return the texts of `index`, (n,) numbers or (K,) bool. An index on a GPU is waited
        for."""
        chosen = index.cpu().numpy() if isinstance(index, Tensor) else index
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
    """A state (K, H) for every trunk. The key is the trunk itself."""
    step: Tensor
    """(K,) int64: response tokens so far."""
    score: Tensor | None = None
    """(K,) the scorer's score of the text so far: a running sum of token scores, in float64 where
    the device has it, or the score at the last token, float32. None without a scorer, and with one
    that scores finished texts only."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """(K, *memory_shape) of `memory_dtype`: what each term with `has_memory` carries along the
    text, by the term's name."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(K, p) float32: each term's `statistics` when the text began, by the term's name."""
    texts: RunningTexts | None = None
    """The texts themselves, on the host. They are no tensor, so `tensors` and `put` leave them
    aside."""

    def of(self, model: Any) -> Tensor:
        """Return the states (K, H) of `model`'s trunk; the term lists the model in `models`."""
        return self.hidden[trunk_of(model)]

    def tensors(self) -> list[Tensor]:
        """Return all tensors, always in the same order."""
        score = [] if self.score is None else [self.score]
        return [
            *self.hidden.values(),
            self.step,
            *score,
            *self.memory.values(),
            *self.statistics.values(),
        ]

    def at(self, index: Tensor) -> "States":
        """Return the states of the texts `index` (n,), as copies."""
        return States(
            {key: states[index] for key, states in self.hidden.items()},
            self.step[index],
            None if self.score is None else self.score[index],
            {name: memory[index] for name, memory in self.memory.items()},
            {name: statistics[index] for name, statistics in self.statistics.items()},
            None if self.texts is None else self.texts.at(index),
        )

    def put(self, slots: Tensor, other: "States") -> None:
        """Write the n texts of `other` over the texts `slots` (n,)."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[slots] = theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTexts:
    """B texts as tokens: each a prompt and a response."""

    tokens: Tensor
    """(B, L) int64, right-padded: prompt and response."""
    length: np.ndarray
    """(B,) int64: tokens of prompt and response together."""
    prompt_length: np.ndarray
    """(B,) int64."""
    prefix_length: np.ndarray
    """(B,) int64: leading response tokens that are not own, because `reset` was given them as a
    prefix."""
    ids: Sequence[np.ndarray] | np.ndarray
    """The same tokens on the host, one array of at least `length` tokens a text."""

    def prompt_and_response_ids(self) -> list[TextIds]:
        """Return B pairs of token id lists."""
        return _split(self.ids, self.prompt_length, self.length)

    def own_mask(self, max_new_tokens: int) -> Tensor:
        """Return a mask (B, T) bool of the own response tokens, on which rewards may be placed."""
        position = np.arange(max_new_tokens)
        response = (self.length - self.prompt_length)[:, None]
        mask = (position >= self.prefix_length[:, None]) & (position < response)
        return torch.from_numpy(mask).to(self.tokens.device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTexts(WholeTexts):
    """B finished texts, with all that reward terms may know of them."""

    score: Tensor | None
    """(B,) float32: the sequence score, or None without a scorer."""
    tokenizer: Any = None
    """The task's tokenizer, or None where tokens have no text."""
    token_scores: Tensor | None = None
    """(B, T) float32: each response token's score, with a scorer that scores finished texts only
    (`TextScorer`)."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(B, p) float32: each term's `statistics` when the texts began, by the term's name."""
    learning: bool = False
    """True where statistics may be learned from these texts: while stepping, not while scoring."""
    scored: Tensor | None = None
    """(B,) bool: texts whose sequence score counts; None where all of them do."""

    def prompt_and_response_texts(self) -> list[tuple[str, str]]:
        """Return B pairs of texts, without special tokens. A pair joined is the whole text as the
        tokenizer decodes it."""
        return decode_pairs(self.prompt_and_response_ids(), self.tokenizer)

    def earning_mask(self, term: "RewardTerm", max_new_tokens: int) -> Tensor:
        """Return a mask (B, T) bool of the tokens on which `term` may place rewards. It is empty in
        an unscored text where the term pays the sequence score."""
        own = self.own_mask(max_new_tokens)
        return own if self.scored is None or not term.pays_score else own & self.scored[:, None]


@dataclass(slots=True)
class Transitions:
    """K tokens, each with the state before and after it."""

    tokens: Tensor
    """(K,) int64: the actions."""
    before: States
    after: States
    terminated: Tensor
    """(K,) bool: the token is a stop token."""
    truncated: Tensor
    """(K,) bool: the token is the last one allowed."""
    scored: Tensor
    """(K,) bool: the text ends with this token and its sequence score counts."""
    ref_logprob: Tensor | None = None
    """(K,) float32: log pi_ref(token | state) in nats, at temperature 1, unfiltered."""
    logprob: Tensor | None = None
    """(K,) float32: log pi(token | state) in nats, where the action carries it."""
    finished: FinishedTexts | None = None
    """The B texts that end in these transitions."""
    finished_at: Tensor | None = None
    """(B,) int64: for each finished text, the index of the transition in which it ends."""
    learning: Tensor | None = None
    """(K,) bool: transitions that statistics may be learned from; None while scoring."""

    @property
    def statistics(self) -> dict[str, Tensor]:
        """(K, p) float32: each term's `statistics` when the text began, by the term's name."""
        return self.before.statistics

    def final_score(self) -> Tensor:
        """Return (K,) float32: the sequence score where a text ends and is scored, else 0."""
        if self.after.score is not None:
            return torch.where(self.scored, self.after.score, 0.0).float()
        if self.finished is None or self.finished.score is None:
            return torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        return self.at_end(self.finished.score)

    def at_end(self, values: Tensor) -> Tensor:
        """Return (K,) float32: `values` (B,) where a text ends and is scored, else 0."""
        out = torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        if self.finished_at is None:
            return out
        return torch.where(self.scored, out.index_copy(0, self.finished_at, values.float()), 0.0)


@dataclass(frozen=True, slots=True)
class Context:
    """What an env offers to its reward terms."""

    spec: TokenSpec
    task: Task
    device: torch.device
    kl_coef: float
    """beta that the env was made with, reward per nat."""
    max_batch_tokens: int = 16384
    """The largest forward a term should run, in tokens with padding."""
    watched: bool = False
    """Whether the term is given to `watch=`: its numbers are never paid, so any float will do."""

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
        """The scorer where it scores every prefix, else None."""
        return self.task.scorer if isinstance(self.task.scorer, Scorer) else None

    @property
    def step_scorer(self) -> Scorer | None:
        """The scorer of a text's steps: the task's own step scorer, or else its causal scorer."""
        return self.task.step_scorer or self.causal_scorer

    def has(self, need: str) -> bool:
        """Return whether the env has `need`, one of `NEEDS`."""
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
"""What a term may need of an env, and the words in which an error names it."""


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
    without bias. None: not stated."""
    models: Sequence[Any] = ()
    """Causal models whose states the term reads. Each is run once a step, however many terms read
    it."""
    pays_score: bool = False
    """True for a term that pays or redistributes the sequence score: nothing is paid at an unscored
    truncation."""
    has_potential: bool = False
    """True where the term is potential-based and defines `potential`."""
    has_memory: bool = False
    """True where the term carries a memory along each text and defines `remember`."""
    memory_shape: tuple[int, ...] = ()
    """The shape of one text's memory; () is one number. `bind` may set it, where it depends on a
    model."""
    memory_dtype: torch.dtype = torch.float32
    """The memory's dtype, one of `MEMORY_DTYPES`."""

    def bind(self, context: Context) -> None:
        """Check `needs` and take what the term wants from `context`. The env calls it once."""
        if hasattr(self, "withheld"):
            raise InvalidArgument(
                f"{type(self).__name__} sets withheld, which is called pays_score now."
            )
        for need in sorted(self.needs):
            check_choice(f"the term {self.name!r}: needs", need, NEEDS)
            if not context.has(need):
                raise InvalidArgument(
                    f"reward={self.name!r} needs {NEEDS[need]}, which this env does not have; "
                    "reward= also takes a rule or a term of your own."
                )

    def wrapped(self) -> Sequence["RewardTerm"]:
        """Return the terms that this one wraps, and those that they wrap. Their memory and their
        statistics stand under their own names, so each name must be an own one once bound."""
        return ()

    def reward(self, batch: Transitions) -> Tensor:
        """Return the rewards (K,) of K transitions, unweighted. Causal and policy-dependent terms
        define it."""
        raise TypeError(f"{type(self).__name__} defines neither reward() nor place()")

    def potential(self, states: States) -> Tensor:
        """Return Phi (K,) of K running texts, unweighted. Potential-based terms define it."""
        raise TypeError(f"{type(self).__name__} sets has_potential but does not define potential()")

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """Return the memory (K, *memory_shape) of K texts in `states`. Terms with memory define it.

        `tokens` (K,) are the tokens that led to `states`, and `memory` is the memory before them,
        or None where the texts begin (`tokens` are then the last ones of the prompts). A term reads
        its memory as `states.memory[self.name]`.
        """
        raise TypeError(f"{type(self).__name__} sets has_memory but does not define remember()")

    def statistics(self) -> Tensor | None:
        """Return numbers (p,) on the env's device that change with training, such as a running
        scale, or None. An episode keeps those that it began with: read them from the batch, never
        from `self`."""
        return None

    def save_statistics(self) -> Tensor | np.ndarray | None:
        """Return what `statistics` are computed from, float64, as a tensor on the env's device or
        as an array; None where there is nothing to save.

        The env asks at every step, so that an interrupted step teaches nothing. It must therefore
        not wait for the device.
        """
        return None

    def load_statistics(self, saved: Tensor | np.ndarray) -> None:
        """Go on from what `save_statistics` returned, as a tensor or as an array."""
        raise TypeError(
            f"{type(self).__name__} has statistics but does not define load_statistics()"
        )

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """Return the rewards (B, T) of the tokens of B finished texts, unweighted. Hindsight terms
        define it; the sum of a text's rewards is paid at its end."""
        raise TypeError(f"{type(self).__name__} is a hindsight term and does not define place()")


MEMORY_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
"""What a memory may hold: the dtypes that NumPy, safetensors and torch's indexing all have, so that
it can be saved and forked."""


def check_rewards(name: str, method: str, rewards: Any, shape: torch.Size) -> Tensor:
    """Return what a term's method returned, if it is a tensor of the declared shape.

    Raises:
        InvalidArgument: it is not; names the term, what it returned and what is asked for.
    """
    if isinstance(rewards, Tensor) and rewards.shape == shape:
        return rewards
    given = f"shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else repr(rewards)[:80]
    raise InvalidArgument(
        f"{method}() of the term {name!r} returned {given}; it must return a tensor of shape "
        f"{tuple(shape)}."
    )


def check_memory(term: RewardTerm, device: torch.device) -> None:
    """Raise `InvalidArgument` unless a memory as the term declares it can be kept and saved."""
    shape, dtype = term.memory_shape, term.memory_dtype
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InvalidArgument(
            f"the term {term.name!r} has memory_shape={shape!r}; allowed: a tuple of whole "
            "numbers, 1 or more, such as () or (3,)."
        )
    if dtype not in MEMORY_DTYPES or (device.type == "mps" and dtype == torch.float64):
        allowed = ", ".join(str(one) for one in MEMORY_DTYPES)
        raise InvalidArgument(
            f"the term {term.name!r} has memory_dtype={dtype!r}, which cannot be kept on "
            f"{device.type!r} and saved; allowed: {allowed}."
        )


def read_memory(term: RewardTerm, memory: Tensor, tokens: Tensor) -> Tensor:
    """Return a copy of what `remember` gave for the texts of `tokens` (K,), if it is on their
    device and its shape and dtype are as the term declares them.

    One floating-point dtype is converted to another, since a score is in float64 where its sum
    would drift in float32. It is a copy, because a term may well return the scores or its old
    memory themselves, and the env writes into what it keeps.
    """
    shape, dtype = (len(tokens), *term.memory_shape), term.memory_dtype
    given = "no tensor"
    if isinstance(memory, Tensor):
        both_float = memory.is_floating_point() and dtype.is_floating_point
        if memory.device != tokens.device:
            raise InvalidArgument(
                f"remember() of the term {term.name!r} returned a tensor on '{memory.device}'; the "
                f"env's tensors are on '{tokens.device}': make new ones with device=tokens.device."
            )
        if memory.shape == shape and (memory.dtype == dtype or both_float):
            return memory.to(dtype, copy=True)
        given = f"shape {tuple(memory.shape)} and {memory.dtype}"
    raise InvalidArgument(
        f"remember() of the term {term.name!r} returned {given}; its memory_shape and memory_dtype "
        f"declare shape {shape} and {dtype}."
    )


@dataclass(slots=True)
class RewardSum:
    """The terms of an env: those that are weighted and added up, and those that are watched."""

    terms: dict[str, RewardTerm]
    """The terms of the reward, by name."""
    max_new_tokens: int
    watched: dict[str, RewardTerm] = field(default_factory=dict)
    """Terms whose numbers are recorded, unweighted, and never paid."""
    every: dict[str, RewardTerm] = field(init=False)
    """All of these and the terms that they wrap, by name: whatever has a memory or learns."""
    causal: list[str] = field(init=False)
    """Names of the causal and policy-dependent terms: the reward's, then watched ones."""
    hindsight: list[str] = field(init=False)
    """Names of the hindsight terms: the reward's, then watched ones."""
    shaped: list[str] = field(init=False)
    """Names of the reward's potential-based terms."""
    with_memory: dict[str, RewardTerm] = field(init=False)
    """The terms that carry a memory along each text, wrapped ones included."""

    def __post_init__(self) -> None:
        both = self.terms | self.watched
        self.every = _with_wrapped(both)
        self.hindsight = [name for name, term in both.items() if term.kind == "hindsight"]
        self.causal = [name for name in both if name not in self.hindsight]
        self.shaped = [name for name, term in self.terms.items() if term.has_potential]
        self.with_memory = {name: term for name, term in self.every.items() if term.has_memory}

    @property
    def names(self) -> list[str]:
        """The S names of all terms, causal ones first: the order of `RewardEngine.token_terms`."""
        return [*self.causal, *self.hindsight]

    def paid(self, batch: Transitions, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the numbers (K,) float32 of the causal and policy-dependent terms; `weights` (K,)
        are those of the reward's terms, and a watched term's number is not weighted."""
        found = {}
        for name in self.causal:
            rewards = check_rewards(
                name, "reward", _reward(name, self.every[name], batch), batch.tokens.shape
            )
            unweighted = name in self.watched
            found[name] = rewards.float() if unweighted else weighted(weights[name], rewards)
        return found

    def placed(self, texts: FinishedTexts, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the numbers (B, T) float32 of the hindsight terms; `weights` (B,) as in `paid`."""
        found = {}
        for name in self.hindsight:
            term = self.every[name]
            mask = texts.earning_mask(term, self.max_new_tokens)
            placed = term.place(texts, self.max_new_tokens)
            values = torch.where(mask, check_rewards(name, "place", placed, mask.shape), 0.0)
            unweighted = name in self.watched
            found[name] = values.float() if unweighted else weighted(weights[name][:, None], values)
        return found

    def statistics(self) -> dict[str, Tensor]:
        """Return the present statistics (p,) of the terms that have any, wrapped ones included."""
        every = ((name, term.statistics()) for name, term in self.every.items())
        return {name: statistics for name, statistics in every if statistics is not None}

    def potential(self, states: States, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Return the weighted sum (K,) of the potentials, or None where no term has one."""
        parts = [
            weighted(weights[name], self.terms[name].potential(states)) for name in self.shaped
        ]
        return torch.stack(parts).sum(0) if parts else None


def _reward(name: str, term: RewardTerm, batch: Transitions) -> Tensor:
    """What `term` pays for a batch; raises where it reads a memory that it has not said it has."""
    try:
        return term.reward(batch)
    except KeyError as error:
        defined = type(term).remember is not RewardTerm.remember
        if error.args == (term.name,) and defined and not term.has_memory:
            raise InvalidArgument(
                f"the term {name!r} defines remember() and has_memory is False, so it has no "
                "memory; set has_memory = True."
            ) from error
        raise


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
    """Return their product, float32. A weight of 0 gives 0, also where the reward is -inf (a token
    that the reference lacks)."""
    return torch.where(weight == 0, 0.0, weight * rewards).float()


def weight_now(weight: Weight, tokens_seen: int) -> float:
    """Return a weight's present value; a schedule is asked with the tokens that the env has
    seen."""
    return float(weight(tokens_seen) if callable(weight) else weight)
