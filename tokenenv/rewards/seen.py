"""What a reward term may look at: texts as they run, as they ended, and the transitions between
their states.

A transition is one token of the policy's own. Tokens that the environment writes into a text
(`Task.respond`) are read by the models, by potentials and by memories; no transition is theirs, and
no reward is placed on them.

Shapes: K transitions or running texts, B finished texts, L context tokens, T tokens of the policy's
own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.models.encoding import decode_pairs, decode_segments
from tokenenv.models.trunks import trunk_of
from tokenenv.tables import Columns
from tokenenv.turns import Segment, readable, segments_of
from tokenenv.types import TextIds

if TYPE_CHECKING:
    from tokenenv.rewards.term import RewardTerm


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
    row_columns: Sequence[Columns] | np.ndarray = ()
    """The columns of the R texts' rows; empty where nothing is known of them."""
    written: Sequence[np.ndarray] | np.ndarray | None = None
    """(R, L) bool: the tokens that the environment wrote; None: it wrote none."""

    @property
    def columns(self) -> list[Columns]:
        """The columns of each of the K texts' rows in the table of prompts, by name; empty where
        nothing is known of them."""
        return [self.row_columns[row] for row in self.row] if len(self.row_columns) else []

    def prompt_and_response_ids(self) -> list[TextIds]:
        """Return K pairs of token id lists: the prompt, and the response so far."""
        return _split([self.ids[row] for row in self.row], self.prompt_length, self.length)

    def prompt_and_response_texts(self) -> list[tuple[str, str]]:
        """Return K pairs of texts, without special tokens. A pair joined is the whole text so far
        as the tokenizer decodes it."""
        return decode_pairs(self.prompt_and_response_ids(), self.tokenizer)

    def segments(self) -> list[list[Segment]]:
        """Return the K responses so far in segments: the policy's turns, and what the environment
        wrote between them."""
        written = None if self.written is None else [self.written[row] for row in self.row]
        pairs = self.prompt_and_response_ids()
        return _segments(pairs, written, self.prompt_length, self.length)

    def turns(self) -> list[list[dict[str, Any]]]:
        """Return the segments of the K responses as readable mappings (`turns.readable`)."""
        return _turns(self.prompt_and_response_ids(), self.segments(), self.tokenizer)

    def at(self, index: Tensor | np.ndarray) -> "RunningTexts":
        """Return the texts of `index`, (n,) numbers or (K,) bool. An index on a GPU is waited
        for."""
        chosen = index.cpu().numpy() if isinstance(index, Tensor) else index
        lengths = self.prompt_length[chosen], self.length[chosen]
        rows = self.ids, self.row[chosen]
        return RunningTexts(*rows, *lengths, self.tokenizer, self.row_columns, self.written)


def _split(
    ids: Sequence[np.ndarray] | np.ndarray, prompt_length: np.ndarray, length: np.ndarray
) -> list[TextIds]:
    """Pairs of token id lists, prompt and response."""
    spans = zip(ids, prompt_length, length, strict=True)
    return [(row[:start].tolist(), row[start:end].tolist()) for row, start, end in spans]


def _segments(
    pairs: list[TextIds],
    written: Sequence[np.ndarray] | np.ndarray | None,
    prompt_length: np.ndarray,
    length: np.ndarray,
) -> list[list[Segment]]:
    """The responses of `pairs` in segments."""
    if written is None:
        return [segments_of(response, None) for _, response in pairs]
    spans = zip(pairs, written, prompt_length, length, strict=True)
    return [segments_of(pair[1], ~mask[start:end]) for pair, mask, start, end in spans]


def _turns(
    pairs: list[TextIds], segments: list[list[Segment]], tokenizer: Any
) -> list[list[dict[str, Any]]]:
    """The segments of the responses of `pairs` as readable mappings."""
    if tokenizer is None:
        return [readable(some, None) for some in segments]
    return [
        readable(some, decode_segments(prompt, some, tokenizer))
        for (prompt, _), some in zip(pairs, segments, strict=True)
    ]


