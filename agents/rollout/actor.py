"""Acting: one token for every slot of a vector env, from N running caches.

Suffixes: N slots, L context, H hidden size, K states, V vocabulary.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.learning.masks import allowed_of, rule_out
from tokenenv.models.batching import in_order, last_states, upload, vocabulary_blocks
from tokenenv.models.same_texts import prefill_once
from tokenenv.models.trunks import extend_slots
from tokenenv.types import SlotModel


class Policy(Protocol):
    """What acting asks of a policy; `LMPolicy` is the one for transformers models."""

    vocab_size: int

    def slots(self, num_slots: int, max_length: int) -> SlotModel:
        """Return caches for N running texts of at most `max_length` tokens."""
        ...

    def head(self, states_KH: Tensor) -> Tensor:
        """Return logits (K, V) at temperature 1 for states (K, H)."""
        ...

    def autocast(self) -> AbstractContextManager:
        """Return the context that forwards run in, which sets their precision."""
        ...

    def parameters(self) -> Any:
        """Return all weights; their device is the policy's."""
        ...


def read_values(policy: Any, states_KH: Tensor) -> Tensor | None:
    """Return the critic's values (K,) of the states that tokens are drawn in; None where the
    learner would find others. A model that runs in fewer bits rounds a cached forward and a whole
    one differently."""
    return policy.value(states_KH) if states_KH.dtype == torch.float32 else None


def to_host(values_N: Tensor) -> np.ndarray:
    """Copy to the host: the one copy from the device that acting makes."""
    return values_N.cpu().numpy()


def device_of(policy: Policy) -> torch.device:
    """Return the device of the policy's weights."""
    return next(iter(policy.parameters())).device


