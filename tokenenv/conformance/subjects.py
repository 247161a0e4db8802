"""A published function with what it needs to be checked."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.checks import (
    GROUP_WORLDS,
    WORLDS,
    check_advantages,
    check_loss,
    check_returns,
)
from tokenenv.conformance.kl import KLReport, check_kl
from tokenenv.conformance.report import Report

KL_WORLDS = ("KL in the reward",)
DENSE_WORLDS = ("rewards on every token", "turns that some texts lack")


@dataclass(frozen=True)
class Subject:
    """One function as a trainer calls it."""

    name: str
    kind: str
    """ "advantages", "groups" (advantages that need groups), "returns" (a critic's targets), "loss"
    or "kl"."""
    function: Callable[[Batch], Tensor]
    without: tuple[str, ...] = ()
    """Names of worlds that say nothing about it: that with a KL, where its trainer has the penalty
    in another place; and for a critic's targets those with rewards on every token, where it takes
    one number a text."""

    def check(self) -> Report | KLReport:
        """Check it in all worlds that say something about it."""
        if self.kind == "kl":
            return check_kl(self.function, self.name)
        if self.kind == "loss":
            return check_loss(self.function, self.name)
        grouped = self.kind == "groups"
        known = GROUP_WORLDS if grouped else WORLDS
        worlds = [world for world in known if world.name not in self.without]
        if self.kind == "returns":
            return check_returns(self.function, self.name, worlds)
        return check_advantages(self.function, self.name, grouped=grouped, worlds=worlds)
