"""What a policy says about K tokens, computed from its states in chunks so that (K, V) is never
held whole."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenenv.agents.learning.masks import rule_out, unpack
from tokenenv.models.heads import in_chunks
from tokenenv.types import Head

CHUNK_ELEMENTS = 2**23
"""Logits held at a time: 32 MiB in float32."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """For K tokens, float32 (K,) each."""

    logprob: Tensor
    """log pi(token | state)."""
    entropy: Tensor
    """Of pi(. | state), in nats."""
    kl: Tensor
    """Full-vocabulary KL(pi || pi_ref) at each state, in nats; zero where no reference was
    given."""


def token_stats(
    states_KH: Tensor,
    tokens_K: Tensor,
    head: Head,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    mask_KM: Tensor | None = None,
    ref_states_KH: Tensor | None = None,
    ref_head: Head | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenStats:
    """Statistics of pi = `softmax(head(states) / temperature)` over the tokens that `mask_KM`
    allows (packed, all by default); pi_ref is `softmax(ref_head(ref_states))`, without gradient.

    Differentiable in states and head. Where one chunk is not enough, its logits are computed again
    in the backward pass.
    """
    nothing_K0 = states_KH.new_empty(len(states_KH), 0)

    def stats(states: Tensor, tokens: Tensor, mask: Tensor, ref_states: Tensor) -> Tensor:
        allowed = None if mask_KM is None else unpack(mask, vocab_size)
        logprobs = torch.log_softmax(rule_out(head(states).float(), allowed) / temperature, dim=-1)
        logprob = logprobs.gather(-1, tokens[:, None])[:, 0]
        # A token ruled out by the head (-inf) has no part in the sums: 0 log 0 = 0, where 0 * inf
        # would be NaN.
        probs = logprobs.exp()
        logprobs = logprobs.masked_fill(probs == 0, 0.0)
        entropy = -(probs * logprobs).sum(-1)
        if ref_head is None:
            return torch.stack([logprob, entropy, torch.zeros_like(entropy)], -1)
        with torch.no_grad():
            ref_logprobs = torch.log_softmax(ref_head(ref_states).float(), dim=-1).masked_fill(
                probs == 0, 0.0
            )
        return torch.stack([logprob, entropy, (probs * (logprobs - ref_logprobs)).sum(-1)], -1)

    columns = [
        states_KH,
        tokens_K,
        *(nothing_K0 if column is None else column for column in (mask_KM, ref_states_KH)),
    ]
    chunk = max(1, chunk_elements // vocab_size)
    rows_K3 = stats(*columns) if len(tokens_K) <= chunk else in_chunks(stats, *columns, chunk=chunk)
    return TokenStats(*rows_K3.unbind(-1))
