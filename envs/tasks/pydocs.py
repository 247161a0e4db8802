"""PyDocs-v0: continue prose of the running Python's own reference in plainer words; prompts differ
between its versions.

Prompts are the first 16 to 24 tokens of a passage, up to the end of a word. A text ends with the
end-of-text token. The gold metric is the Flesch reading ease of the continuation alone (the prompt
is given, the policy cannot change it), 0 to 100.
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
    """The task on the prompts of one split ('train' or 'test'; no topic is in both).

    Raises `ModelError` where the standard library lacks `pydoc_data`.
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
    """Which prompts this Python gives, for `tokenenv envs`: their digest is that of `identity` in
    checkpoints and configs."""
    try:
        prompts = make_prompts("train", bundled_tokenizer("pydocs-lm"))
    except ModelError as error:
        return str(error)
    return f"Python {platform.python_version()} has {prompts_digest(prompts)}"


def gold(prompt: str, response: str) -> float:
    """Flesch reading ease of the response, 0 to 100; the prompt is not measured."""
    return reading_ease(response)


def make_prompts(split: str, tokenizer: Any) -> list[list[int]]:
    """The beginning of every passage, from each sentence of a paragraph that has enough words left
    to continue."""
    texts = dict.fromkeys(text for paragraph in prose(split) for text in _tails(paragraph))
    prompts = [ids[: cut(ids, tokenizer)] for ids in tokenizer(list(texts))["input_ids"]]
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]


def _tails(paragraph: str) -> Iterator[str]:
    sentences = SENTENCE_BREAK.split(paragraph)
    tails = (" ".join(sentences[start:]) for start in range(len(sentences)))
    return (tail for tail in tails if len(tail.split()) >= MIN_WORDS)


def cut(ids: list[int], tokenizer: Any) -> int:
    """Where a prompt ends: at the first new word from 16 tokens on, or after 24.

    The place can be read off the text, so a reward model that sees prompt and response in one row
    can tell them apart.
    """
    tokens = tokenizer.convert_ids_to_tokens(ids[:MAX_PROMPT_TOKENS])
    places = (i for i in range(MIN_PROMPT_TOKENS, len(tokens)) if tokens[i].startswith("Ġ"))
    return next(places, len(tokens))
