"""The score, shared out by the reward model's attention to the tokens of the response."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import ModelError
from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.cached_lm import acting
from tokenenv.models.prefix_scores import read_length
from tokenenv.models.trunks import trunk_of
from tokenenv.rewards.redistribute import Redistribution, at_places, read_rows
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context

CAPTURING = "_output_capturing_hooks_installed"
"""How transformers marks a model that has its hooks for showing attention weights."""


class Attention(Redistribution):
    """The score, shared out by attention: r_t = score * a_t.

    a_t is the attention to y_t from the token that the score is read at (the text's last one,
    whoever wrote it), in the reward model's last attention layer. It is the mean over the heads,
    divided by its sum over the own tokens: attention to the prompt, and to what the environment
    wrote, is left out.

    This is attention-based credit (ABC, Chan et al. 2024, arXiv 2402.00782) with the whole score
    redistributed. The paper's mixture with a terminal reward is `{"dense": ("attention", 0.8),
    "end": ("terminal", 0.2)}`. A text none of whose tokens is attended to is paid in equal shares.
    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen). Costs one more forward of the reward model a text, under eager attention.

    It fails where attention is not importance. Shares are never negative, whatever a token did to
    the score; much attention may rest on one token that says nothing; and a sliding window reaches
    only the end of the text.
    """

    name = "attention"
    needs = frozenset({"transformer scorer"})

    def bind(self, context: Context) -> None:
        """Takes the reward model's trunk. Raises `ModelError` if it has no attention weights."""
        super().bind(context)
        assert context.causal_scorer is not None
        self._trunk, self._pad_id = (
            trunk_of(context.causal_scorer.model),
            context.causal_scorer.pad_token_id,
        )
        if self._trunk.device.type == "meta":  # nothing to try out (`models.shapes`)
            return
        last_attention(
            self._trunk,
            torch.zeros(1, 2, dtype=torch.int64, device=self._trunk.device),
            np.array([2]),
        )

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the score in the shares of the attention."""
        assert texts.score is not None
        own, places = texts.own_mask(max_new_tokens).float(), texts.positions(max_new_tokens)
        weights = torch.zeros_like(own)
        for rows in micro_batches(texts.length, self._max_batch_tokens):
            ends = np.asarray(
                [read_length(texts.ids[row][: texts.length[row]], self._pad_id) for row in rows]
            )
            seen = last_attention(self._trunk, read_rows(self._trunk, texts, rows), ends)
            weights[upload(rows, weights.device)] = at_places(seen, places[rows])
        return shares(weights * own, own) * texts.score[:, None]


def shares(weights: Tensor, own: Tensor) -> Tensor:
    """(B, T): each row of `weights` divided by its sum; equal shares of `own` (B, T; 0 or 1)
    where that is zero."""
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, own)
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def last_attention(trunk: Any, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    """Return the attention (b, W) float32 of each text's last token to its tokens, in the last
    layer that has attention weights, as the mean over its heads.

    Args:
        trunk: a transformers model.
        tokens: (b, W) int64, right-padded.
        lengths: (b,) on the host.

    Raises:
        ModelError: no layer has attention weights.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    last = upload(lengths - 1, tokens.device)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if (
            not isinstance(weights, Tensor)
            or weights.ndim != 4
            or weights.shape[2:] != (tokens.shape[1],) * 2
        ):
            return None
        kept[:] = [weights[rows, :, last].float().mean(1)]
        # Weights that are passed on would be collected from every layer, which may not fit into
        # memory.
        return (output[0], None, *output[2:])

    with acting(trunk), eager_attention(trunk), _hooked(trunk, keep):
        trunk(input_ids=tokens, use_cache=False, output_attentions=True)
    if not kept:
        raise ModelError(
            f"reward='attention': {type(trunk).__name__} gives no attention weights; the design "
            f"needs a transformers model that does."
        )
    return kept[0]


@contextmanager
def eager_attention(trunk: Any) -> Iterator[None]:
    """Run the model with eager attention, the only kind that gives its weights. Afterwards each
    part of the model has the kind that it had before."""
    configs = {
        id(module.config): module.config for module in trunk.modules() if hasattr(module, "config")
    }
    chosen = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in chosen:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in chosen:
            config._attn_implementation = implementation


@contextmanager
def _hooked(trunk: Any, hook: Any) -> Iterator[None]:
    """Let `hook` see every module's output, before any other hook does. Afterwards the hooks are
    those of before: transformers leaves some of its own behind, and a model that has them cannot be
    pickled."""
    before = [
        (module, list(module._forward_hooks), CAPTURING in vars(module))
        for module in trunk.modules()
    ]
    for module, _, _ in before:
        module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        for module, hooks, capturing in before:
            for key in set(module._forward_hooks) - set(hooks):
                del module._forward_hooks[key]
            if not capturing:
                vars(module).pop(CAPTURING, None)
