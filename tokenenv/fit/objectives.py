"""The objectives by name: what data each takes, how rewards are read from the model, and its loss.

The way rewards are read (`Readout`) is apart from the loss: DPO is the Bradley-Terry loss on
log-ratios, and the implicit process reward model is the cross-entropy of outcomes on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokenenv.fit import losses
from tokenenv.fit.examples import Batch, Kind

Readout = Literal["token", "value", "log-ratio"]
"""How rewards are read. "token": a head gives each token's reward. "value": a head gives the value
of the text after each token, and a reward is the difference of two values. "log-ratio": coef times
the log-ratio of a language model to the reference."""
Loss = Callable[[Batch], Tensor]
"""One number for each example, (E,) float32; see `tokenenv.fit.losses`."""


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
    standardizes: bool = False
    """Whether the model is trained on scores with mean 0 and standard deviation 1, those of the
    training texts. Saved rewards are multiplied by that deviation. The mean is left out: it is the
    same for all texts."""
    outcomes: bool = False
    """Whether scores must lie between 0 and 1."""
    subtracts_value: bool = False
    """Whether V* of the prompt is taken from each score: `losses.log_mean_exp` of the scores that
    the texts of the prompt have, with the temperature coef."""


OBJECTIVES: dict[str, Objective] = {
    "bt-sum": Objective(
        "ranking",
        "token",
        losses.bradley_terry,
        "token",
        "Bradley-Terry on the sum of token rewards",
    ),
    "bt-mean": Objective(
        "ranking",
        "token",
        losses.bradley_terry_mean,
        "token",
        "Bradley-Terry on their mean (Q-RM, 2505.23363), divided by a fixed length for RL",
        divides=True,
    ),
    "list-mle": Objective(
        "ranking", "token", losses.list_mle, "token", "ListMLE on sums, of rankings (2306.00398)"
    ),
    "score-end": Objective(
        "scores",
        "token",
        losses.score_at_end,
        "token",
        "squared error of the sum of token rewards to the score",
        standardizes=True,
    ),
    "score-every": Objective(
        "scores",
        "token",
        losses.score_everywhere,
        "token",
        "squared error of every running sum to the score (2110.14168)",
        standardizes=True,
    ),
    "score-value": Objective(
        "scores",
        "value",
        losses.score_values,
        "delta",
        "a value after every token, fitted to the score: RUDDER's return predictor (1806.07857)",
        standardizes=True,
    ),
    "labels": Objective(
        "labels", "token", losses.token_labels, "token", "cross-entropy of token labels, spans too"
    ),
    "values": Objective(
        "values",
        "token",
        losses.values,
        "token",
        "squared error of running sums and shares to values",
    ),
    "value-labels": Objective(
        "values",
        "value",
        losses.value_labels,
        "delta",
        "squared error to values: Monte-Carlo (Math-Shepherd, 2312.08935) or V*",
    ),
    "outcome": Objective(
        "scores",
        "log-ratio",
        losses.outcome,
        "implicit",
        "implicit PRM: cross-entropy of outcomes 0 to 1 on log-ratios (2412.01981)",
        outcomes=True,
    ),
    "dpo": Objective(
        "ranking",
        "log-ratio",
        losses.bradley_terry,
        "implicit",
        "DPO: Bradley-Terry on log-ratios (2305.18290)",
    ),
    "a-star": Objective(
        "scores",
        "log-ratio",
        losses.score_at_end,
        "implicit",
        "A*-PO: squared error of log-ratios to score - V*, by log-mean-exp (2505.20686)",
        subtracts_value=True,
    ),
    **{
        f"share-{name}": Objective(
            "texts", "token", losses.shares, "token", summary, labels_from=f"share-{name}"
        )
        for name, summary in {
            "delta": "squared error to a teacher's prefix differences (R3HF, 2411.08302)",
            "attention": "squared error to a teacher's score, shared out by attention (2402.00782)",
            "occlusion": "squared error to what a teacher's score loses without a token",
            "gradient": "squared error to a teacher's integrated gradients (1703.01365)",
        }.items()
    },
    "edits": Objective(
        "ranking",
        "token",
        losses.token_labels,
        "token",
        "cross-entropy of what differs between the texts of a pair (TLCR, 2407.16574)",
        labels_from="edits",
    ),
    "corrupted": Objective(
        "texts",
        "token",
        losses.replaced_tokens,
        "token",
        "replaced-token detection, no labels at all (ELECTRA, 2003.10555)",
        labels_from="corrupted",
    ),
}
