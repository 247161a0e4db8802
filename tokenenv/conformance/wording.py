"""One plain sentence for what a comparison found: which assumption breaks a function, and what then
happens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch, of_world
from tokenenv.conformance.gradients import Comparison
from tokenenv.conformance.worlds import World


def off_in(found: Sequence[Comparison]) -> set[str]:
    """Return the names of the worlds in which a function is off, for whatever reason."""
    return {one.world for one in found if not one.exact}


def outcome(world: World, one: Comparison, off: set[str]) -> str:
    """Return "exact", "off", "off by choice", or "off as well" where the world adds to one of
    those (`off`) in which the function is off."""
    if one.exact:
        return "exact"
    if off & {*world.beyond}:
        return "off as well"
    return "off by choice" if world.choice else "off"


def advantage_verdict(
    function: Callable[[Batch], Tensor],
    worlds: Sequence[World],
    found: Sequence[Comparison],
    reasons: Mapping[str, str],
) -> str:
    """Return what is to be said of a function that makes advantages; `reasons` are known ones by
    world."""
    if found[0].exact:
        return _by_assumption(worlds, found, reasons)
    return f"{_already(found[0])}: {_reason(function, worlds[0], found[0])}."


def returns_verdict(worlds: Sequence[World], found: Sequence[Comparison]) -> str:
    """Return what is to be said of a critic's targets."""
    if found[0].exact:
        reasons = {one.world: f"targets are off by {one.error:.0%}" for one in found}
        return _by_assumption(worlds, found, reasons, "Its targets are exact on average.")
    return f"Its targets are off by {found[0].error:.0%} already in the plain world."


def loss_verdict(worlds: Sequence[World], found: Sequence[Comparison]) -> str:
    """Return what is to be said of a loss."""
    if found[0].exact:
        return _by_assumption(worlds, found, {})
    reason = "its sign is reversed" if found[0].cosine < -0.99 else "no single assumption says why"
    return f"{_already(found[0])}: {reason}."


def _by_assumption(
    worlds: Sequence[World],
    found: Sequence[Comparison],
    reasons: Mapping[str, str],
    exact: str = "Its expected gradient is exact.",
) -> str:
    pairs = list(zip(worlds, found, strict=True))
    outcomes = [outcome(world, one, off_in(found)) for world, one in pairs]
    errors = [
        _error(world, one, reasons.get(world.name, ""))
        for (world, one), said in zip(pairs, outcomes, strict=True)
        if said == "off"
    ]
    choices = [
        f"It is off by choice where {world.differs}: {world.choice}."
        for (world, _), said in zip(pairs, outcomes, strict=True)
        if said == "off by choice"
    ]
    return " ".join([*(errors or [exact]), *choices])


def _error(world: World, one: Comparison, reason: str) -> str:
    if reason:
        return f"Where {world.differs}, {reason} (cosine {one.cosine:.4f})."
    return f"It assumes that {world.assumes}: where {world.differs}, {_symptom(one)}."


def _already(plain: Comparison) -> str:
    return f"Its gradient is off already in the plain world (cosine {plain.cosine:.4f})"


def _symptom(one: Comparison) -> str:
    """What happens in a world, from the figures."""
    received = [round(share, 2) for share in one.positions]
    if one.others > 1e-3:
        return f"{one.others:.0%} of its gradient is of tokens that others wrote"
    if one.cosine == 0.0:
        return "nothing is learned"
    missing = [str(t) for t, share in enumerate(received, 1) if share == 0.0]
    if missing:
        which = f"token {missing[0]} receives" if missing[1:] == [] else None
        which = which or f"tokens {' and '.join(missing)} receive"
        return f"own {which} nothing, of {len(received)} (cosine {one.cosine:.4f})"
    shares = ", ".join(f"{share:.2f}" for share in received)
    return f"the cosine is {one.cosine:.4f}, and own tokens receive {shares} of their gradients"


def _reason(function: Callable[[Batch], Tensor], world: World, plain: Comparison) -> str:
    """Why a function is off in the plain world, found by asking it again."""
    if plain.cosine < -0.99:
        return "its sign is reversed"
    if plain.cosine == 0.0:
        return "nothing is learned"
    if world.group_size > 1 and ignores_spread(function, world):
        return (
            "it divides the returns of each group by their own spread, so groups with little at "
            "stake count as much as those with much"
        )
    shares = ", ".join(f"{share:.2f}" for share in plain.positions)
    return f"own tokens receive {shares} of their gradients, and no single assumption says why"


def ignores_spread(function: Callable[[Batch], Tensor], world: World) -> bool:
    """Return whether every other group's returns can be made ten times as large without its
    advantages getting larger than half as much again."""
    batch = of_world(world)[1]
    larger = (batch.groups % 2 == 0)[:, None]
    scaled = replace(batch, rewards=torch.where(larger, 10.0 * batch.rewards, batch.rewards))
    mask = batch.mask & larger
    before, after = function(batch)[mask].double(), function(scaled)[mask].double()
    return bool(after.norm() < 1.5 * before.norm())
