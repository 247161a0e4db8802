"""What makes the labels of objectives whose data has none (`Objective.labels_from`).

A maker turns examples into examples of one text each, with a `target` for the policy's own tokens.
It draws what is random from `LabelContext.seed` alone: the same data and seed give the same labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenenv.fit.corrupted import corrupt
from tokenenv.fit.edits import label_edits
from tokenenv.fit.examples import Example
from tokenenv.fit.redistributed import redistribute
from tokenenv.rewards import Attention, Delta, Gradient, Occlusion
from tokenenv.types import Scorer, TextScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelContext:
    """What makers may use."""

    tokenizer: Any = None
    """A transformers tokenizer, or None."""
    reference: Any = None
    """The language model that texts are corrupted with: a transformers causal language model or a
    `TokenModel`."""
    teacher: Scorer | TextScorer | None = None
    """The reward model whose score is shared out."""
    seed: int = 0
    """Of everything random, 0 or more."""
    stop_token_ids: tuple[int, ...] = ()
    """The ids that end a text."""
    max_batch_tokens: int = 8192
    """Tokens of one forward, padding included."""
    progress: bool = False
    """Whether to show a progress line."""


Maker = Callable[[Sequence[Example], LabelContext], list[Example]]
MAKERS: dict[str, Maker] = {
    "share-delta": partial(redistribute, design=Delta),
    "share-attention": partial(redistribute, design=Attention),
    "share-occlusion": partial(redistribute, design=Occlusion),
    "share-gradient": partial(redistribute, design=Gradient),
    "edits": label_edits,
    "corrupted": corrupt,
}
"""The makers by name."""
