"""The vocabulary shared by environments and agents.

Shape suffixes, here and everywhere: N envs, P prompt tokens, T response tokens, L = P + T context, V vocabulary,
H hidden size, B episodes in a batch, K transitions (any mix of rows and times).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Slots = Sequence[int] | np.ndarray
"""Row numbers (n,)."""

KL_ESTIMATORS = ("k1", "k2", "k3")

Head = Callable[[Tensor], Tensor]
"""Maps model states (K, H) to logits (K, V), or to scores (K,)."""


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """What an agent may know of an env beyond its spaces."""

    tokenizer: Any
    """A transformers tokenizer, or None where tokens have no text."""
    vocab_size: int
    """V: actions are 0..V-1."""
    pad_token_id: int
    """Fills `tokens` to the right of `length`; may equal a stop id, so only `length` says what is valid."""
    stop_token_ids: tuple[int, ...]
    """Emitting one of these ends the episode (terminated)."""
    max_prompt_tokens: int
    """P."""
    max_new_tokens: int
    """T: the episode is truncated after this many response tokens."""
    score_truncated: bool = True
    """True: a truncated text is scored, so learners do not bootstrap there. False: they bootstrap from its last state."""


@dataclass(frozen=True, slots=True)
class EpisodeScores:
    """What stepping would have paid for B finished texts; zero right of each response."""

    token_rewards: np.ndarray
    """(B, T) float32: the reward of each token, hindsight terms placed where they belong."""
    step_rewards: np.ndarray
    """(B, T) float32: the same total as `step` pays it, hindsight terms on the last token."""
    terms: dict[str, np.ndarray]
    """(B, T) float32 for every term, weighted, as `step` pays it."""
    score: np.ndarray | None
    """(B,) float32: the unweighted sequence score, or None without a scorer."""
    gold: np.ndarray | None
    """(B,) float32: the task's true metric, or None where none is known."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A sequence score read from a causal model's states."""

    model: Any
    """The trunk: a transformers base model, or any object with `slots(num_rows, max_length)` (see `SlotModel`)."""
    head: Head
    """States (K, H) to scores (K,)."""
    per_token: bool
    """True: the score of a text is the sum of its response tokens' scores. False: the score at its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a registered id is made of. A task file is a function that returns one of these."""

    tokenizer: Any
    """A transformers tokenizer shared by all models, or None where tokens have no text."""
    reference: Any
    """pi_ref: a transformers causal LM, or any object with `slots` and `head` (see `SlotModel`); frozen, in eval mode."""
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
    scorer: Scorer | None = None
    """Where `infos["score"]` and the designs built on a score come from."""
    gold: Callable[[str, str], float] | None = None
    """gold(prompt_text, response_text): the true metric, for evaluation only."""
    reward: str = "token"
    """The design used when `reward=` is not given."""
    kl_coef: float = 0.05
    """beta used when `kl_coef=` is not given, reward per nat."""


class SlotModel(Protocol):
    """N texts running through one causal model, each row at its own position."""

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restarts `slots` (n,) with right-padded `tokens` (n, <=L); returns the state after each row's last token (n, H)."""
        ...

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Adds one token to each row (N,), or only to rows where `active` (N,) bool; returns states (N, H)."""
        ...

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copies row sources[i] onto row targets[i]."""
        ...

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """The uncached forward: right-padded `tokens` (B, L) to states (B, L, H), in which state t has read token t."""
        ...
