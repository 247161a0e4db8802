"""The vocabulary shared by environments and agents.

Shape suffixes, here and everywhere: N envs, P prompt tokens, T response tokens, L = P + T context,
V vocabulary, H hidden size, B episodes in a batch, K transitions (any mix of rows and times).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

Slots = Sequence[int] | np.ndarray
"""Row numbers (n,)."""

TextIds = tuple[list[int], list[int]]
"""The token ids of a prompt and of its response."""

KL_ESTIMATORS = ("k1", "k2", "k3")

Head = Callable[[Tensor], Tensor]
"""Maps model states (K, H) to logits (K, V), or to scores (K,)."""

TrunkStates = Mapping[Any, Tensor]
"""A state (K, H) for every trunk, by the trunk itself: a key that copies and pickles take with
them, as an id() is not."""


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """What an agent may know of an env beyond its spaces."""

    tokenizer: Any
    """A transformers tokenizer, or None where tokens have no text."""
    vocab_size: int
    """V: actions are 0..V-1."""
    pad_token_id: int
    """Fills `tokens` to the right of `length`; may equal a stop id, so only `length` says what is
    valid."""
    stop_token_ids: tuple[int, ...]
    """Emitting one of these ends the episode."""
    max_prompt_tokens: int
    """P."""
    max_new_tokens: int
    """T: the episode is cut after this many response tokens."""
    score_truncated: bool = True
    """True: a text that is cut is scored, so learners do not bootstrap there. False: they bootstrap
    from its last state."""
    chats: Any = None
    """The `Chats` that make prompts of messages, and of texts as messages, where the env uses a
    chat template; else None."""


@dataclass(frozen=True, slots=True)
class EpisodeScores:
    """What stepping would have paid for B finished texts; zero right of each response."""

    token_rewards: np.ndarray
    """(B, T) float32: the reward of each token, hindsight terms placed where they belong."""
    step_rewards: np.ndarray
    """(B, T) float32: the same total as `step` pays it, hindsight terms on the last token."""
    terms: dict[str, np.ndarray]
    """(B, T) float32 for every term, weighted, as `step` pays it; they add up to `step_rewards`."""
    token_reward_terms: dict[str, np.ndarray]
    """(B, T) float32 for every term, weighted, placed where it belongs; they add up to
    `token_rewards`."""
    score: np.ndarray | None
    """(B,) float32: the unweighted sequence score, or None without a scorer."""
    gold: np.ndarray | None
    """(B,) float32: the task's true metric, or None where none is known."""
    lengths: np.ndarray
    """(B,) int64: response tokens of each text."""
    ref_logprobs: np.ndarray
    """(B, T) float32: log pi_ref of each token, in nats."""
    potentials: np.ndarray | None
    """(B, T + 1) float32: Phi before each token, then of the last state; None where no term is
    potential-based."""
    watched: dict[str, np.ndarray] = field(default_factory=dict)
    """(B, T) float32 for every term of `watch=`: its number for each token, unweighted; never a part
    of the rewards."""


@dataclass(frozen=True, slots=True)
class Written:
    """A text that a `RolloutEngine` has written."""

    key: int
    """What it was begun under."""
    tokens: list[int]
    """The response, with the stop token where there was one."""
    logprobs: list[float]
    """log pi of each token when it was drawn, in nats, at the sampling temperature."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A sequence score read from a causal model's states."""

    model: Any
    """The trunk: a transformers base model, or any `TokenModel`."""
    head: Head
    """States (K, H) to scores (K,)."""
    per_token: bool
    """True: the score of a text is the sum of its response tokens' scores. False: the score at its
    last token."""
    pad_token_id: int | None = None
    """Where `per_token` is False, the last token of a text is its last one that is not this: so do
    transformers' sequence classifiers read, also where their pad id is the stop id. None: whatever
    the last token is."""


