"""Reviews-v0: continue a review so that it is positive.

## Description

A small language model has learned short reviews of hotels, restaurants and the like from a grammar
(`tokenenv.envs.language.review_grammar`). It continues the beginning of a review word by word. A
reward model that has learned the grammar's sentiment rewards every word by what it changes, and the
grammar itself says what is really positive, so that proxy and truth can be compared. Reference and
reward model are bundled (0.73 and 0.32 million parameters), and the policy starts from the
reference.

## Observation Space

`Dict(tokens=Box(0, 205, (50,), int64), length=Discrete(51), prompt_length=Discrete(51))`: the
prompt and the response so far, padded on the right. P = 10, and T = 40 by default
(`max_new_tokens`). With `observation="features"` it is the reference's last hidden state,
`Box(-inf, inf, (128,), float32)`.

## Action Space

`Discrete(206)`: the next word or mark.

## Rewards

The score of a text is the sum of the scores that the bundled token-classification reward model
gives to the words of the response. It was trained towards 4 tanh(s / 2), where s is the sum of the
review's opinions, so it lies between about -4 and 4. The default design is "token": each word is
paid its own score at once. The KL term has `kl_coef=0.2`.

`infos["gold"]` is 1 if the whole review, prompt included, is positive by the grammar's rule, and 0
if not (a balanced review is not). The optimum is not known. On 1,024 texts of the reference the
gold metric is 0.49 on the prompts of "train" and 0.48 on those of "test" (standard error 0.02), the
mean score 0.52 and 0.47 (0.07), and the mean length 19 words.

## Starting State

A prompt drawn uniformly from those of `split`: the first 4 to 10 words of a review, without any
opinion. "train" has 2,000 prompts and "test" 512, and no prompt is in both.

## Episode End

A text ends with `<eos>`, or is cut after T words. The reference ends 97 of 100 texts by itself.

## Arguments

```python
envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=64, split="test", max_new_tokens=40)
```

## Version History

* v0: initial version.
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
    """Make the task.

    Args:
        split: the prompts, "train" (2,000) or "test" (512); no prompt is in both.
        max_new_tokens: T, the most words of a response, 1 or more; the models have 256 positions,
            of which a prompt takes up to 10.
        device: where the models are put.
        dtype: the data type of the models.

    Raises:
        InvalidArgument: the split is not known.
    """
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
    """Return 1.0 if prompt and response together are a positive review, else 0.0."""
    return float(is_positive(f"{prompt} {response}"))
