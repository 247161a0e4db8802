"""Log-probs, entropies and KL of K tokens, computed from a policy's states in chunks, so that the
logits (K, V) are never held whole."""

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
    """Numbers of K tokens, float32 (K,) each."""

    logprob: Tensor
    """log pi(token | state), in nats."""
    entropy: Tensor
    """Entropy of pi(. | state), in nats."""
    kl: Tensor
    """Full-vocabulary KL(pi || pi_ref) at each state, in nats; zero where no reference was
    given."""
    teacher_kl: Tensor
    """Full-vocabulary KL(pi_T || pi) at each state, in nats; zero where no teacher was given."""


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
    teacher_states_KH: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenStats:
    """Return the statistics of pi = `softmax(head(states) / temperature)` over the tokens that
    `mask_KM` allows (packed; all by default).

    pi_ref is `softmax(ref_head(ref_states))`, at temperature 1 and without gradient, and so is the
    teacher's pi_T, which is renormalised over the tokens that pi can emit. Differentiable in states
    and head. Where one chunk is not enough, a chunk's logits are computed again in the
    backward pass.
    """
    # A column that is not there has no entries: chunks are cut from all columns alike.
    nothing_K0 = states_KH.new_empty(len(states_KH), 0)

    def stats(
        states: Tensor, tokens: Tensor, mask: Tensor, ref_states: Tensor, teacher_states: Tensor
    ) -> Tensor:
        allowed = None if mask_KM is None else unpack(mask, vocab_size)
        logprobs = torch.log_softmax(rule_out(head(states).float(), allowed) / temperature, dim=-1)
        logprob = logprobs.gather(-1, tokens[:, None])[:, 0]
        nothing = torch.zeros_like(logprob)
        teacher_kl = nothing
        if teacher_head is not None:
            teacher_kl = forward_kl(teacher_head(teacher_states), logprobs)
        # A token ruled out by the head (-inf) has no part in the sums: 0 log 0 = 0, where 0 * inf
        # would be NaN.
        probs = logprobs.exp()
        logprobs = logprobs.masked_fill(probs == 0, 0.0)
        entropy = -(probs * logprobs).sum(-1)
        if ref_head is None:
            return torch.stack([logprob, entropy, nothing, teacher_kl], -1)
        with torch.no_grad():
            ref_logprobs = torch.log_softmax(ref_head(ref_states).float(), dim=-1)
            ref_logprobs = ref_logprobs.masked_fill(probs == 0, 0.0)
        kl = (probs * (logprobs - ref_logprobs)).sum(-1)
        return torch.stack([logprob, entropy, kl, teacher_kl], -1)

    masks = nothing_K0 if mask_KM is None else mask_KM
    ref_states = nothing_K0 if ref_states_KH is None else ref_states_KH
    teacher_states = nothing_K0 if teacher_states_KH is None else teacher_states_KH
    columns = states_KH, tokens_K, masks, ref_states, teacher_states
    chunk = max(1, chunk_elements // vocab_size)
    rows_K4 = stats(*columns) if len(tokens_K) <= chunk else in_chunks(stats, *columns, chunk=chunk)
    return TokenStats(*rows_K4.unbind(-1))


def forward_kl(teacher_logits_KV: Tensor, logprobs_KV: Tensor) -> Tensor:
    """Return KL(pi_T || pi) (K,) in nats, of a teacher's logits and of log pi, -inf where pi cannot
    emit a token. There the teacher is ruled out too: no weight of pi could follow it. Without
    gradient in the teacher."""
    with torch.no_grad():
        ruled_out = logprobs_KV == -torch.inf
        teacher = torch.log_softmax(
            teacher_logits_KV.float().masked_fill(ruled_out, -torch.inf), dim=-1
        )
        probs = teacher.exp()
    return (probs * (teacher - logprobs_KV).masked_fill(probs == 0, 0.0)).sum(-1)
