"""Whether a function from any trainer follows the exact gradient, world by world.

Each world differs from the plain one in one thing, so the worlds in which a function is off say
what it takes for granted.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch, of_world, with_logprobs
from tokenenv.conformance.gradients import (
    Comparison,
    compare,
    compare_values,
    exact_gradient,
    followed,
    gradient,
)
from tokenenv.conformance.kl import how_the_kl_counts
from tokenenv.conformance.report import Report
from tokenenv.conformance.wording import (
    advantage_verdict,
    loss_verdict,
    off_in,
    outcome,
    returns_verdict,
)
from tokenenv.conformance.worlds import Texts, World
from tokenenv.errors import InvalidArgument

Estimator = Callable[[Batch], Tensor]
"""A function of a batch to (B, L): advantages or returns; what it gives others' tokens is not
read."""
Loss = Callable[[Batch], Tensor]
"""A function of a batch to a loss (), through which gradients flow to `batch.logprobs`."""

PLAIN = World(name="plain")
WORLDS = (
    PLAIN,
    World(
        name="unequal lengths",
        differs="some texts end earlier than others",
        assumes="texts are equally long",
        ends=True,
    ),
    World(
        name="rewards on every token",
        differs="every token earns something",
        assumes="only the last token earns something",
        dense=True,
    ),
    World(
        name="masked gap",
        differs="others write in the middle of a text",
        assumes="the policy wrote every token up to the last reward",
        gap=2,
    ),
    World(
        name="turns that some texts lack",
        differs="the policy decides whether there is a second turn",
        assumes="all texts have the same turns",
        ends=True,
        dense=True,
        gap=2,
        beyond=("unequal lengths", "rewards on every token", "masked gap"),
    ),
    World(
        name="KL in the reward",
        differs="a KL penalty is part of what is optimised",
        assumes="nothing is paid for the KL",
        beta=0.5,
    ),
    World(
        name="wrong critic",
        differs="the critic is wrong",
        assumes="the critic is right",
        critic_error=1.0,
    ),
    World(name="lambda 0.9", differs="lambda is 0.9", assumes="lambda is 1", lambda_=0.9),
    World(
        name="masked gap, lambda 0.9",
        differs="others write in the middle of a text and lambda is 0.9",
        assumes="lambda is 1 where others write",
        gap=2,
        lambda_=0.9,
        beyond=("masked gap",),
    ),
    World(
        name="cut texts",
        differs="texts are cut before their end and not scored",
        assumes="nothing is to come after a text's last token",
        cut=True,
        choice="a trainer that scores texts as they were cut takes them for ended",
    ),
    World(
        name="wrong critic, lambda 0.9",
        differs="the critic is wrong and lambda is 0.9",
        critic_error=1.0,
        lambda_=0.9,
        choice="a lambda below 1 trades variance for trust in the critic",
        beyond=("wrong critic",),
    ),
)
"""For functions that look at each text by itself, or at a whole batch."""


def _grouped(world: World) -> World:
    return replace(world, steps=2, group_size=3, gap=min(world.gap, 1))


TWO_PROMPTS = World(
    name="two prompts",
    differs="two prompts have scores of different means and spreads",
    assumes="all prompts have scores of the same spread",
    prompts=2,
)
GROUP_WORLDS = tuple(map(_grouped, (*WORLDS[:6], TWO_PROMPTS)))
"""For functions that compare the texts of a group: all triples of texts, by their chances. A group
needs no critic and no lambda."""
LOSS_WORLDS = (
    *(world for world in WORLDS[:5] if world.name != "rewards on every token"),
    World(
        name="a policy that has moved a little",
        differs="the policy has moved a little since the texts were drawn",
        assumes="the texts were drawn by the policy as it is now",
        drift=0.02,
        choice="a loss without a ratio is made for one step on texts of the present policy",
    ),
    World(
        name="a policy that has moved far",
        differs="the policy has moved far since the texts were drawn",
        assumes="no ratio lies outside the clip",
        drift=0.6,
        choice="a clip leaves out tokens whose ratio has gone far enough",
        beyond=("a policy that has moved a little",),
    ),
)
"""For losses, which are given the exact advantages."""


def check_advantages(
    function: Estimator,
    name: str = "function",
    *,
    grouped: bool = False,
    worlds: Sequence[World] | None = None,
) -> Report:
    """Compare the gradient that advantages (or returns) lead to with the exact one.

    Args:
        function: from a `Batch` to (B, L). In a trainer with its KL in the reward it should begin
            with `batch.penalised`.
        name: what the report calls it.
        grouped: whether it needs groups of several texts of one prompt (`batch.groups`).
        worlds: other worlds than `WORLDS` or `GROUP_WORLDS`; the first is the plain one.

    Raises:
        InvalidArgument: the function returns another shape.
    """
    worlds = worlds or (GROUP_WORLDS if grouped else WORLDS)
    found, reasons = [], {}
    for world in worlds:
        texts, batch = of_world(world)
        followed_SV = followed(texts, batch, _of_shape(function(batch), batch, name))
        one = compare(world.name, texts, followed_SV, exact_gradient(texts))
        found.append(one)
        if world.beta and not one.exact:
            reasons[world.name] = how_the_kl_counts(texts, followed_SV)
    verdict = advantage_verdict(function, worlds, found, reasons)
    return Report(name, "advantages", _by_world(worlds, found), verdict)


def check_returns(
    function: Estimator, name: str = "function", worlds: Sequence[World] = WORLDS
) -> Report:
    """Compare the mean of a critic's targets in each state with what is earned from there on.

    Args:
        function: from a `Batch` to (B, L): the target for the value of the state before each token;
            what it gives others' tokens is not read.
        name: what the report calls it.
        worlds: other worlds than `WORLDS`; the first is the plain one.

    Raises:
        InvalidArgument: the function returns another shape.
    """
    found = []
    for world in worlds:
        texts, batch = of_world(world)
        targets = _of_shape(function(batch), batch, name)
        found.append(compare_values(world.name, texts, batch, targets))
    return Report(name, "returns", _by_world(worlds, found), returns_verdict(worlds, found))


def check_loss(
    function: Loss, name: str = "function", worlds: Sequence[World] = LOSS_WORLDS
) -> Report:
    """Compare the gradient of a policy loss, given exact advantages, with the exact one.

    Where the policy has moved since the texts were drawn, the exact one is that of the unclipped
    surrogate, E[sum_t pi / pi_old A_t].

    Args:
        function: from a `Batch` to a loss () that is to be minimised, through `batch.logprobs`.
        name: what the report calls it.
        worlds: other worlds; the first is the plain one.
    """
    found = []
    for world in worlds:
        texts, batch = of_world(world)

        def uphill(logits_SV: Tensor, texts: Texts = texts, batch: Batch = batch) -> Tensor:
            return -function(with_logprobs(batch, texts.logprob(logits_SV)[batch.rows]))

        wanted = surrogate_gradient(texts, batch) if world.drift else exact_gradient(texts)
        found.append(compare(world.name, texts, gradient(texts, uphill), wanted))
    return Report(name, "loss", _by_world(worlds, found), loss_verdict(worlds, found))


def surrogate_gradient(texts: Texts, batch: Batch) -> Tensor:
    """Return (S, V): the gradient of the mean of `sum_t pi / pi_old A_t` (Schulman et al. 2017,
    equation 6)."""

    def surrogate(logits_SV: Tensor) -> Tensor:
        log_ratio = texts.logprob(logits_SV)[batch.rows] - batch.old_logprobs
        return (log_ratio.exp() * batch.advantages * batch.mask).sum() / len(batch.rows)

    return gradient(texts, surrogate)


def _of_shape(advantages: Tensor, batch: Batch, name: str) -> Tensor:
    if not isinstance(advantages, Tensor) or advantages.shape != batch.mask.shape:
        shape = tuple(getattr(advantages, "shape", ())) or type(advantages).__name__
        raise InvalidArgument(
            f"{name} returned {shape}; it must return a tensor (B, L) = "
            f"{tuple(batch.mask.shape)}, one number a token."
        )
    if not bool(torch.isfinite(advantages[batch.mask]).all()):
        raise InvalidArgument(f"{name} returned numbers that are not finite for own tokens.")
    return advantages


def _by_world(worlds: Sequence[World], found: Sequence[Comparison]) -> list[tuple[Comparison, str]]:
    """Each comparison with its outcome: "exact", "off", "off by choice", or "off as well" where the
    world adds to one in which the function is off."""
    return [
        (one, outcome(world, one, off_in(found))) for world, one in zip(worlds, found, strict=True)
    ]
