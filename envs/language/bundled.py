"""The models that come with the package, loaded once per process and shared by all envs."""

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
    return load_causal_lm(str(ASSETS / name), device=device, dtype=dtype)


@cache
def bundled_scorer(name: str, device: str, dtype: torch.dtype) -> Scorer:
    """Load the reward model in `assets/<name>`, frozen, as a scorer."""
    return make_scorer(load_reward_model(str(ASSETS / name), device=device, dtype=dtype))


@cache
def bundled_tokenizer(name: str) -> Any:
    """Load the tokenizer in `assets/<name>`."""
    return load_tokenizer(str(ASSETS / name))
