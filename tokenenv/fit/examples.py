"""What a reward model is trained from: texts as token ids, in examples of one or more."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["ranking", "scores", "labels", "values", "texts"]
"""What the data says of its texts. "ranking": which of two or more is better, best first. "scores":
one number for each text. "labels": a class, 0 to 1, for each token. "values": a number for the text
up to and including each token, in the unit of the score. "texts": nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A prompt and a response."""

    prompt: np.ndarray
    """(P,) int64, at least one token."""
    response: np.ndarray
    """(R,) int64, at least one token, with the stop token where the text ended by itself."""
    target: np.ndarray | None = None
    """(R,) float32: the label or the value of each response token; NaN where nothing is known."""
    own: np.ndarray | None = None
    """(R,) bool: the response tokens that a policy wrote. The score of a text is the sum of their
    rewards alone. None: all of them."""

    @property
    def ids(self) -> np.ndarray:
        """(P + R,) int64: the whole text."""
        return np.concatenate([self.prompt, self.response])

    @property
    def own_mask(self) -> np.ndarray:
        """(R,) bool: `own`, where None is written out."""
        return np.ones(len(self.response), dtype=bool) if self.own is None else self.own

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Texts that a loss compares with each other: a pair or a ranking, or one text alone."""

    texts: tuple[Text, ...]
    """The best first, where they are ranked."""
    scores: tuple[float, ...] | None = None
    """One number for each text, where the data has them."""
    where: str = ""
    """The place in the data, such as "pairs.jsonl:12", for messages."""

    def __len__(self) -> int:
        """The tokens of all texts, by which batches are filled."""
        return sum(map(len, self.texts))


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss sees of B texts of E examples. The columns are the R response tokens of each
    text, whoever wrote them, right-padded."""

    reward_BR: Tensor
    """float32: the reward of each token; 0 where `mask_BR` is False."""
    running_BR: Tensor
    """float32: the value of the text after each token. It is the sum of rewards so far, and where
    the model gives values the value itself."""
    start_B: Tensor
    """float32: the value of the prompt: 0, and where the model gives values the value itself. So
    `running_BR - start_B` is the sum of rewards so far, always."""
    mask_BR: Tensor
    """bool: the policy's own tokens."""
    example_B: Tensor
    """int64: the number of each text's example, 0 to E - 1, ascending; within an example the best
    text comes first."""
    score_B: Tensor | None = None
    """float32: the score of each text."""
    target_BR: Tensor | None = None
    """float32: the label or value of each token; NaN where nothing is known."""

    def on_host(self) -> "Batch":
        """Return the same on the host."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: None if column is None else column.cpu() for name, column in columns.items()
        }
        return Batch(**moved)

    @property
    def total_B(self) -> Tensor:
        """float32: the sum of each text's rewards."""
        return self.reward_BR.sum(1)

    @property
    def length_B(self) -> Tensor:
        """float32: how many tokens of each text are the policy's own."""
        return self.mask_BR.sum(1).float()

    @property
    def num_examples(self) -> int:
        """E."""
        return int(self.example_B[-1]) + 1

    def per_example(self, value_B: Tensor) -> Tensor:
        """Return the mean of `value_B` over the texts of each example, (E,)."""
        zeros = value_B.new_zeros(self.num_examples)
        count = zeros.index_add(0, self.example_B, torch.ones_like(value_B))
        return zeros.index_add(0, self.example_B, value_B) / count


@dataclass(slots=True)
class Skipped:
    """Examples that were left out, counted by the reason, with the first places of each."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one example at the place `where`."""
        self.places.setdefault(reason, []).append(where)

    def lines(self, shown: int = 3) -> Sequence[str]:
        """Return one sentence for each reason, with the first places."""
        return [
            f"{len(places)} left out: {reason} ({', '.join(places[:shown])}"
            f"{', ...' if len(places) > shown else ''})"
            for reason, places in self.places.items()
        ]
