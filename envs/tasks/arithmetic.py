"""Arithmetic-v0: finish the sum.

## Description

A small language model finishes sums of two numbers from 0 to 99, such as "27+85=", digit by digit.
The answer is verified, not judged by a learned model. The reference learned from pupils who make
mistakes, so it is often wrong. It is bundled (0.2 million parameters), and the policy starts from
it.

## Observation Space

`Dict(tokens=Box(0, 13, (10,), int64), length=Discrete(11), prompt_length=Discrete(11))`: the prompt
and the response so far, padded on the right. P = 6, and T = 4 by default (`max_new_tokens`). With
`observation="features"` it is the reference's last hidden state, `Box(-inf, inf, (96,), float32)`.

## Action Space

`Discrete(14)`: the next character, a digit, "+", "=", `<eos>` or `<pad>`.

## Rewards

The score of a text is 1 if what stands between the prompt and `<eos>` is the right answer, else 0.
The default design is "terminal": the score at the last token. The KL term has `kl_coef=0.05`. With
`reward="process"` every digit and the `<eos>` is a step, which scores 1 if the answer is right up
to there, else 0.

`infos["gold"]` is the score. J* is not computed; the largest score is 1. On 1,024 texts of the
reference the mean score is 0.72 on the sums of "train" and 0.69 on those of "test" (standard error
0.01), and the mean length 3.5 tokens.

## Starting State

A sum drawn uniformly from those of `split`. "train" has 7,429 sums and "test" 2,571; a + b and b +
a are in the same split.

## Episode End

A text ends with `<eos>`, or is cut after T tokens. Four tokens hold every answer.

## Arguments

```python
envs = gym.make_vec("tokenenv/Arithmetic-v0", num_envs=64, reward="process", split="train")
```

## Version History

* v0: initial version.
"""

import torch

from tokenenv.envs.language.adder import Adder, sums
from tokenenv.envs.language.bundled import bundled_lm, bundled_tokenizer
from tokenenv.envs.language.digits import EOS, ZERO
from tokenenv.types import Scorer, Task

MAX_PROMPT_TOKENS = len("99+99=")


def task(
    *,
    split: str = "train",
    max_new_tokens: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Make the task.

    Args:
        split: the sums, "train" (7,429) or "test" (2,571); no sum is in both.
        max_new_tokens: T, the most tokens of an answer, `<eos>` included. Fewer than four cannot
            hold every answer.
        device: where the models are put.
        dtype: the data type of the models.

    Raises:
        InvalidArgument: the split is not known.
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
