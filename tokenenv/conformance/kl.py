"""What an estimator of the KL penalty estimates: its value, its gradient as a reward, and its
gradient as a loss. One formula may be right for one use and wrong for another.

Suffixes: Y texts, B rows of a batch, L tokens, S states, V tokens of the vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tokenenv.conformance.batches import Batch, of_world, to_go, with_logprobs
from tokenenv.conformance.gradients import (
    EXACT,
    Comparison,
    compare,
    exact_gradient,
    followed,
    gradient,
)
from tokenenv.conformance.report import shown
from tokenenv.conformance.worlds import Texts, World

WORLD = World(name="a KL penalty", ends=True, gap=2)
"""Texts of several lengths, with others' tokens in some."""
WHOLE = "KL(pi || ref) of whole texts"
STATES = {
    "KL(pi || ref) of each state": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "KL(ref || pi) of each state": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "half the chi-square(pi || ref) of each state": lambda p, q: (2 * p - q).exp().sum(-1) / 2,
}
"""What a loss may follow instead, by name, as functions of the log-probs of all tokens: distances
in the states that were visited, whose own chances are held."""

CHARGED = {
    WHOLE: "every token is charged for the KL from there on",
    "KL(pi || ref) of each state": "a token is not charged for the KL of the tokens after it",
}
"""What a penalty in the reward amounts to that has the gradient of one of these distances."""


@dataclass(frozen=True)
class KLReport:
    """The outcome of `check_kl`."""

    name: str
    value: float
    """The mean of the estimate over the KL: 1 is right."""
    in_reward: Comparison
    """Minus the sum of a token's and all later estimates as its advantage, beside the gradient of
    -KL."""
    as_loss: Mapping[str, Comparison]
    """The gradient of the estimate itself beside those of several distances, by their names."""
    upside_down: bool
    """Whether its value is the KL once the two log-probs are exchanged, and not before."""

    @property
    def follows(self) -> str:
        """The distance whose gradient a loss of it follows, in words."""
        if all(one.cosine == 0 for one in self.as_loss.values()):
            return "nothing: its gradient is 0 on average"
        exact = [name for name, one in self.as_loss.items() if one.exact]
        return exact[0] if exact else "none of the distances that are known here"

    @property
    def exact(self) -> bool:
        """Whether it is right for one use at least: as a value, in the reward, or in a loss that is
        to lower KL(pi || ref)."""
        right = self.follows in (WHOLE, "KL(pi || ref) of each state")
        return abs(self.value - 1) < EXACT or self.in_reward.exact or right

    @property
    def verdict(self) -> str:
        """Three sentences, one for each use, after a fourth where the ratio is upside down."""
        swapped = (
            "Its ratio is upside down: with the two log-probs exchanged its mean is the KL. "
            if self.upside_down
            else ""
        )
        reward = "is exact" if self.in_reward.exact else f"has cosine {self.in_reward.cosine:.3f}"
        return (
            f"{swapped}Its mean is {self.value:.3f} of KL(pi || ref). In the reward its gradient "
            f"{reward}. As a loss it follows {self.follows}."
        )

    def table(self) -> Table:
        """Return one row a use."""
        table = Table(title=f"{self.name}: {self.verdict}", title_justify="left")
        for heading in ("use", "figure", ""):
            table.add_column(heading)
        right = "exact" if abs(self.value - 1) < EXACT else "off"
        table.add_row("value, of KL(pi || ref)", f"{self.value:.4f}", right)
        reward = self.in_reward
        table.add_row("in the reward", f"cosine {reward.cosine:.4f}", _said(reward))
        for name, one in self.as_loss.items():
            table.add_row(f"as a loss: {name}", f"cosine {one.cosine:.4f}", _said(one))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        losses = {name: one.to_dict() for name, one in self.as_loss.items()}
        head = {"name": self.name, "kind": "kl", "exact": self.exact, "verdict": self.verdict}
        uses = {"value": self.value, "in_reward": self.in_reward.to_dict(), "as_loss": losses}
        return head | uses | {"follows": self.follows, "upside_down": self.upside_down}

    def __str__(self) -> str:
        return shown(self.table())