class TextScorer(Protocol):
    """A sequence score that only finished texts have: another tokenizer's reward model, or one that
    looks ahead."""

    @property
    def per_token(self) -> bool:
        """Whether the model scores tokens (the score is their sum), or the text as a whole."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """Whether what it gives a token may depend on later ones."""
        ...

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """(B, width) float32 on any device: the score of each of the policy's response tokens, zero
        to the right. Each row's sum is the text's score; a model that scores whole texts puts it on
        the last token."""
        ...


class RolloutEngine(Protocol):
    """Writes whole texts with a policy's weights, many side by side: an inference engine such as
    vLLM."""

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begins a text under a key that no running text has; it ends with a stop token or after
        `max_tokens`."""
        ...

    def ended(self) -> list[Written]:
        """Waits until at least one of the running texts has ended, and returns those that have."""
        ...

    def sync(self) -> None:
        """Takes the policy's present weights: the next token of every text, running ones included,
        is drawn with them."""
        ...

    def abort(self) -> None:
        """Drops the running texts."""
        ...


class Oracle(Protocol):
    """The exact optimum of score - beta KL(pi || pi_ref), where a task knows it."""

    def state_value(self, states: TrunkStates, step: Tensor, beta: float) -> Tensor:
        """V* (K,) float32 from the states of the task's models after `step` (K,) response tokens;
        after the last one it is the score."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a registered id is made of. A task file is a function that returns one of these."""

    tokenizer: Any
    """A transformers tokenizer shared by all models, or None where tokens have no text."""
    chats: Any = None
    """The `tokenenv.models.chats.Chats` behind the prompts, where prompts that are given as texts
    or messages are chats."""
    reference: Any
    """pi_ref: a transformers causal LM, or any `TokenModel`; frozen, in eval mode."""
    prompts: Sequence[Sequence[int]]
    """Prompt token ids, at most `max_prompt_tokens` each."""
    max_prompt_tokens: int
    """P."""
    max_new_tokens: int
    """T."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a text; they belong to the response."""
    model: Any = None
    """The policy's default initial weights where they are not the reference's."""
    scorer: Scorer | TextScorer | None = None
    """Where `infos["score"]` and the designs built on a score come from."""
    gold: Callable[[str, str], float] | Literal["score"] | None = None
    """gold(prompt_text, response_text): the true metric, for evaluation only. "score": the score
    itself is the truth."""
    implicit_model: Any = None
    """A preference-tuned (DPO) language model with the reference's tokens, which
    `reward="implicit"` reads."""
    step_scorer: Scorer | None = None
    """Scores the steps of a text, where `reward="process"` should not read the scorer."""
    step_end_token_ids: tuple[int, ...] = ()
    """Tokens that end a step of the text; the end of the text ends one too."""
    oracle: Oracle | None = None
    """The exact optimum, where it is known."""
    features: Callable[[TrunkStates, Tensor], Tensor] | None = None
    """observation="features": maps the states of all models and the response tokens so far (N,) to
    features (N, F) float32. None: the reference's last hidden state."""
    num_features: int = 0
    """F, where `features` is given."""
    reward: str = "token"
    """The design used when `reward=` is not given."""
    kl_coef: float = 0.05
    """beta used when `kl_coef=` is not given, reward per nat."""


class TokenModel(Protocol):
    """What a language model, or a scorer's trunk, that is no transformers model has to bring.

    "States" may be any tensor with K rows, (K,) or (K, H), that `head` understands: an automaton's
    state, say.
    """

    device: Any
    """Where tokens are taken and states returned."""
    vocab_size: int
    """V. Language models only, as is `head`."""
    hidden_size: int
    """How many numbers of a state, the first ones, a value head may read. Policies only."""

    def slots(self, num_rows: int, max_length: int) -> "SlotModel":
        """N running texts of at most `max_length` tokens."""
        ...

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Right-padded `tokens` (B, L) to states (B, L, ...), in which state t has read token t."""
        ...

    def head(self, states: Tensor) -> Tensor:
        """States of K texts to logits (K, V) float32."""
        ...


class SlotModel(Protocol):
    """N texts running through one causal model, each row at its own position."""

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restarts `slots` (n,) with right-padded `tokens` (n, <=L); returns the state after each
        row's last token (n, H)."""
        ...

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Adds one token to each row (N,), or only to rows where `active` (N,) bool; returns states
        (N, H)."""
        ...

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copies row sources[i] onto row targets[i]."""
        ...

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """The uncached forward: right-padded `tokens` (B, L) to states (B, L, H), in which state t
        has read token t."""
        ...
