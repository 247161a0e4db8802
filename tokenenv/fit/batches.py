"""The order in which examples are learnt from, and the batches that a loss sees."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenenv.fit.examples import Batch, Example, Text
from tokenenv.fit.readers import Reader

JITTER = 4.0
"""Tokens by which lengths are moved at random before examples are put in order of length."""


def batches(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Group examples of similar length into batches, in random order.

    Args:
        lengths: (E,) tokens of each example.
        size: examples of a batch; the last one of the order by length may be smaller.
        rng: decides which examples of similar length come together, and the order of the batches.

    Returns:
        Index arrays, which together hold 0..E-1.
    """
    order = np.argsort(np.asarray(lengths) + rng.uniform(-JITTER, JITTER, len(lengths)))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [groups[number] for number in rng.permutation(len(groups))]


def forwards(examples: Sequence[Example], max_batch_tokens: int) -> Iterator[list[Example]]:
    """Yield the examples of a batch in groups, longest texts first, of which each has at most
    `max_batch_tokens` tokens when its texts are padded to the longest. An example that has more is
    a group of its own, which the reader reads in several forwards."""
    group: list[Example] = []
    for example in sorted(examples, key=longest, reverse=True):
        texts = sum(len(one.texts) for one in [*group, example])
        if group and texts * longest(group[0]) > max_batch_tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def longest(example: Example) -> int:
    """Return the tokens of an example's longest text."""
    return max(map(len, example.texts))


def read_batch(reader: Reader, examples: Sequence[Example]) -> Batch:
    """Read the rewards of the examples' texts, differentiably, beside what the data says of
    them."""
    texts = [text for example in examples for text in example.texts]
    reward_BR, running_BR, start_B, mask_BR = reader.read(texts)
    device = reward_BR.device
    counts = torch.tensor([len(example.texts) for example in examples])
    return Batch(
        reward_BR=reward_BR,
        running_BR=running_BR,
        start_B=start_B,
        mask_BR=mask_BR,
        example_B=torch.arange(len(examples)).repeat_interleave(counts).to(device),
        score_B=_scores(examples, device),
        target_BR=_targets(texts, reward_BR.shape[1], device),
    )


def _scores(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    scores = [example.scores for example in examples]
    if any(one is None for one in scores):
        return None
    flat = [score for one in scores for score in one or ()]
    return torch.tensor(flat, dtype=torch.float32, device=device)


def _targets(texts: Sequence[Text], width: int, device: torch.device) -> Tensor | None:
    """Return the targets, (B, width), right-padded with NaN; None where no text has any."""
    if all(text.target is None for text in texts):
        return None
    target_BR = np.full((len(texts), width), np.nan, dtype=np.float32)
    for row, text in zip(target_BR, texts, strict=True):
        if text.target is not None:
            row[: len(text.target)] = text.target
    return torch.from_numpy(target_BR).to(device)
