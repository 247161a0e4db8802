"""Acting: one token for every slot of a vector env, from N running caches.

Suffixes: N slots, L context, H hidden size, K states, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.learning.masks import allowed_of, rule_out
from tokenenv.models.batching import upload
from tokenenv.models.same_texts import prefill_once
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

    Returns tokens (N,) int64 and their log-probabilities (N,). The cumulative distribution is
    inverted, which takes N random numbers and not N V. At temperature 0 it is the likeliest token,
    without a random number; its log-probability is then 0.
    """
    if temperature == 0:
        tokens_N = logits_NV.argmax(-1)
        return tokens_N, torch.zeros_like(tokens_N, dtype=torch.float32)
    logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    cumulative_NV = logprobs_NV.exp().cumsum(-1)
    uniform_N1 = torch.rand(len(logits_NV), 1, generator=generator, device=logits_NV.device)
    # The total differs from 1 by rounding. Scaling by it keeps the last token reachable, and a
    # token of probability 0 impossible.
    tokens_N1 = torch.searchsorted(cumulative_NV, uniform_N1 * cumulative_NV[:, -1:], right=True)
    tokens_N1 = tokens_N1.clamp_(max=logits_NV.shape[1] - 1)
    return tokens_N1[:, 0], logprobs_NV.gather(-1, tokens_N1)[:, 0]


class Actor:
    """Samples a policy's next token in each of N running texts, and keeps their caches.

    It knows what happened from the observation alone. A slot whose text is the last one plus the
    token that was emitted is continued by that token. In any other slot (reset, forked, restored,
    or seen for the first time) the text is read from its start.
    """

    def __init__(self, policy: Policy, *, temperature: float = 1.0, seed: int = 0) -> None:
        self.policy = policy
        self.temperature = temperature
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
            logits_NV = self.policy.head(self._read(texts_NL, lengths_N))
        logits_NV = rule_out(logits_NV, allowed_of(obs, device))
        tokens_N, logprobs_N = sample(logits_NV, self.temperature, self.generator)
        self._expect(texts_NL, lengths_N, tokens_N)
        return tokens_N, logprobs_N

    def refresh(self) -> None:
        """Have every text read again before the next token; to be called when the weights have
        changed."""
        if self._slots is not None:
            self._lengths.fill_(-1)

    def _start(self, num_rows: int, max_length: int) -> None:
        device = self.generator.device
        slots = self.policy.slots(num_rows, max_length)
        # The observation that is expected next if a slot's text runs on. One column more than
        # observations have, for the token that is emitted after a full text.
        self._texts = torch.zeros(num_rows, max_length + 1, dtype=torch.int64, device=device)
        self._lengths = torch.full((num_rows,), -1, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._slots = slots

    def _read(self, texts_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """Return the states (N, H) after each text: by one appended token or, where the text is not
        the expected one, from its start."""
        assert self._slots is not None
        changed_N = (texts_NL != self._texts[:, :-1]).any(1) | (lengths_N != self._lengths)
        same_N = torch.zeros_like(changed_N)
        same_N[1:] = (texts_NL[1:] == texts_NL[:-1]).all(1) & (lengths_N[1:] == lengths_N[:-1])
        # The length to read, 0 where the text runs on, and whether the slot before holds the same
        # text: one small copy tells the host all of it.
        fresh, same = to_host(torch.stack([changed_N * lengths_N, same_N.long()]))
        # From here to `_expect` the caches change. If anything interrupts that, no text is expected
        # to run on, and all are read again.
        self.refresh()
        slots = np.flatnonzero(fresh)
        if not len(slots):
            return self._slots.append(self._tokens)
        rows = upload(slots, texts_NL.device)
        begun, lengths = texts_NL[rows, : int(fresh.max())], fresh[slots]
        # What a group begins with is read once: its slots are neighbours.
        alike = (same[slots] == 1) & (np.diff(slots, prepend=-2) == 1)
        first = np.maximum.accumulate(np.where(alike, 0, np.arange(len(slots))))
        fresh_states = prefill_once(self._slots, slots, begun, lengths, first)
        if len(slots) == len(fresh):
            return fresh_states
        # The slots that were just filled take no part in the append.
        return self._slots.append(self._tokens, fresh == 0).index_copy(0, rows, fresh_states)

    def _expect(self, texts_NL: Tensor, lengths_N: Tensor, tokens_N: Tensor) -> None:
        self._texts[:, :-1] = texts_NL
        self._texts.scatter_(1, lengths_N[:, None], tokens_N[:, None])
        self._lengths = lengths_N + 1
        self._tokens = tokens_N
