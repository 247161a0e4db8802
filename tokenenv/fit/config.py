"""The settings of `tokenenv fit`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.models.loading import check_device

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(kw_only=True, slots=True)
class FitConfig:
    """Settings of one training run of a reward model."""

    data: Any
    """The examples: a .jsonl, .json, .csv, .tsv or .parquet file, a folder that `tokenenv sample`
    wrote, a list of rows, or a `datasets` dataset."""
    out: Path
    """The folder to write: the model, its card, and what the run needs to go on."""
    objective: str = "bt-sum"
    """A name of `OBJECTIVES`."""
    model: Any = "new"
    """Where training begins: a hub id, a folder or a model of transformers (a causal language
    model, or a classifier with one label), or "new": a small Llama with random weights."""
    tokenizer: Any = None
    """A hub id, a folder or a tokenizer; None: the one saved with the model or with the data."""
    held_out: Any = 0.1
    """The share of prompts that are held out for early stopping and the card, below 1; or the data
    to hold out, given as `data` is. With 0 all epochs are trained and nothing is measured."""
    reference: Any = None
    """The language model that log-ratios are taken to and that texts are corrupted with; None: the
    model that training begins from."""
    teacher: Any = None
    """The sequence reward model whose score is shared out over the tokens ("share-...")."""
    chat_template: bool = False
    """Whether texts and messages are written by the tokenizer's chat template."""
    max_length: int | None = None
    """Texts with more tokens are left out, counted and reported; None: what the model reads."""
    lora_rank: int = 0
    """Rank of low-rank adapters that are trained in place of all weights; 0 trains all weights."""
    freeze: bool = False
    """Whether the trunk is frozen and its states are computed once: the head alone is trained."""
    hidden_size: int = 128
    """Of a "new" model; a multiple of 32."""
    num_layers: int = 2
    """Of a "new" model."""
    coef: float = 0.1
    """beta of log-ratios, reward per nat; and of V*, the temperature of log-mean-exp."""
    epochs: int = 3
    """Passes over the data, 1 or more."""
    lr: float | None = None
    """The highest learning rate of AdamW; None: 1e-3 for a small model (at most 10 million weights)
    and for a head alone, 2e-4 for LoRA, 2e-5 for all weights of a larger model."""
    batch_examples: int = 32
    """Examples of one optimizer step, 1 or more."""
    max_batch_tokens: int = 8192
    """Tokens of one forward, padding included. It bounds memory and changes no result."""
    weight_decay: float = 0.01
    """Of matrices."""
    warmup: float = 0.05
    """The share of steps over which the learning rate rises from 0."""
    patience: int = 2
    """Epochs without a better held-out loss after which training ends. The best epoch's weights are
    kept."""
    seed: int = 0
    """Of everything random."""
    device: str = "cpu"
    dtype: str = "float32"
    """Of the trunk, where it is frozen; what is trained is float32."""
    resume: bool = False
    """Whether to go on with the run in `out`."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("dtype", self.dtype, DTYPES)
        _check_counts(self)
        _check_rates(self)
        if self.freeze and self.lora_rank:
            raise InvalidArgument(
                f"freeze=True trains the head alone, and lora_rank={self.lora_rank} adapters of "
                "the trunk; give one of them."
            )
        check_device(self.device)
        if isinstance(self.out, str):
            self.out = Path(self.out)

    @property
    def is_new(self) -> bool:
        """Whether training begins from random weights."""
        return isinstance(self.model, str) and self.model == "new"


COUNTS = {
    "max_length": 2,
    "lora_rank": 0,
    "hidden_size": 32,
    "num_layers": 1,
    "epochs": 1,
    "batch_examples": 1,
    "max_batch_tokens": 1,
    "patience": 1,
    "seed": 0,
}
"""Settings that are whole numbers, and the least that each may be."""
RATES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "coef": ("above 0", lambda value: value > 0),
    "lr": ("above 0", lambda value: value > 0),
    "weight_decay": ("0 or more", lambda value: value >= 0),
    "warmup": ("0 to 1", lambda value: 0 <= value <= 1),
    "held_out": ("0 or more and below 1", lambda value: 0 <= value < 1),
}
"""Settings that are numbers, and what each may be."""


def _check_counts(config: FitConfig) -> None:
    for name, least in COUNTS.items():
        value = getattr(config, name)
        if value is None and name == "max_length":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise InvalidArgument(
                f"{name}={value!r} is not allowed; it must be a whole number, {least} or more."
            )


def _check_rates(config: FitConfig) -> None:
    for name, (allowed, holds) in RATES.items():
        value = getattr(config, name)
        if (value is None and name == "lr") or (name == "held_out" and not _is_number(value)):
            continue
        if not _is_number(value) or not math.isfinite(value) or not holds(value):
            raise InvalidArgument(
                f"{name}={value!r} is not allowed; it must be a number, {allowed}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
