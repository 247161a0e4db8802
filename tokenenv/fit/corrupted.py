"""Replaced-token detection: labels from texts alone, by what a reference model writes instead."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text
from tokenenv.fit.losses import REPLACED_SHARE
from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.cached_lm import evaluating
from tokenenv.models.heads import CHUNK
from tokenenv.models.trunks import logits_head, text_states, trunk_of, vocab_size_of
from tokenenv.types import Head

if TYPE_CHECKING:
    from tokenenv.fit.labels import LabelContext

COPIES = 8
"""How often each text is corrupted, each time anew: with one copy a model soon knows by heart which
tokens were replaced."""


def corrupt(examples: Sequence[Example], context: "LabelContext") -> list[Example]:
    """Replace `REPLACED_SHARE` of the own tokens of each text by samples of the reference, and
    label who wrote each own token: 1 the text's author, 0 the reference. There are `COPIES` of each
    text.

    The samples are drawn at temperature 1 given the true text before them, as ELECTRA's generator
    draws them (Clark et al. 2020, arXiv 2003.10555), but from a causal reference. A text is cut
    after a stop token that is drawn. A token that the reference drew counts as the reference's,
    also where the author wrote the same one: ELECTRA counts it as the author's, which pays for
    every token that the reference is certain of. `losses.replaced_tokens` says what is learned.

    Raises:
        InvalidArgument: there is no reference.
    """
    if context.reference is None:
        raise InvalidArgument(
            "objective='corrupted' needs a reference (reference=), a causal language model."
        )
    texts = [(text, example.where) for example in examples for text in example.texts]
    drawn = samples([text for text, _ in texts], COPIES, context)
    # The numbers of `samples` are those of (seed, i), and NumPy takes (seed, i, 0) for the same.
    seeds = [[(context.seed, i, 1 + copy) for copy in range(COPIES)] for i in range(len(texts))]
    return [
        Example((corrupted(text, drawn[i][copy], context, seeds[i][copy]),), where=where)
        for copy in range(COPIES)
        for i, (text, where) in enumerate(texts)
    ]


def corrupted(
    text: Text, drawn: np.ndarray, context: "LabelContext", seed: tuple[int, ...]
) -> Text:
    """Return the text with some own tokens replaced by those `drawn` (R,), and with labels."""
    rng = np.random.default_rng(seed)
    replaced = text.own_mask & (rng.random(len(drawn)) < REPLACED_SHARE)
    response = np.where(replaced, drawn, text.response)
    label = np.where(text.own_mask, ~replaced, np.nan).astype(np.float32)
    stops = np.flatnonzero(replaced & np.isin(response, context.stop_token_ids))
    end = int(stops[0]) + 1 if len(stops) else len(response)
    own = None if text.own is None else text.own[:end]
    return replace(text, response=response[:end], target=label[:end], own=own)


def samples(texts: Sequence[Text], copies: int, context: "LabelContext") -> list[np.ndarray]:
    """Return for each response token of each text tokens that the reference draws in its place,
    given what stands before it, (copies, R) int64 each."""
    model = context.reference
    head = logits_head(model, vocab_size_of(model))
    modules = [part for part in (trunk_of(model),) if isinstance(part, nn.Module)]
    groups = micro_batches([len(text) for text in texts], context.max_batch_tokens)
    drawn: list[np.ndarray] = [np.empty((copies, 0), dtype=np.int64)] * len(texts)
    for group in track(groups, "corrupted: samples", disable=not context.progress):
        chosen = [texts[i] for i in group]
        # Each text has numbers of its own: what is drawn does not depend on the groups.
        seeds = zip(group, chosen, strict=True)
        numbers = [_numbers((context.seed, i), (len(t.response), copies)) for i, t in seeds]
        with torch.no_grad(), evaluating(*modules):
            tokens = _draw(_states(model, chosen), np.concatenate(numbers), head)
        ends = np.cumsum([len(text.response) for text in chosen])[:-1]
        for i, rows in zip(group, np.split(tokens, ends), strict=True):
            drawn[i] = rows.T
    return drawn


def _numbers(seed: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def _states(model: Any, texts: Sequence[Text]) -> Tensor:
    """The model's states before the response tokens of all texts, (K, ...), one text after the
    other."""
    lengths = np.asarray([len(text) for text in texts])
    prompts = np.asarray([len(text.prompt) for text in texts])
    tokens = np.zeros((len(texts), lengths.max()), dtype=np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text.ids
    states = text_states(model, upload(tokens, torch.device(model.device)), lengths)
    place = np.arange(tokens.shape[1])
    before = (place >= prompts[:, None] - 1) & (place < lengths[:, None] - 1)
    rows, columns = (upload(index, states.device) for index in np.nonzero(before))
    return states[rows, columns]


def _draw(states: Tensor, numbers: np.ndarray, head: Head) -> np.ndarray:
    """Tokens (K, copies) int64 drawn after `states` (K, ...) with the `numbers` (K, copies),
    uniform in [0, 1): the first token at which the probabilities so far exceed the number."""
    drawn = []
    parts = states.split(CHUNK), upload(numbers, states.device).split(CHUNK)
    for some, number in zip(*parts, strict=True):
        upto = head(some).softmax(-1).cumsum(-1)
        whole = upto[:, -1:].contiguous()
        found = torch.searchsorted(upto, number * whole, right=True)
        # By rounding the number may be the whole; then it is the last token that has a probability.
        drawn.append(torch.minimum(found, torch.searchsorted(upto, whole)))
    return torch.cat(drawn).cpu().numpy()
