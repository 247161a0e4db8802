"""Exact gradients by the policy's logits, and how far another gradient is from one.

Suffixes: Y texts, B rows of a batch, L tokens, S states, V tokens of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch, earned, state_values
from tokenenv.conformance.worlds import Texts

EXACT = 1e-5
"""Two gradients are the same where they differ by less than this share, once they have one scale:
functions that compute in float32 stay below it."""


@dataclass(frozen=True)
class Comparison:
    """A gradient beside the exact one."""

    world: str
    cosine: float
    """Of the angle between the two; 0 where nothing was found."""
    scale: float
    """How many times the exact gradient the found one is, along it."""
    error: float
    """The share of the found gradient that is not along the exact one: the sine of the angle
    between the two, and 1 where nothing was found."""
    positions: tuple[float, ...]
    """For each own token, first to last: how much of its gradient it receives, beside the one that
    receives most."""
    others: float
    """The share of the found gradient that is of tokens that others wrote: 0 is right."""

    @property
    def exact(self) -> bool:
        """Whether the direction is right; a step size absorbs the scale."""
        return self.scale > 0 and self.error < EXACT

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"positions": list(self.positions), "exact": self.exact}


def gradient(texts: Texts, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (S, V): the gradient of `objective(logits_SV)`, a scalar, at the policy that learns
    from the texts."""
    logits_SV = texts.policy_SV.clone().requires_grad_()
    found = torch.autograd.grad(objective(logits_SV), logits_SV, allow_unused=True)[0]
    return torch.zeros_like(logits_SV) if found is None else found.detach()


def exact_gradient(texts: Texts) -> Tensor:
    """Return (S, V): the gradient of what is optimised, E[rewards - beta KL(pi || pi_ref)], what
    cut texts would still earn included. It is the derivative of a sum over all texts."""
    worth_Y = earned(texts).sum(1) + texts.rest_Y
    # E[d log pi] = 0, so the penalty's own derivative adds nothing.
    return gradient(texts, lambda logits_SV: (texts.prob(logits_SV) * worth_Y).sum())


def followed(texts: Texts, batch: Batch, advantages: Tensor) -> Tensor:
    """Return (S, V): the mean over a batch of `sum_t A_t d log pi_t`, which a trainer with these
    advantages (B, L) follows in its first step."""
    weights = torch.where(batch.mask, advantages.detach().double(), 0.0)

    def weighted(logits_SV: Tensor) -> Tensor:
        return (texts.logprob(logits_SV)[batch.rows] * weights).sum() / len(weights)

    return gradient(texts, weighted)


def compare(world: str, texts: Texts, found: Tensor, exact: Tensor) -> Comparison:
    """Compare two gradients (S, V)."""
    product, size = float((found * exact).sum()), float(exact.norm())
    scale = product / size**2
    nothing = float(found.norm()) < 1e-12 * max(size, 1.0)
    rest = 1.0 if nothing else float((found - scale * exact).norm() / found.norm())
    places = [texts.step_S == t for t in range(texts.world.steps)]
    received = [_along(found[place], exact[place]) for place in places]
    most = max(map(abs, received)) or 1.0
    others = float(found[texts.step_S < 0].norm() / found.norm()) if not nothing else 0.0
    return Comparison(
        world,
        0.0 if nothing else product / (size * float(found.norm())),
        0.0 if nothing else scale,
        rest,
        tuple(value / most for value in received),
        others,
    )


def compare_values(world: str, texts: Texts, batch: Batch, targets: Tensor) -> Comparison:
    """Compare the mean of a critic's targets (B, L) in each state with the exact value.

    States count by how often they are visited. Here the size matters, so the error is that of the
    means as they are, and so are the shares of each own token.
    """
    state = texts.state_YL1[batch.rows, :-1][batch.mask]
    visits_S = torch.bincount(state, minlength=len(texts.step_S)).double()
    total_S = torch.zeros_like(visits_S).index_add_(0, state, targets[batch.mask].detach().double())
    root_S = (visits_S / len(batch.rows)).sqrt()
    found = root_S * total_S / visits_S.clamp(min=1)
    exact = root_S * state_values(texts)
    places = [texts.step_S == t for t in range(texts.world.steps)]
    product, sizes = float(found @ exact), float(found.norm() * exact.norm())
    return Comparison(
        world,
        product / sizes if sizes else 0.0,
        product / float(exact @ exact),
        float((found - exact).norm() / exact.norm()),
        tuple(_along(found[place], exact[place]) for place in places),
        0.0,
    )


def _along(found: Tensor, exact: Tensor) -> float:
    """How many times the exact gradient the found one is, along it."""
    return float((found * exact).sum() / (exact * exact).sum())
