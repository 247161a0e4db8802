"""Arithmetic-v0: finish the sum.

Prompts are sums of two numbers from 0 to 99, such as "27+85=". A text ends with <eos>; it scores 1
if what stands between is the right answer, else 0: verified, not learned. The reference learned
from pupils who make mistakes, so it is often wrong. The steps of reward="process" are the digits
and the <eos>: each scores 1 if the answer is right up to there, else 0.
"""

import torch

from tokenenv.envs.language.adder import EOS, ZERO, Adder, sums
from tokenenv.envs.language.bundled import bundled_lm, bundled_tokenizer
from tokenenv.types import Scorer, Task

MAX_PROMPT_TOKENS = len("99+99=")


def task(
    *,
    split: str = "train",
    max_new_tokens: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """The task on the sums of one split ('train' or 'test'; no sum is in both).

    A text of fewer than four tokens cannot hold every answer.
    """
    tokenizer, adder = bundled_tokenizer("arithmetic-lm"), Adder(device)
    return Task(
        tokenizer=tokenizer,
        prompts=tokenizer([f"{a}+{b}=" for a, b in sums(split)])["input_ids"],
        reference=bundled_lm("arithmetic-lm", device, dtype),
        scorer=Scorer(adder, adder.score, per_token=False),
        step_scorer=Scorer(adder, adder.step_score, per_token=False),
        step_end_token_ids=tuple(range(ZERO, ZERO + 10)),
        gold="score",
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(EOS,),
        reward="terminal",
        kl_coef=0.05,
    )
