"""Log-probs, entropies and KL of K tokens, computed from a policy's states in chunks, so that no
more than `CHUNK_ELEMENTS` of the logits (K, V) are held."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenenv.agents.learning.vocabulary import (
    CHUNK_ELEMENTS,
    Rows,
    head_numbers,
    is_linear,
    logits_numbers,
)
from tokenenv.models.heads import in_chunks
from tokenenv.types import Head


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
    rows = Rows(
        tokens_K,
        temperature,
        mask_KM,
        ref_states_KH,
        teacher_states_KH,
        ref_head,
        teacher_head,
    )
    chunk = max(1, chunk_elements // vocab_size)
    if len(tokens_K) <= chunk:
        return TokenStats(*logits_numbers(head(states_KH), rows))
    if is_linear(head):
        return TokenStats(*head_numbers(states_KH, head, rows, chunk))

    def numbers(states: Tensor, places: Tensor) -> Tensor:
        part = slice(int(places[0]), int(places[-1]) + 1)
        return torch.stack(logits_numbers(head(states), rows[part]), -1)

    # Heads of one's own may be any function, so autograd computes their chunks again.
    places_K = torch.arange(len(tokens_K))
    return TokenStats(*in_chunks(numbers, states_KH, places_K, chunk=chunk).unbind(-1))