def sample(
    logits_NV: Tensor, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row from `softmax(logits / temperature)`.

    Returns tokens (N,) int64 and their log-probabilities (N,). It takes N random numbers, not N V;
    at temperature 0 none.
    """
    if temperature == 0:
        return invert(logits_NV, temperature, logits_NV)
    random_N1 = torch.rand(len(logits_NV), 1, generator=generator, device=logits_NV.device)
    return invert(logits_NV, temperature, random_N1[:, 0])


def invert(logits_NV: Tensor, temperature: float, random_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (N,) int64 at which the cumulative distribution of `softmax(logits /
    temperature)` passes `random_N` (N,), 0 to below 1, and their log-probabilities (N,).

    At temperature 0 they are the likeliest tokens, whatever the random numbers are; their
    log-probabilities are then 0.
    """
    if temperature == 0:
        tokens_N = logits_NV.argmax(-1)
        return tokens_N, torch.zeros_like(tokens_N, dtype=torch.float32)
    logits_NV = logits_NV.float()
    if temperature != 1:
        logits_NV = logits_NV / temperature
    found = [_invert(logits_NV[rows], random_N[rows]) for rows in vocabulary_blocks(logits_NV)]
    tokens, logprobs = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _invert(logits_KV: Tensor, random_K: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `invert` does at temperature 1, for a few rows, which stay in a processor's cache."""
    cumulative_KV = torch.softmax(logits_KV, dim=-1).cumsum_(-1)
    # The total differs from 1 by rounding. Scaling by it keeps the last token reachable, and a
    # token of probability 0 impossible.
    tokens_K1 = torch.searchsorted(
        cumulative_KV, random_K[:, None] * cumulative_KV[:, -1:], right=True
    )
    tokens_K1 = tokens_K1.clamp_(max=logits_KV.shape[1] - 1)
    # `log_softmax` is 2e-5 off at large vocabularies, and the learner is not (`vocabulary`). Of the
    # logarithms only those that are asked for are computed.
    return tokens_K1[:, 0], logits_KV.gather(-1, tokens_K1)[:, 0] - logits_KV.logsumexp(-1)


class Actor:
    """Samples a policy's next token in each of N running texts, and keeps their caches.

    With `reads_values` it also reads the policy's value head at the states that tokens are drawn
    in, which costs H multiplications a token.

    It knows what happened from the observation alone. A slot whose text is the last one plus the
    token that was emitted is continued by that token. Where more tokens stand behind it, which the
    environment wrote, the slot is continued by all of them at once. In any other slot (reset,
    forked, restored, or seen for the first time) the text is read from its start.

    Args:
        policy: whose tokens are drawn.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of the random numbers.
        share: an env's `share_backbone`, where it reads each token for the policy too.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        share: Callable[[SlotModel | None], SlotModel | None] | None = None,
        reads_values: bool = False,
    ) -> None:
        self.policy, self.share = policy, share
        self.temperature = temperature
        self.reads_values = reads_values
        self.values: Tensor | None = None
        """(N,) float32: the critic's values of the states that the last tokens were drawn in; None
        where they are not read."""
        self.generator = torch.Generator(device_of(policy)).manual_seed(seed)
        self._slots: SlotModel | None = None

    @torch.no_grad()
    def act(self, obs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return tokens (N,) int64 and log-probabilities (N,) float32 on the policy's device.

        The observation holds NumPy arrays or tensors. With an `action_mask` (N, V) in it, both are
        of the policy over the allowed tokens.
        """
        device = self.generator.device
        texts_NL = torch.as_tensor(obs["tokens"], device=device)
        lengths_N = torch.as_tensor(obs["length"], device=device)
        if self._slots is None or self._texts.shape != (len(texts_NL), texts_NL.shape[1] + 1):
            self._start(*texts_NL.shape)
        with self.policy.autocast():
            states_NH = self._read(texts_NL, lengths_N)
            logits_NV = self.policy.head(states_NH)
        self.values = read_values(self.policy, states_NH) if self.reads_values else None
        logits_NV = rule_out(logits_NV, allowed_of(obs, device))
        tokens_N, logprobs_N = sample(logits_NV, self.temperature, self.generator)
        self._expect(texts_NL, lengths_N, tokens_N)
        return tokens_N, logprobs_N

    def refresh(self) -> None:
        """Have every text read again before the next token; to be called when the weights have
        changed."""
        if self._slots is not None:
            # A text shorter than the expected one does not run on, and none is as long as this.
            self._lengths.fill_(self._texts.shape[1] + 1)

    def _start(self, num_rows: int, max_length: int) -> None:
        device = self.generator.device
        slots: SlotModel | None = self.policy.slots(num_rows, max_length)
        slots = self.share(slots) if self.share else slots
        # The observation that is expected next if a slot's text runs on. One column more than
        # observations have, for the token that is emitted after a full text.
        self._texts = torch.zeros(num_rows, max_length + 1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._places = torch.arange(max_length, device=device)
        self._slots = slots
        self.refresh()

    def _read(self, texts_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """Return the states (N, H) after each text: by one appended token, by several where the
        environment wrote behind it or, where the text is not the expected one, from its start."""
        assert self._slots is not None
        # One small copy tells the host all of it.
        news, same = to_host(self._news(texts_NL, lengths_N))
        # From here to `_expect` the caches change. If anything interrupts that, no text is expected
        # to run on, and all are read again.
        self.refresh()
        if not news.any():
            return self._slots.append(self._tokens)
        slots = begun, longer, on = [
            np.flatnonzero(which) for which in (news > 0, news < 0, news == 0)
        ]
        states = []
        if len(begun):
            states.append(self._begin(begun, texts_NL, news[begun], same[begun]))
        if len(longer):
            states.append(self._extend(longer, texts_NL, lengths_N, 1 - news[longer]))
        # The slots that have just been read take no part in the append.
        if len(on):
            after = self._slots.append(self._tokens, news == 0)
            states.append(after[upload(on, after.device)])
        return in_order(states, slots)

    def _news(self, texts_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """Return (2, N) int64: how each text goes on, and whether the slot before holds the same
        text.

        It goes on with 0 where it is the expected one, with -k where k tokens were written behind
        that, and with its length where it has to be read from its start.
        """
        differs_NL = (texts_NL != self._texts[:, :-1]) & (self._places < self._lengths[:, None])
        fewer_N = self._lengths - lengths_N
        changed_N = differs_NL.any(1) | (fewer_N > 0)
        same_N = torch.zeros_like(changed_N)
        same_N[1:] = (texts_NL[1:] == texts_NL[:-1]).all(1) & (lengths_N[1:] == lengths_N[:-1])
        return torch.stack([torch.where(changed_N, lengths_N, fewer_N), same_N.long()])

    def _begin(
        self, slots: np.ndarray, texts_NL: Tensor, lengths: np.ndarray, same: np.ndarray
    ) -> Tensor:
        """Read the texts of some slots (n,) from their start, and return the states (n, H)."""
        assert self._slots is not None
        begun = texts_NL[upload(slots, texts_NL.device), : int(lengths.max())]
        # What a group begins with is read once: its slots are neighbours.
        alike = (same == 1) & (np.diff(slots, prepend=-2) == 1)
        first = np.maximum.accumulate(np.where(alike, 0, np.arange(len(slots))))
        return prefill_once(self._slots, slots, begun, lengths, first)

    def _extend(
        self, slots: np.ndarray, texts_NL: Tensor, lengths_N: Tensor, counts: np.ndarray
    ) -> Tensor:
        """Read the last `counts` (n,) tokens of some slots (n,): the policy's own and those that
        were written behind it. Return the states (n, H) after each text."""
        assert self._slots is not None
        rows = upload(slots, texts_NL.device)
        starts = lengths_N[rows] - upload(counts, texts_NL.device)
        places = starts[:, None] + self._places[: int(counts.max())]
        # A row with fewer tokens is padded by whatever stands behind them.
        new = texts_NL[rows].gather(1, places.clamp(max=texts_NL.shape[1] - 1))
        return last_states(extend_slots(self._slots, len(texts_NL), slots, new, counts), counts)

    def _expect(self, texts_NL: Tensor, lengths_N: Tensor, tokens_N: Tensor) -> None:
        self._texts[:, :-1] = texts_NL
        self._texts.scatter_(1, lengths_N[:, None], tokens_N[:, None])
        self._lengths = lengths_N + 1
        self._tokens = tokens_N
