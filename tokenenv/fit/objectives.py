"""The objectives by name: what data each takes, how rewards are read from the model, and its loss.

A loss is a pure function of a `Batch` that returns one number for each example, (E,) float32. The
way rewards are read (`Readout`) is apart from it: DPO is the Bradley-Terry loss on log-ratios, and
the implicit process reward model is the cross-entropy of outcomes on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tokenenv.fit.examples import Batch, Kind

Readout = Literal["token", "value", "log-ratio"]
"""How rewards are read. "token": a head gives each token's reward. "value": a head gives the value
of the text after each token, and a reward is the difference of two values. "log-ratio": coef times
the log-ratio of a language model to the reference."""
Loss = Callable[[Batch], Tensor]


def bradley_terry(batch: Batch) -> Tensor:
    """Return -log sigmoid(R_better - R_worse) of the sums R of token rewards, (E,): the mean over
    all pairs of an example's texts (Bradley and Terry 1952)."""
    return pairwise(batch, batch.total_B)


def bradley_terry_mean(batch: Batch) -> Tensor:
    """Return `bradley_terry` of the means of token rewards, (E,).

    A mean does not grow with the length, but RL adds rewards up, and would be paid for length where
    the mean is positive. So the rewards of the model that is saved are divided by a fixed length,
    the mean one of the training texts (`Objective.divides`).
    """
    return pairwise(batch, batch.total_B / batch.length_B)


def pairwise(batch: Batch, value_B: Tensor) -> Tensor:
    """Return -log sigmoid of the differences of `value_B`, the better less the worse: the mean over
    all pairs of each example, (E,)."""
    better = batch.example_B[:, None] == batch.example_B[None, :]
    better = better.triu(diagonal=1)
    i, j = better.nonzero(as_tuple=True)
    loss = -F.logsigmoid(value_B[i] - value_B[j])
    zeros = loss.new_zeros(batch.num_examples)
    count = zeros.index_add(0, batch.example_B[i], loss.new_ones(len(i)))
    return zeros.index_add(0, batch.example_B[i], loss) / count.clamp(min=1)


@dataclass(frozen=True, slots=True)
class Objective:
    """A way to train a reward model."""

    kind: Kind
    """The data that it takes."""
    readout: Readout
    loss: Loss
    design: str
    """The `reward=` with which an environment uses the model."""
    summary: str
    """One line for `tokenenv fit --help` and the model card, with the source."""
    divides: bool = False
    """Whether saved rewards are divided by the mean length of the training texts."""
    labels_from: str | None = None
    """What makes the labels or values of the data where it has none: a name of
    `tokenenv.fit.labels.MAKERS`."""


OBJECTIVES: dict[str, Objective] = {
    "bt-sum": Objective(
        "ranking", "token", bradley_terry, "token", "Bradley-Terry on the sum of token rewards"
    ),
    "bt-mean": Objective(
        "ranking",
        "token",
        bradley_terry_mean,
        "token",
        "Bradley-Terry on their mean (Q-RM), divided by a fixed length for RL",
        divides=True,
    ),
    "dpo": Objective(
        "ranking", "log-ratio", bradley_terry, "implicit", "DPO: Bradley-Terry on log-ratios"
    ),
}