@dataclass(slots=True)
class States:
    """K texts as the models see them after their last token."""

    hidden: dict[Any, Tensor]
    """A state (K, H) for every trunk. The key is the trunk itself."""
    step: Tensor
    """(K,) int64: tokens of the policy's so far, a prefix included."""
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
    turn_reward: Tensor | None = None
    """(K,) float32: the task's own reward for the turn that the policy's last token ended, else 0,
    for `remember` to read while the turn is answered; `tensors` and `put` leave it aside. None
    where the environment never writes, in a prefix, and where it is not given."""
    known: dict[Any, Tensor] = field(default_factory=dict)
    """(K,) what a term has read off these very states and may be asked for again, by the term;
    forgotten where a text of them is written over."""

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
            None if self.turn_reward is None else self.turn_reward[index],
        )

    def put(self, slots: Tensor, other: "States") -> None:
        """Write the n texts of `other` over the texts `slots` (n,)."""
        self.known.clear()
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
    """(B,) int64: leading response tokens, whoever wrote them, that are not own, because `reset`
    was given them as a prefix."""
    ids: Sequence[np.ndarray] | np.ndarray
    """The same tokens on the host, one array of at least `length` tokens a text."""
    columns: Sequence[Columns] = ()
    """The columns of each of the B texts' rows in the table of prompts, by name; empty where
    nothing is known of them."""

    written: Sequence[np.ndarray] | np.ndarray | None = None
    """One array of bool a text, of at least `length`: the tokens that the environment wrote; None:
    it wrote none."""

    def prompt_and_response_ids(self) -> list[TextIds]:
        """Return B pairs of token id lists, whoever wrote them."""
        return _split(self.ids, self.prompt_length, self.length)

    def segments(self) -> list[list[Segment]]:
        """Return the B responses in segments: the policy's turns, and what the environment wrote
        between them."""
        pairs = self.prompt_and_response_ids()
        return _segments(pairs, self.written, self.prompt_length, self.length)

    def steps(self) -> np.ndarray:
        """Return how many response tokens of each text are the policy's, a prefix included, (B,)
        int64: as many columns of (B, T) are the text's."""
        response = self.length - self.prompt_length
        if self.written is None:
            return response
        spans = zip(self.written, self.prompt_length, self.length, strict=True)
        return response - np.asarray([mask[a:b].sum() for mask, a, b in spans], dtype=np.int64)

    def positions(self, max_new_tokens: int) -> np.ndarray:
        """Return the place in the text of each token of the policy's, (B, T) int64 on the host. To
        the right of the last one they go on to count, up to the text's array's end."""
        after_prompt = self.prompt_length[:, None] + np.arange(max_new_tokens)
        last = self.tokens.shape[1] - 1
        if self.written is not None:
            spans = zip(self.written, self.prompt_length, self.length, strict=True)
            for row, (mask, start, end) in enumerate(spans):
                own = start + np.flatnonzero(~np.asarray(mask[start:end], dtype=bool))
                after_prompt[row, : len(own)] = own
                after_prompt[row, len(own) :] = end + np.arange(max_new_tokens - len(own))
        return np.minimum(after_prompt, last)

    def own_columns(self, max_new_tokens: int) -> np.ndarray:
        """Return the mask of `own_mask` on the host."""
        column = np.arange(max_new_tokens)
        if self.written is None:
            first = self.prefix_length[:, None]
        else:
            begin = (self.prompt_length + self.prefix_length)[:, None]
            first = (self.positions(max_new_tokens) < begin).sum(1, keepdims=True)
        return (column >= first) & (column < self.steps()[:, None])

    def own_mask(self, max_new_tokens: int) -> Tensor:
        """Return a mask (B, T) bool of the own response tokens, on which rewards may be placed: not
        those of a prefix."""
        mask = torch.from_numpy(self.own_columns(max_new_tokens))
        return mask.to(self.tokens.device, non_blocking=True)

    def own_responses(self) -> list[np.ndarray] | None:
        """Return for each text which of its response tokens are the policy's, a prefix included,
        (R,) bool; None where the environment wrote none."""
        if self.written is None:
            return None
        spans = zip(self.written, self.prompt_length, self.length, strict=True)
        return [~np.asarray(mask[start:end], dtype=bool) for mask, start, end in spans]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTexts(WholeTexts):
    """B finished texts, with all that reward terms may know of them."""

    score: Tensor | None
    """(B,) float32: the sequence score; None where neither a scorer nor a single rule gives one."""
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

    def turns(self) -> list[list[dict[str, Any]]]:
        """Return the segments of the B responses as readable mappings (`turns.readable`)."""
        return _turns(self.prompt_and_response_ids(), self.segments(), self.tokenizer)

    def earning_mask(self, term: "RewardTerm", max_new_tokens: int) -> Tensor:
        """Return a mask (B, T) bool of the tokens on which `term` may place rewards. It is empty in
        an unscored text where the term pays the sequence score."""
        own = self.own_mask(max_new_tokens)
        return own if self.scored is None or not term.pays_score else own & self.scored[:, None]


@dataclass(slots=True)
class Transitions:
    """K tokens of the policy's, each with the state before it, the state after it, and the state in
    which the policy acts next."""

    tokens: Tensor
    """(K,) int64: the actions."""
    before: States
    after: States
    """Right after the token. What is the token's own, such as a token reward model's score of it,
    is read here."""
    terminated: Tensor
    """(K,) bool: the text ends by itself: with a stop token, or because the task says so."""
    truncated: Tensor
    """(K,) bool: the text is cut after this token, by a limit."""
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
    ends_turn: Tensor | None = None
    """(K,) bool: the token is the last of its turn, because the environment wrote something behind
    it or because the text ends. None where the environment never writes: a text is one turn."""
    turn_reward: Tensor | None = None
    """(K,) float32: the task's own reward for the turn (`Reply.reward`), on the token after which
    the environment gave it, else 0. None where the environment never writes."""
    next: States = None  # type: ignore[assignment]
    """Where the policy acts next, or where the text has ended: after what the environment wrote
    behind the token. The same object as `after` where it wrote nothing, and where it is not given.
    Differences along a text, such as shaping, go from `before` to `next`, or they would not add
    up."""

    def __post_init__(self) -> None:
        if self.next is None:
            self.next = self.after

    @property
    def statistics(self) -> dict[str, Tensor]:
        """(K, p) float32: each term's `statistics` when the text began, by the term's name."""
        return self.before.statistics

    def final_score(self) -> Tensor:
        """Return (K,) float32: the sequence score where a text ends and is scored, else 0."""
        if self.next.score is not None:
            return torch.where(self.scored, self.next.score, 0.0).float()
        if self.finished is None or self.finished.score is None:
            return torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        return self.at_end(self.finished.score)

    def at_end(self, values: Tensor) -> Tensor:
        """Return (K,) float32: `values` (B,) where a text ends and is scored, else 0."""
        out = torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        if self.finished_at is None:
            return out
        return torch.where(self.scored, out.index_copy(0, self.finished_at, values.float()), 0.0)
