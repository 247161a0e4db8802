"""PyDocs-v0: continue prose of the running Python's own reference in plainer words.

## Description

A small language model continues a paragraph of the Python reference, which is read at run time from
the standard library (`pydoc_data.topics`). The aim is text that is easier to read. A reward model
that has learned the reading ease of a text so far rewards every token by what it changes. The texts
are real English prose, and the true metric is public: Flesch's reading ease. Reference and reward
model are bundled (0.84 and 0.39 million parameters), and the policy starts from the reference.

## Observation Space

`Dict(tokens=Box(0, 1023, (104,), int64), length=Discrete(105), prompt_length=Discrete(105))`: the
prompt and the response so far, padded on the right. P = 24, and T = 80 by default
(`max_new_tokens`). With `observation="features"` it is the reference's last hidden state,
`Box(-inf, inf, (128,), float32)`.

## Action Space

`Discrete(1024)`: the next token, a piece of a word (byte-level BPE).

## Rewards

The score of a text is the sum of the scores that the bundled token-classification reward model
gives to the tokens of the response. It was trained towards the reading ease, shifted and scaled to
mean 0 and standard deviation 1 on texts of the reference. The default design is "token": each token
is paid its own score at once. The KL term has `kl_coef=0.2`.

`infos["gold"]` is the Flesch reading ease of the response alone, 0 to 100, and 0 below twelve
words; the prompt is given, so it is not measured. The optimum is not known. On 1,024 texts of the
reference (Python 3.11.7) the gold metric is 54.2 on the prompts of "train" and 56.1 on those of
"test" (standard error 0.6), the mean score -0.07 and -0.08 (0.03), and the mean length 48 tokens.

## Starting State

A prompt drawn uniformly from those of `split`: the first 16 to 24 tokens of a passage, up to the
end of a word. "train" has 610 prompts and "test" 289 in Python 3.11.7, and no topic is in both.
Other versions have other prompts: `tokenenv envs` prints their digest.

## Episode End

A text ends with `<|end|>`, or is cut after T tokens. The reference ends 96 of 100 texts by itself.

## Arguments

```python
envs = gym.make_vec("tokenenv/PyDocs-v0", num_envs=64, split="test", max_new_tokens=80)
```

## Version History

* v0: initial version.
"""

import platform
from collections.abc import Iterator
from typing import Any

import torch

from tokenenv.env.identity import prompts_digest
from tokenenv.envs.language.bundled import bundled_lm, bundled_scorer, bundled_tokenizer
from tokenenv.envs.language.readability import reading_ease
from tokenenv.envs.language.topics import MIN_WORDS, SENTENCE_BREAK, prose
from tokenenv.errors import ModelError
from tokenenv.types import Task

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 16, 24


def task(
    *,
    split: str = "train",
    max_new_tokens: int = 80,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Make the task.

    Args:
        split: the prompts, "train" or "test"; no topic of the Python reference is in both.
        max_new_tokens: T, the most tokens of a response, 1 or more; the models have 256 positions,
            of which a prompt takes up to 24.
        device: where the models are put.
        dtype: the data type of the models.

    Raises:
        InvalidArgument: the split is not known.
        ModelError: the standard library lacks `pydoc_data`.
    """
    tokenizer = bundled_tokenizer("pydocs-lm")
    return Task(
        tokenizer=tokenizer,
        prompts=make_prompts(split, tokenizer),
        reference=bundled_lm("pydocs-lm", device, dtype),
        scorer=bundled_scorer("pydocs-reward", device, dtype),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(tokenizer.eos_token_id,),
        gold=gold,
        kl_coef=0.2,
    )


def note() -> str:
    """Say which prompts this Python gives, for `tokenenv envs`.

    The digest is the one that `identity` holds in checkpoints and configs.
    """
    try:
        prompts = make_prompts("train", bundled_tokenizer("pydocs-lm"))
    except ModelError as error:
        return str(error)
    return f"Python {platform.python_version()} has {prompts_digest(prompts)}"


def gold(prompt: str, response: str) -> float:
    """Return the Flesch reading ease of the response, 0 to 100; the prompt is not measured."""
    return reading_ease(response)


def make_prompts(split: str, tokenizer: Any) -> list[list[int]]:
    """Return the prompts of a split as token ids: the beginning of every passage.

    A passage begins at each sentence of a paragraph that is followed by enough words to continue.
    """
    texts = dict.fromkeys(text for paragraph in prose(split) for text in _tails(paragraph))
    prompts = [ids[: cut(ids, tokenizer)] for ids in tokenizer(list(texts))["input_ids"]]
    # Some versions of Python say the same sentence in topics of both splits: it is for training.
    known = set(map(tuple, make_prompts("train", tokenizer))) if split == "test" else set()
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts)) if prompt not in known]


def _tails(paragraph: str) -> Iterator[str]:
    sentences = SENTENCE_BREAK.split(paragraph)
    tails = (" ".join(sentences[start:]) for start in range(len(sentences)))
    return (tail for tail in tails if len(tail.split()) >= MIN_WORDS)


def cut(ids: list[int], tokenizer: Any) -> int:
    """Return how many tokens a prompt has: it ends before the first new word from 16 tokens on, or
    after 24 tokens.

    The place can be read off the text, so that a reward model that sees prompt and response in one
    row can tell them apart.
    """
    tokens = tokenizer.convert_ids_to_tokens(ids[:MAX_PROMPT_TOKENS])
    places = (i for i in range(MIN_PROMPT_TOKENS, len(tokens)) if tokens[i].startswith("Ġ"))
    return next(places, len(tokens))
