"""Sampling and scoring through transformers alone, to test the bundled models without the
environment."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenenv.types import Scorer


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: int
) -> list[list[int]]:
    """Draw one response to each prompt at temperature 1, its stop token included."""
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens}
    options |= {"eos_token_id": stop, "pad_token_id": stop}
    responses: dict[int, list[int]] = {}
    for length in sorted(set(map(len, prompts))):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = torch.tensor([list(prompts[i]) for i in rows])
        drawn = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        for i, ids in zip(rows, drawn[:, length:].tolist(), strict=True):
            responses[i] = ids[: ids.index(stop) + 1] if stop in ids else ids
    return [responses[i] for i in range(len(prompts))]


@torch.no_grad()
def summed_scores(
    scorer: Scorer, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the sum of the token scores of each response, (B,)."""
    pairs = zip(prompts, responses, strict=True)
    return np.array([_score(scorer, [*p, *r], len(p)) for p, r in pairs])


def _score(scorer: Scorer, ids: list[int], start: int) -> float:
    states = scorer.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return float(scorer.head(states)[start:].sum())
