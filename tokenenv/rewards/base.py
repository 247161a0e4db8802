"""The protocol of a reward term: what it may look at, and how it is paid.

A causal or policy-dependent term maps K transitions to K rewards. The K transitions are the rows of one step, or every
token of many finished texts: one formula serves both, so stepping equals scoring by construction. A hindsight term
places its sum over the tokens of a finished text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.trunks import trunk_of
from tokenenv.types import Scorer, TokenSpec

Kind = Literal["causal", "hindsight", "policy"]
Weight = float | Callable[[int], float]
"""A number, or a schedule over the tokens the env has seen; read when an episode begins."""


@dataclass(slots=True)
class States:
    """K texts as the models see them after their last token."""

    hidden: dict[int, Tensor]
    """A state (K, H) for every trunk, by its id()."""
    score: Tensor | None = None
    """(K,) the scorer's score of the text so far: a running sum of token scores, or the score at the last token."""

    def of(self, model: Any) -> Tensor:
        """The states (K, H) of `model`'s trunk; the term lists the model in `models`."""
        return self.hidden[id(trunk_of(model))]


@dataclass(slots=True)
class FinishedTexts:
    """B finished texts."""

    tokens: Tensor
    """(B, L) int64, right-padded: prompt and response."""
    length: np.ndarray
    """(B,) int64: tokens of prompt and response together."""
    prompt_length: np.ndarray
    """(B,) int64."""
    unpaid: np.ndarray
    """(B,) int64: leading response tokens that earn nothing, because `reset` was given them as a prefix."""
    score: Tensor | None
    """(B,) the sequence score, or None without a scorer."""
    ids: Sequence[np.ndarray]
    """The same tokens on the host, one array (length,) a text."""
    tokenizer: Any = None

    def prompt_and_response_ids(self) -> list[tuple[list[int], list[int]]]:
        """B pairs of token id lists."""
        return [(row[:p].tolist(), row[p:].tolist()) for row, p in zip(self.ids, self.prompt_length, strict=True)]

    def prompt_and_response_texts(self) -> list[tuple[str, str]]:
        """B pairs of texts, without special tokens."""
        pairs = self.prompt_and_response_ids()
        flat = self.tokenizer.batch_decode([ids for pair in pairs for ids in pair], skip_special_tokens=True)
        return list(zip(flat[0::2], flat[1::2], strict=True))

    def payable(self, max_new_tokens: int) -> Tensor:
        """(B, T) bool: the response tokens that rewards may be placed on."""
        position = np.arange(max_new_tokens)
        response = (self.length - self.prompt_length)[:, None]
        mask = (position >= self.unpaid[:, None]) & (position < response)
        return torch.from_numpy(mask).to(self.tokens.device, non_blocking=True)


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

    def at_end(self, values: Tensor) -> Tensor:
        """(K,) zeros, with `values` (B,) where a text ends and its score is due."""
        out = torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        if self.finished_at is None:
            return out
        return out.index_copy(0, self.finished_at, values.float()) * self.scored


@dataclass(frozen=True, slots=True)
class Parts:
    """What an env offers its reward terms."""

    spec: TokenSpec
    reference: Any
    scorer: Scorer | None
    device: torch.device


class RewardTerm:
    """One named part of the reward. Subclasses set the class attributes and define `reward` or `place`."""

    name: str = ""
    kind: Kind = "causal"
    weight: Weight = 1.0
    needs: frozenset[str] = frozenset()
    """Of "scorer", "token scorer", "reference", "tokenizer": what the env must have."""
    models: Sequence[Any] = ()
    """Causal models whose states the term reads; run once a step whoever reads them."""
    withheld: bool = False
    """True for a term that pays or redistributes the sequence score: nothing is paid at an unscored truncation."""
    has_potential: bool = False
    """True where the term is potential-based and defines `potential`."""

    def bind(self, parts: Parts) -> None:
        """Called once by the env; checks `needs` and lets the term take what it wants from `parts`."""
        have = {
            "scorer": parts.scorer is not None,
            "token scorer": parts.scorer is not None and parts.scorer.per_token,
            "reference": parts.reference is not None,
            "tokenizer": parts.spec.tokenizer is not None,
        }
        wanted = {
            "token scorer": "a token-classification reward model (reward_model=)",
            "scorer": "a reward model (reward_model=)",
        }
        for need in sorted(self.needs):
            if not have[need]:
                raise InvalidArgument(
                    f"reward={self.name!r} needs {wanted.get(need, 'a ' + need)}, which this env has not; "
                    "reward= also takes a rule or a term of your own."
                )

    def reward(self, batch: Transitions) -> Tensor:
        """Causal and policy-dependent terms: rewards (K,) of K transitions, unweighted."""
        raise TypeError(f"{type(self).__name__} defines neither reward() nor place()")

    def potential(self, states: States) -> Tensor:
        """Potential-based terms: Phi (K,) of K running texts, unweighted."""
        raise TypeError(f"{type(self).__name__} sets has_potential but does not define potential()")

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """Hindsight terms: rewards (B, T) of the tokens of B finished texts, unweighted; their sum is paid at the end."""
        raise TypeError(f"{type(self).__name__} is a hindsight term and does not define place()")


@dataclass(slots=True)
class RewardSum:
    """The terms of an env, weighted and added."""

    terms: dict[str, RewardTerm]
    max_new_tokens: int
    causal: list[str] = field(init=False)
    hindsight: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.hindsight = [name for name, term in self.terms.items() if term.kind == "hindsight"]
        self.causal = [name for name in self.terms if name not in self.hindsight]

    def paid(self, batch: Transitions, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The causal and policy-dependent terms' weighted rewards (K,); `weights` are (K,)."""
        # A term that is switched off pays 0, also where its reward is -inf (a token that the reference does not have).
        rewards = {name: self.terms[name].reward(batch) for name in self.causal}
        return {name: torch.where(weights[name] == 0, 0.0, weights[name] * reward) for name, reward in rewards.items()}

    def placed(self, texts: FinishedTexts, scored: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The hindsight terms' weighted rewards (B, T); `scored` and `weights` are (B,)."""
        return {name: self._place(self.terms[name], texts, scored) * weights[name][:, None] for name in self.hindsight}

    def _place(self, term: RewardTerm, texts: FinishedTexts, scored: Tensor) -> Tensor:
        placed = term.place(texts, self.max_new_tokens) * texts.payable(self.max_new_tokens)
        return placed * scored[:, None] if term.withheld else placed

    def potential(self, states: States, weights: Mapping[str, Tensor]) -> Tensor | None:
        """The weighted sum of the potentials (K,), or None where no term is potential-based."""
        parts = [weights[name] * term.potential(states) for name, term in self.terms.items() if term.has_potential]
        return torch.stack(parts).sum(0) if parts else None


def weight_at(term: RewardTerm, tokens_seen: int) -> float:
    """The term's weight now; a schedule is asked with the tokens the env has seen."""
    return float(term.weight(tokens_seen) if callable(term.weight) else term.weight)
