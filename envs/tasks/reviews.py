"""Reviews-v0: continue a review so that it is positive.

Prompts are the first 4 to 10 words of reviews from the grammar in `review_grammar.py`, no opinion
given yet. A text ends with `<eos>`. The gold metric is 1 if the whole review is positive by the
grammar's rule, 0 if not (balanced included).
"""

import torch

from tokenenv.envs.language.bundled import bundled_lm, bundled_scorer, bundled_tokenizer
from tokenenv.envs.language.review_grammar import MAX_OPENING, is_positive, openings
from tokenenv.types import Task


def task(
    *,
    split: str = "train",
    max_new_tokens: int = 40,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """The task on the prompts of one split ('train' or 'test'; no prompt is in both)."""
    tokenizer = bundled_tokenizer("reviews-lm")
    return Task(
        tokenizer=tokenizer,
        prompts=tokenizer(list(openings(split)))["input_ids"],
        reference=bundled_lm("reviews-lm", device, dtype),
        scorer=bundled_scorer("reviews-reward", device, dtype),
        max_prompt_tokens=MAX_OPENING,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(tokenizer.eos_token_id,),
        gold=gold,
        kl_coef=0.2,
    )


def gold(prompt: str, response: str) -> float:
    """1.0 if prompt and response together are a positive review, else 0.0."""
    return float(is_positive(f"{prompt} {response}"))
