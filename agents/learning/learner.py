"""Learning forwards and gradients in length-sorted micro-batches.

Suffixes: B episodes, L context, T response tokens, H hidden size, K response tokens of one
micro-batch, flat.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.episodes import EpisodeBatch, token_mask
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.learning.token_stats import token_stats
from tokenenv.models.batching import micro_batches
from tokenenv.models.trunks import logits_head, text_states

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the current policy says about the K response tokens of some episodes: (K,) tensors on
    its device."""

    logprob: Tensor
    """log pi of the tokens that were emitted."""
    entropy: Tensor
    """Of the distribution they were drawn from, in nats."""
    ref_kl: Tensor
    """Full-vocabulary KL to the reference, in nats; zero where none was given."""
    value: Tensor
    """Of the states they were emitted in."""
    rows: Tensor
    """The episode of each token, on the CPU."""
    steps: Tensor
    """Its place in the response, on the CPU."""

    def pick(self, values: Tensor) -> Tensor:
        """These tokens' entries (K,) of `values`, (B, T) or (B,), on the policy's device."""
        chosen = values[self.rows, self.steps] if values.ndim == 2 else values[self.rows]
        return chosen.to(self.logprob.device)


class FrozenLM:
    """A frozen causal LM to measure full-vocabulary KL against."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self.head = logits_head(model, vocab_size)

    @torch.no_grad()
    def states(self, tokens_BL: Tensor, lengths: np.ndarray) -> Tensor:
        """(B, L, H)."""
        return text_states(self._model, tokens_BL, lengths)


class _Texts:
    """Some texts on the policy's device, and where the states before their response tokens are."""

    def __init__(
        self,
        batch: EpisodeBatch,
        rows: np.ndarray,
        width: int,
        device: torch.device,
        extra: int = 0,
    ) -> None:
        index = torch.as_tensor(rows)
        lengths, responses = batch.length_B[index], batch.response_length_B[index]
        self.lengths = lengths.numpy()
        self.tokens_BL = batch.tokens_BL[index, : int(lengths.max())].to(device)
        row_K, self.steps = token_mask(responses + extra, width).nonzero(as_tuple=True)
        self.rows = index[row_K]
        # Response token 0 is chosen at the prompt's last token.
        place_K = row_K * self.tokens_BL.shape[1] + (lengths - responses)[row_K] + self.steps - 1
        self._place_K = place_K.to(device)

    def at(self, states_BLH: Tensor) -> Tensor:
        return states_BLH.flatten(0, 1).index_select(0, self._place_K)

    def masks(self, batch: EpisodeBatch) -> Tensor | None:
        if batch.action_mask_BTM is None:
            return None
        return batch.action_mask_BTM[self.rows, self.steps].to(self.tokens_BL.device)

    def chosen(self) -> Tensor:
        return self.tokens_BL.flatten()[self._place_K + 1]


def outputs(
    policy: LMPolicy,
    batch: EpisodeBatch,
    rows: np.ndarray,
    *,
    temperature: float = 1.0,
    reference: FrozenLM | None = None,
) -> Outputs:
    """One forward over the whole texts `rows`, read where response tokens were chosen."""
    texts = _Texts(batch, rows, batch.reward_BT.shape[1], policy.device)
    with policy.autocast():
        states_BLH, value_states_BLH = policy.states(texts.tokens_BL, texts.lengths)
        stats = token_stats(
            texts.at(states_BLH),
            texts.chosen(),
            policy.head,
            policy.vocab_size,
            temperature=temperature,
            mask_KM=texts.masks(batch),
            ref_states_KH=texts.at(reference.states(texts.tokens_BL, texts.lengths))
            if reference
            else None,
            ref_head=reference.head if reference else None,
        )
        value_K = policy.value(texts.at(value_states_BLH))
    return Outputs(stats.logprob, stats.entropy, stats.kl, value_K, texts.rows, texts.steps)


@torch.no_grad()
def state_values(policy: LMPolicy, batch: EpisodeBatch, max_batch_tokens: int) -> Tensor:
    """The critic's values (B, T + 1) on the CPU: before each response token, and of the last state;
    zero to the right."""
    values_BT1 = torch.zeros(len(batch), batch.reward_BT.shape[1] + 1)
    for rows in micro_batches(batch.length_B.numpy(), max_batch_tokens):
        texts = _Texts(batch, rows, values_BT1.shape[1], policy.device, extra=1)
        with policy.autocast():
            value_states_BLH = policy.states(texts.tokens_BL, texts.lengths)[1]
            value_K = policy.value(texts.at(value_states_BLH))
        values_BT1[texts.rows, texts.steps] = value_K.float().cpu()
    return values_BT1


@torch.no_grad()
def token_logprobs(
    policy: LMPolicy,
    batch: EpisodeBatch,
    max_batch_tokens: int,
    temperature: float = 1.0,
    which_B: Tensor | None = None,
) -> Tensor:
    """The present policy's log pi (B, T) of every response token, on the CPU; zero to the right.
    With `which_B` (bool) of those texts, and what the others were drawn with."""
    chosen = np.arange(len(batch)) if which_B is None else which_B.nonzero()[:, 0].numpy()
    logprob_BT = torch.zeros_like(batch.logprob_BT) if which_B is None else batch.logprob_BT.clone()
    for rows in micro_batches(batch.length_B.numpy()[chosen], max_batch_tokens):
        out = outputs(policy, batch, chosen[rows], temperature=temperature)
        logprob_BT[out.rows, out.steps] = out.logprob.cpu()
    return logprob_BT


LossFunction = Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]]
"""A sum over tokens whose weights sum to 1 over the minibatch, and metrics that are such sums as
well."""


def accumulate_gradient(
    policy: LMPolicy,
    batch: EpisodeBatch,
    rows: np.ndarray,
    loss_function: LossFunction,
    max_batch_tokens: int,
    *,
    temperature: float = 1.0,
    reference: FrozenLM | None = None,
    scale: float = 1.0,
) -> Metrics:
    """Adds the gradient of one minibatch, times `scale`, to the weights' `.grad`, one micro-batch
    at a time; returns the summed metrics."""
    totals: dict[str, Tensor] = {}
    for micro in micro_batches(batch.length_B.numpy()[rows], max_batch_tokens):
        out = outputs(policy, batch, rows[micro], temperature=temperature, reference=reference)
        loss, metrics = loss_function(out)
        (scale * loss).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
    return {name: float(value) for name, value in totals.items()}
