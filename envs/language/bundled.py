"""The models that come with the package, loaded once per process and shared by all envs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from tokenenv.types import Scorer

ASSETS = Path(__file__).parents[1] / "assets"


@cache
def bundled_lm(name: str, device: str, dtype: torch.dtype) -> Any:
    """Load the causal LM in `assets/<name>`, frozen."""
    with _no_bar():
        return load_causal_lm(str(ASSETS / name), device=device, dtype=dtype)


@cache
def bundled_scorer(name: str, device: str, dtype: torch.dtype) -> Scorer:
    """Load the reward model in `assets/<name>`, frozen, as a scorer."""
    with _no_bar():
        return make_scorer(load_reward_model(str(ASSETS / name), device=device, dtype=dtype))


@cache
def bundled_tokenizer(name: str) -> Any:
    """Load the tokenizer in `assets/<name>`."""
    return load_tokenizer(str(ASSETS / name))


@contextmanager
def _no_bar() -> Iterator[None]:
    """Hide transformers' progress bar: a bundled model loads in an instant."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
