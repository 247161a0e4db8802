"""my/Reverse-v0: write the letters of the prompt backwards.

The prompt is a word of three different letters and an equals sign, such as "cab=". A text has as
many tokens as the word has letters, and scores the share of letters that stand in the right place.
The policy begins as a small language model that has learned nothing.
"""

import itertools
import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenenv import Task

LETTERS = "abcdef"
SIZE = 3


def task(*, split: str = "train", device: str = "cpu") -> Task:
    """The task on the words of one split, "train" or "test"; no word is in both."""
    tokenizer = make_tokenizer()
    return Task(
        tokenizer=tokenizer,
        reference=make_model(len(tokenizer)).to(device),
        prompts=tokenizer([f"{word}=" for word in words(split)])["input_ids"],
        max_prompt_tokens=SIZE + 1,
        max_new_tokens=SIZE,
        stop_token_ids=(),
        scorer=Backwards(),
        gold="score",
        kl_coef=0.01,
    )


def words(split: str) -> list[str]:
    """Every fourth word, in an order drawn once, is in the test split."""
    every = ["".join(letters) for letters in itertools.permutations(LETTERS, SIZE)]
    random.Random(0).shuffle(every)
    return [word for i, word in enumerate(every) if (i % 4 == 0) == (split == "test")]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each letter and one for the equals sign."""
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate([*LETTERS, "="])}, "="))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A language model with random weights, the same ones every time."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2 * SIZE + 1,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


class Backwards:
    """A `tokenenv.types.TextScorer`: it scores finished texts, token by token."""

    per_token = True
    looks_ahead = False

    def token_scores(self, texts: Sequence[tuple[list[int], list[int]]], width: int) -> Tensor:
        """(B, width): 1 / SIZE for each letter that stands in the right place, else 0."""
        scores = torch.zeros(len(texts), width)
        for row, (prompt, response) in enumerate(texts):
            # Prompts given to `reset` may be shorter than the task's own, so this asks for no more
            # letters than there are.
            for place, (token, right) in enumerate(zip(response, prompt[-2::-1], strict=False)):
                scores[row, place] = float(token == right) / SIZE
        return scores