def check_kl(function: Callable[[Batch], Tensor], name: str = "function") -> KLReport:
    """Compare an estimator of the KL, token by token, with the KL.

    Args:
        function: from a `Batch` to (B, L): the estimate at each token, from `batch.logprobs` and
            `batch.ref_logprobs`; what it gives others' tokens is not read.
        name: what the report calls it.
    """
    texts, batch = of_world(WORLD)
    kl = float(_mean(texts, batch, batch.logprobs - batch.ref_logprobs))
    value = float(_mean(texts, batch, function(batch))) / kl
    exchanged = replace(batch, logprobs=batch.ref_logprobs, ref_logprobs=batch.logprobs)
    swapped = float(_mean(texts, batch, function(exchanged))) / kl
    charged = -to_go(torch.where(batch.mask, function(batch).detach(), 0.0))
    uphill = -whole_gradient(texts)
    in_reward = compare("in the reward", texts, followed(texts, batch, charged), uphill)

    def loss(logits_SV: Tensor) -> Tensor:
        moving = with_logprobs(batch, texts.logprob(logits_SV)[batch.rows])
        return _mean(texts, batch, function(moving))

    found, wanted = gradient(texts, loss), loss_gradients(texts)
    as_loss = {name: compare(name, texts, found, one) for name, one in wanted.items()}
    turned = abs(swapped - 1) < EXACT < abs(value - 1)
    return KLReport(name, value, in_reward, as_loss, turned)


def how_the_kl_counts(texts: Texts, found: Tensor) -> str:
    """Return in words how a gradient (S, V) that is off only with a KL penalty treats it; "" where
    that is not one of two known ways."""
    beta, distances = texts.world.beta, loss_gradients(texts)
    rewards_SV = exact_gradient(texts) + beta * distances[WHOLE]
    for name, said in CHARGED.items():
        parts = torch.stack([rewards_SV.flatten(), -beta * distances[name].flatten()], 1)
        weights = torch.linalg.lstsq(parts, found.flatten()).solution
        rest = (parts @ weights - found.flatten()).norm() / found.norm()
        if rest < EXACT and weights[0] > 0:
            share = float(weights[1] / weights[0])
            times = f", and the penalty weighs {share:.2f} times what it should"
            return said + (times if abs(share - 1) > EXACT else "")
    return ""


def whole_gradient(texts: Texts) -> Tensor:
    """Return (S, V): the gradient of KL(pi || ref) of whole texts."""
    reference_YL = texts.logprob(texts.reference_SV)

    def kl(logits_SV: Tensor) -> Tensor:
        log_ratio_YL = (texts.logprob(logits_SV) - reference_YL) * texts.own_YL
        return (texts.prob(logits_SV) * log_ratio_YL.sum(1)).sum()

    return gradient(texts, kl)


def loss_gradients(texts: Texts) -> dict[str, Tensor]:
    """Return the gradients (S, V) that a loss may follow, by name."""
    visited_YL = texts.prob(texts.drawn_SV)[:, None] * texts.own_YL
    state_YL, ref_SV = texts.state_YL1[:, :-1], texts.reference_SV.log_softmax(-1)

    def of(distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return gradient(
            texts,
            lambda logits_SV: (
                visited_YL * distance(logits_SV.log_softmax(-1), ref_SV)[state_YL]
            ).sum(),
        )

    return {WHOLE: whole_gradient(texts)} | {name: of(one) for name, one in STATES.items()}


def _mean(texts: Texts, batch: Batch, terms: Tensor) -> Tensor:
    """The mean over the batch of what its own tokens sum to."""
    return torch.where(batch.mask, terms.double(), 0.0).sum() / len(batch.rows)


def _said(one: Comparison) -> str:
    return "exact" if one.exact else "off"
